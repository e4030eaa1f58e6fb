"""Transform and Mixing: linear maps before a layer that leave what the model computes as it is.

A Transform acts on a layer's input at run time and is undone in that layer's weight: W x = W' x'.
A Mixing acts on the features between two layers (a value and an output projection, the two halves
of an MLP) and is folded into both weights: it costs nothing at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hbxt_compress.stats import LayerInputs, LayerStats, mirror

__all__ = ["Mixing", "Transform", "channel_power", "hadamard_matrix"]

_LEAST, _MOST = 1e-3, 1e3  # of an input scale: products with it stay far inside float16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Transform:
    """x' = H (r * x): channels scaled by r, then blocks of neighbouring channels rotated by H.

    scale_I: r, float16, in [1e-3, 1e3]; None: ones. block: size of the normalised
    Sylvester-Hadamard matrix, a power of two that divides I; 0: no rotation. Without either the
    transform is the identity, and has no payload.
    """

    scale_I: Tensor | None = None
    block: int = 0

    def __post_init__(self) -> None:
        """Refuses what a file could not hold or a graph could not undo."""
        if self.block and (self.block < 2 or self.block & (self.block - 1)):
            raise ValueError(f"a rotation of {self.block} channels: must be a power of two, or 0")
        if (scale := self.scale_I) is None:
            return
        inside = bool(((scale >= _LEAST) & (scale <= _MOST)).all())  # False for NaN
        if scale.dtype != torch.float16 or scale.dim() != 1 or not inside:
            raise ValueError(
                f"an input scale of dtype {scale.dtype} and shape {tuple(scale.shape)}: must be "
                f"a float16 vector with values in [{_LEAST:g}, {_MOST:g}]; see Transform.scaling"
            )

    @classmethod
    def scaling(cls, factor_I: Tensor, block: int = 0) -> Transform:
        """The transform whose scale is the factor, clipped and rounded to what can be stored."""
        if not bool(torch.isfinite(factor_I).all()):
            raise ValueError("an input scale holds NaN or infinity")
        return cls(scale_I=factor_I.clamp(_LEAST, _MOST).to(torch.float16), block=block)

    @classmethod
    def of(cls, payload: Mapping[str, Tensor]) -> Transform:
        """The transform that a weight's payload names; the identity if it names none."""
        rotation = payload.get("rotation")
        block = 0 if rotation is None else int(rotation)
        return cls(scale_I=payload.get("input_scale"), block=block)

    def payload(self) -> Mapping[str, Tensor]:
        """input_scale float16 I and rotation int32 scalar, where there is one."""
        stored = {} if self.scale_I is None else {"input_scale": self.scale_I}
        if self.block:
            stored["rotation"] = torch.tensor(self.block, dtype=torch.int32)
        return stored

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing and costs nothing."""
        return self.scale_I is None and not self.block

    @property
    def bytes(self) -> int:
        """Bytes of the scale. A file holds each Hadamard matrix once, 4 B^2 bytes, not counted."""
        return 0 if self.scale_I is None else 2 * self.scale_I.numel()

    def apply(self, x: Tensor) -> Tensor:
        """x' in the dtype of x, features last."""
        scaled = x if self.scale_I is None else x * self.scale_I.to(x)
        return self._rotated(scaled)

    def weight(self, weight_OI: Tensor) -> Tensor:
        """W' with W' x' = W x, in the dtype of W, computed in float64."""
        if self.is_identity:
            return weight_OI
        exact = weight_OI.double()
        exact = exact if self.scale_I is None else exact / self.scale_I.to(exact)
        return self._rotated(exact).to(weight_OI.dtype)

    def undo(self, weight_OI: Tensor) -> Tensor:
        """W with W x = W' x': the weight of the untransformed input, in float64 and cast back."""
        if self.is_identity:
            return weight_OI
        exact = self._rotated(weight_OI.double())
        exact = exact if self.scale_I is None else exact * self.scale_I.to(exact)
        return exact.to(weight_OI.dtype)

    def stats(self, stats: LayerStats) -> LayerStats:
        """The statistics of the transformed rows, exact but for absmax_I behind a rotation.

        There it is an upper bound, sum_k |H_jk| absmax_k.

        Raises:
            ValueError: a rotation of statistics that were gathered without products.
        """
        scale = torch.ones_like(stats.shift_I) if self.scale_I is None else self.scale_I.double()
        bound = absmax = scale * stats.absmax_I
        if self.block:
            blocks = self._blocks(absmax).sum(-1, keepdim=True) * self.block**-0.5
            bound = blocks.expand(-1, self.block).flatten()
        squares = None if self.block else scale.square() * stats.squares_y_I
        return _carried(stats, self.apply, squares_y_I=squares, absmax_I=bound)

    def inputs(self, inputs: LayerInputs) -> LayerInputs:
        """What a rounder may know of the transformed input."""
        return inputs if self.is_identity else _both(inputs, self.stats)

    def _blocks(self, tensor: Tensor) -> Tensor:
        if tensor.shape[-1] % self.block:
            raise ValueError(
                f"a rotation of {self.block} channels does not divide {tensor.shape[-1]} features"
            )
        return tensor.unflatten(-1, (-1, self.block))

    def _rotated(self, tensor: Tensor) -> Tensor:
        """Each block times H, which is symmetric and its own inverse."""
        if not self.block:
            return tensor
        matrix = hadamard_matrix(self.block).to(tensor)
        return (self._blocks(tensor) @ matrix).flatten(-2)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mixing:
    """h' = an orthogonal map of the F features between a first and a second layer.

    order_F: int64, new feature k is old feature order_F[k]. turn_NDD: float64, one orthogonal
    matrix for each of N runs of D neighbouring features (heads), h'_n = turn_n h_n; N D = F. At
    most one of them is given; neither is the identity.
    """

    order_F: Tensor | None = None
    turn_NDD: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuses a map that is not orthogonal: it would change what the model computes."""
        if self.order_F is not None and self.turn_NDD is not None:
            raise ValueError("a mixing either permutes or rotates")
        if (order := self.order_F) is not None and not torch.equal(
            order.sort().values, torch.arange(order.numel(), device=order.device)
        ):
            raise ValueError("a mixing's order must name every feature once")
        if (turn := self.turn_NDD) is not None:
            unit = torch.eye(turn.shape[-1], dtype=torch.float64, device=turn.device)
            if not bool(((turn @ turn.mT - unit).abs() < 1e-10).all()):
                raise ValueError("a mixing's rotation must be orthogonal, in float64")

    def apply(self, h: Tensor) -> Tensor:
        """h' in the dtype of h, features last; a rotation is computed in float64."""
        if self.order_F is not None:
            return h[..., self.order_F]
        if (turn := self.turn_NDD) is None:
            return h
        runs_NMD = h.double().reshape(-1, *turn.shape[:2]).transpose(0, 1)
        return (runs_NMD @ turn.mT).transpose(0, 1).reshape(h.shape).to(h.dtype)

    def first(self, weight_FI: Tensor, bias_F: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the layer that makes the features: its rows are mixed."""
        bias = None if bias_F is None else self.apply(bias_F)
        return self.apply(weight_FI.mT).mT.contiguous(), bias

    def second(self, weight_OF: Tensor) -> Tensor:
        """Weight of the layer that reads the features: its columns are mixed."""
        return self.apply(weight_OF)  # W' h' = W T^T T h, and the rows of W T^T are T w

    def stats(self, stats: LayerStats) -> LayerStats:
        """The statistics of the mixed features; behind a rotation absmax is an upper bound.

        Raises:
            ValueError: a rotation of statistics that were gathered without products.
        """
        if self.turn_NDD is None:
            squares = self.apply(stats.squares_y_I)
            absmax = self.apply(stats.absmax_I)
            return _carried(stats, self.apply, squares_y_I=squares, absmax_I=absmax)
        bound = Mixing._sizes(self.turn_NDD, stats.absmax_I)
        return _carried(stats, self.apply, squares_y_I=None, absmax_I=bound)

    @staticmethod
    def _sizes(turn_NDD: Tensor, absmax_F: Tensor) -> Tensor:
        runs = absmax_F.unflatten(-1, turn_NDD.shape[:2]).unsqueeze(-1)
        return (turn_NDD.abs() @ runs).flatten()

    def inputs(self, inputs: LayerInputs) -> LayerInputs:
        """What a rounder of the second layer may know of its mixed input."""
        return _both(inputs, self.stats)


def hadamard_matrix(size: int) -> Tensor:
    """The Sylvester-Hadamard matrix of a power of two, divided by sqrt(size); float64."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"no Sylvester-Hadamard matrix of size {size}: must be a power of two")
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, step)
    return matrix * size**-0.5


def channel_power(inputs: LayerInputs) -> Tensor:
    """What an error in each column of the weight costs, float64 I, of the fitting rows.

    Var(y) where a bias takes the mean, else E[y^2]; at least 1e-6 of its mean, and ones if every
    input is zero.
    """
    power = inputs.fit.mean_square_I
    if inputs.takes_bias:
        power = (power - inputs.fit.mean_y_I.square()).clamp_min(0)
    mean = float(power.mean())
    return power.clamp_min(1e-6 * mean) if mean > 0 else torch.ones_like(power)


def _carried(
    stats: LayerStats,
    along: Callable[[Tensor], Tensor],
    *,
    squares_y_I: Tensor | None,
    absmax_I: Tensor,
) -> LayerStats:
    """Statistics of mapped rows; `along` maps the last axis, None: squares are the diagonal's."""
    yy = None if stats.products_yy_II is None else mirror(stats.products_yy_II.clone())
    yy, xy = (
        None if products is None else along(along(products).mT).mT.contiguous()
        for products in (yy, stats.products_xy_II)
    )
    if squares_y_I is None:
        if yy is None:
            raise ValueError("these statistics were gathered without products: no rotation of them")
        squares_y_I = yy.diagonal().clone()
    return LayerStats(
        n=stats.n,
        weight=stats.weight,
        shift_I=along(stats.shift_I),
        total_x_I=along(stats.total_x_I),
        total_y_I=along(stats.total_y_I),
        squares_y_I=squares_y_I,
        absmax_I=absmax_I,
        products_yy_II=yy,
        products_xy_II=xy,
        examples=[along(rows_y) for rows_y in stats.examples],
    )


def _both(inputs: LayerInputs, carry: Callable[[LayerStats], LayerStats]) -> LayerInputs:
    held_out = None if inputs.held_out is None else carry(inputs.held_out)
    return LayerInputs(fit=carry(inputs.fit), held_out=held_out, takes_bias=inputs.takes_bias)
