"""LayerStats: what a layer's inputs looked like, in the real model and in the half quantized one.

x is a layer's input in full precision, y its input once everything before it is quantized, both at
the same state of the same trajectory. Sums are kept, not averages, in float64 and shifted by the
mean of the first rows against cancellation; partial results merge in any order to 1e-9. Products of
rows are float32 before they are summed: covariances are exact to 1e-6. Of more than 2048 inputs
they are summed in float32 too, and of more than 8192 E[x y^T] is left out: with 14336 inputs it
would be 0.8 GB. A few rows are kept as they are, for errors that no sum tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["WIDEST", "LayerInputs", "LayerStats", "Need", "mirror", "panels", "quadratic"]

T = TypeVar("T")
Need = Literal["moments", "covariance"]
"""moments: means, squares and largest values. covariance: also E[y y^T] and E[x y^T]."""

_ROWS_AT_ONCE = 4096  # of float32 products between additions to the float64 sums
_NUMBERS_AT_ONCE = 1 << 24  # of them, which are copied in float64
_EXAMPLES = 2  # rows kept of each tensor that is added
_COLUMNS_AT_ONCE = 1024  # of y y^T, so that hardly more than its upper triangle is computed
_FLOAT64_TO = 2048  # inputs
WIDEST = 8192
"""inputs of a layer above which E[x y^T] is left out, and no rows are held out"""


@dataclass(slots=True, kw_only=True)
class LayerStats:
    """Sums over N weighted rows (x_I, y_I) of one layer with I inputs; float64, but for products.

    n: rows seen. weight: sum of their weights. shift_I: what is subtracted from x and y in the
    sums below. total_x_I, total_y_I, squares_y_I: sums. absmax_I: max |y|, unshifted, unweighted.
    products_yy_II, products_xy_II: sums of y y^T, of which the upper triangle counts, and of
    x y^T, float64 or (many inputs) float32; None where nobody needs them or, of x y^T, where the
    inputs are too many.
    examples: some rows y, float32 N I each, unshifted, whatever their weight.
    """

    n: int
    weight: float
    shift_I: Tensor
    total_x_I: Tensor
    total_y_I: Tensor
    squares_y_I: Tensor
    absmax_I: Tensor
    products_yy_II: Tensor | None = None
    products_xy_II: Tensor | None = None
    examples: list[Tensor] = field(default_factory=list)

    @classmethod
    def empty(
        cls,
        n_inputs: int,
        need: Need,
        device: torch.device | None = None,
        *,
        cross: bool = True,
    ) -> LayerStats:
        """No rows yet. device: of the rows, and so of all sums.

        cross: whether a covariance is to have E[x y^T] beside it.
        """
        zeros = torch.zeros(5, n_inputs, dtype=torch.float64, device=device)
        wanted = need == "covariance", need == "covariance" and cross and n_inputs <= WIDEST
        precision = torch.float64 if n_inputs <= _FLOAT64_TO else torch.float32
        products = [
            torch.zeros(n_inputs, n_inputs, dtype=precision, device=device) if one else None
            for one in wanted
        ]
        return cls(
            n=0,
            weight=0.0,
            shift_I=zeros[0],
            total_x_I=zeros[1],
            total_y_I=zeros[2],
            squares_y_I=zeros[3],
            absmax_I=zeros[4],
            products_yy_II=products[0],
            products_xy_II=products[1],
        )

    def add(
        self, x: Tensor, y: Tensor, weight: float = 1.0, *, shift_I: Tensor | None = None
    ) -> None:
        """Adds rows of two tensors of equal shape (any leading axes), each counted `weight` times.

        shift_I: what is subtracted from all rows, if these are the first; None: their mean.

        Raises:
            ValueError: a value is not finite.
        """
        self.add_all([(x, y, weight)], shift_I=shift_I)

    def add_all(
        self, parts: Sequence[tuple[Tensor, Tensor, float]], *, shift_I: Tensor | None = None
    ) -> None:
        """Adds several tensors x and y, each with its weight; as `add` of one after the other.

        Large sums of products are read and written once for all of them.
        """
        coarse = self.products_yy_II is not None and self.products_yy_II.dtype == torch.float32
        waiting: list[tuple[Tensor, Tensor]] = []
        for x, y, weight in parts:
            rows_x = x.detach().reshape(-1, x.shape[-1]).float()
            rows_y = rows_x if y is x else y.detach().reshape(-1, y.shape[-1]).float()
            self._note(rows_x, rows_y, weight, shift_I)
            around_I = self.shift_I.to(torch.float32 if coarse else torch.float64)
            at_once = min(_ROWS_AT_ONCE, max(1, _NUMBERS_AT_ONCE // rows_x.shape[1]))
            chunks = zip(rows_x.split(at_once), rows_y.split(at_once), strict=True)
            for chunk_x, chunk_y in chunks:
                shifted_x = chunk_x.to(around_I) - around_I
                shifted_y = shifted_x if y is x else chunk_y.to(around_I) - around_I
                self.total_x_I = self.total_x_I + weight * shifted_x.sum(0)
                self.total_y_I = self.total_y_I + weight * shifted_y.sum(0)
                self.squares_y_I = self.squares_y_I + weight * shifted_y.square().sum(0)
                if coarse:  # weighted now, so that rows of any weight can be multiplied at once
                    right = shifted_y.mul_(weight**0.5)
                    is_one = y is x or self.products_xy_II is None
                    waiting.append((right if is_one else shifted_x.mul_(weight**0.5), right))
                else:
                    self._add_products(shifted_x.float(), shifted_y.float(), weight)
        if waiting:
            rights = torch.cat([right for _, right in waiting])
            is_one = all(left is right for left, right in waiting)
            lefts = rights if is_one else torch.cat([left for left, _ in waiting])
            self._add_products(lefts, rights, 1.0)

    def _note(self, rows_x: Tensor, rows_y: Tensor, weight: float, shift_I: Tensor | None) -> None:
        """Counts rows, and keeps some of them."""
        if not all(bool(torch.isfinite(torch.stack(t.aminmax())).all()) for t in (rows_x, rows_y)):
            raise ValueError("activations hold NaN or infinity")
        if self.n == 0:
            self.shift_I = rows_x.double().mean(0) if shift_I is None else shift_I
        self.n += rows_x.shape[0]
        self.weight += weight * rows_x.shape[0]
        self.absmax_I = torch.maximum(self.absmax_I, rows_y.abs().amax(0).double())
        at = [(2 * k + 1) * len(rows_y) // (2 * _EXAMPLES) for k in range(_EXAMPLES)]
        self.examples.append(rows_y[torch.tensor(at)])

    def _add_products(self, left_NI: Tensor, right_NI: Tensor, weight: float) -> None:
        if self.products_yy_II is None:
            return
        for some, _ in panels(right_NI.shape[1]):
            own_II = self.products_yy_II[some, some.start :]
            _add_products(own_II, right_NI[:, some], right_NI[:, some.start :], weight)
        if self.products_xy_II is not None:
            _add_products(self.products_xy_II, left_NI, right_NI, weight)

    def merged(self, other: LayerStats) -> LayerStats:
        """The statistics of both sets of rows."""
        if not self.n:
            return other
        moved = other.shifted(self.shift_I)
        return LayerStats(
            n=self.n + moved.n,
            weight=self.weight + moved.weight,
            shift_I=self.shift_I,
            total_x_I=self.total_x_I + moved.total_x_I,
            total_y_I=self.total_y_I + moved.total_y_I,
            squares_y_I=self.squares_y_I + moved.squares_y_I,
            absmax_I=torch.maximum(self.absmax_I, moved.absmax_I),
            products_yy_II=_sum(self.products_yy_II, moved.products_yy_II),
            products_xy_II=_sum(self.products_xy_II, moved.products_xy_II),
            examples=[*self.examples, *moved.examples],
        )

    def shifted(self, shift_I: Tensor) -> LayerStats:
        """The same rows, summed up as if `shift_I` had been subtracted from them."""
        d, w = self.shift_I - shift_I, self.weight
        t_x, t_y = self.total_x_I, self.total_y_I
        yy, xy = self.products_yy_II, self.products_xy_II
        if bool(d.any()):
            yy = None if yy is None else _moved(yy, d, t_y, t_y, w)
            xy = None if xy is None else _moved(xy, d, t_x, t_y, w)
        return LayerStats(
            n=self.n,
            weight=w,
            shift_I=shift_I,
            total_x_I=t_x + w * d,
            total_y_I=t_y + w * d,
            squares_y_I=self.squares_y_I + 2 * d * t_y + w * d * d,
            absmax_I=self.absmax_I,
            products_yy_II=yy,
            products_xy_II=xy,
            examples=self.examples,
        )

    @property
    def mean_x_I(self) -> Tensor:
        """E[x], float64 I."""
        return self.shift_I + self.total_x_I / max(self.weight, 1e-30)

    @property
    def mean_y_I(self) -> Tensor:
        """E[y], float64 I."""
        return self.shift_I + self.total_y_I / max(self.weight, 1e-30)

    @property
    def mean_square_I(self) -> Tensor:
        """E[y^2], float64 I."""
        plain = self.shifted(torch.zeros_like(self.shift_I))
        return plain.squares_y_I / max(self.weight, 1e-30)

    def hessian(self, *, centred: bool) -> Tensor:
        """Cov(y) if centred, else E[y y^T]; I I, symmetric, in the products' precision."""
        return mirror(self._second(self.products_yy_II, self.mean_y_I, centred))

    def cross(self, *, centred: bool) -> Tensor:
        """Cov(x, y) if centred, else E[x y^T]; I I, x along the rows, as the products."""
        return self._second(self.products_xy_II, self.mean_x_I, centred)

    def energy(self, rows_OI: Tensor, *, centred: bool) -> Tensor:
        """The mean square of what each row makes of y, or its variance; float64 O.

        That is row H row^T, of an H that takes no memory.
        """
        if self.products_yy_II is None:
            raise ValueError("these statistics were gathered without products")
        found_O = quadratic(rows_OI, self.products_yy_II).double() / max(self.weight, 1e-30)
        rows_OI = rows_OI.to(self.products_yy_II)
        around_I = (self.mean_y_I - self.shift_I).to(rows_OI)
        found_O -= (rows_OI @ around_I).double().square()
        if centred:
            return found_O
        return found_O + (rows_OI @ self.mean_y_I.to(rows_OI)).double().square()

    def _second(self, products_II: Tensor | None, mean_left_I: Tensor, centred: bool) -> Tensor:
        if products_II is None:
            raise ValueError("these statistics were gathered without products")
        w = max(self.weight, 1e-30)
        left, right = mean_left_I - self.shift_I, self.mean_y_I - self.shift_I
        found_II = products_II / w
        found_II.addr_(left.to(found_II), right.to(found_II), alpha=-1)
        if not centred:
            found_II.addr_(mean_left_I.to(found_II), self.mean_y_I.to(found_II))
        return found_II


def mirror(matrix_II: Tensor) -> Tensor:
    """The same matrix, its upper triangle now copied to the lower one."""
    for some, later in panels(len(matrix_II)):
        upper_II = matrix_II[some, some].triu()
        matrix_II[some, some] = upper_II + upper_II.triu(1).T
        matrix_II[later, some] = matrix_II[some, later].T
    return matrix_II


def quadratic(rows_OI: Tensor, matrix_II: Tensor) -> Tensor:
    """row M row^T of each row, O in the precision of M, of which the upper triangle counts."""
    rows_OI = rows_OI.to(matrix_II)
    found_O = rows_OI.new_zeros(len(rows_OI))
    for some, later in panels(len(matrix_II)):
        own_OI = rows_OI[:, some]
        found_O += 2 * (own_OI @ matrix_II[some, some].triu(1)).mul_(own_OI).sum(1)
        found_O += 2 * (own_OI @ matrix_II[some, later]).mul_(rows_OI[:, later]).sum(1)
    return found_O + rows_OI.square() @ matrix_II.diagonal()


def panels(n: int) -> Iterator[tuple[slice, slice]]:
    """Of n columns or rows some at a time, and all behind them."""
    for start in range(0, n, _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, n)
        yield slice(start, stop), slice(stop, n)


def _add_products(sum_II: Tensor, left_NI: Tensor, right_NI: Tensor, weight: float) -> None:
    """Adds weight x left^T right, float32 products, in place."""
    if sum_II.dtype == torch.float32:
        sum_II.addmm_(left_NI.T, right_NI, alpha=weight)
    else:
        sum_II += weight * (left_NI.T @ right_NI).double()


def _moved(
    products_II: Tensor, d_I: Tensor, total_left_I: Tensor, total_right_I: Tensor, weight: float
) -> Tensor:
    """Sums of products of rows that are larger by d on both sides."""
    moved_II = products_II + torch.outer(d_I, total_right_I).to(products_II)
    moved_II += torch.outer(total_left_I, d_I).to(products_II)
    moved_II += (weight * torch.outer(d_I, d_I)).to(products_II)
    return moved_II


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else one + other


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInputs:
    """What a rounder may know of a layer's inputs.

    fit: rows to learn from. held_out: rows of other prompts, to choose with; None if there are too
    few prompts. takes_bias: the layer has a bias, so a constant error costs nothing. derived: what
    rounders have made of these statistics, by a key of theirs, for other layers of the same input.
    """

    fit: LayerStats
    held_out: LayerStats | None
    takes_bias: bool
    derived: dict[object, Any] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )  # init=False: other statistics in a copy begin with nothing

    def once(self, key: object, make: Callable[[], T]) -> T:
        """What `make` returned when it was first asked for by this key, or returns now."""
        if key not in self.derived:
            self.derived[key] = make()
        return cast(T, self.derived[key])

    def without_products(self) -> LayerInputs:
        """The same without covariances, which are costly to transform."""
        sides = [
            one and replace(one, products_yy_II=None, products_xy_II=None)
            for one in (self.fit, self.held_out)
        ]
        assert sides[0] is not None
        return replace(self, fit=sides[0], held_out=sides[1])

    def of_layer(self, *, takes_bias: bool) -> LayerInputs:
        """The same for a layer that has a bias or none; all such share what is derived."""
        own = replace(self, takes_bias=takes_bias)
        object.__setattr__(own, "derived", self.derived)
        return own

    def everything(self) -> LayerStats:
        """Both sets of rows together."""
        return self.fit if self.held_out is None else self.fit.merged(self.held_out)
