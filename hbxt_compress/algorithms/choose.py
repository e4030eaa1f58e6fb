"""Which transform or mixing a layer gets: what its candidates are worth on held-out inputs.

First by a cheap estimate. Rounding with feedback leaves (W - Q) H (W - Q)^T = sum_j d_j e_j^2 with
e_j the rounding error of column j and d_j the pivots of H = B D B^T; on other rows, of covariance
H', the d_j become the diagonal of B^-1 H' B^-T. So scales are searched for the fitting rows'
pivots, the nearest levels give e_j, and the held-out rows say what they cost, an overfitted
feedback included. Rounding the input costs what it does to some held-out rows; the two errors have
nothing to do with each other and add up. Then, where the caller has the time, the best two are
rounded in full. Errors are relative to the layer's output, which no candidate changes, and so
comparable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from hbxt_compress.algorithms.feedback import factorise
from hbxt_compress.algorithms.low_rank import branch, split_low_rank
from hbxt_compress.algorithms.scales import search_scales
from hbxt_compress.algorithms.transform import Mixing, Transform, channel_power
from hbxt_compress.formats import WeightFormat
from hbxt_compress.formats.activations import ActivationFormat
from hbxt_compress.stats import LayerInputs

__all__ = [
    "IDENTITY",
    "UNJUDGED",
    "Finish",
    "choose_mixing",
    "choose_transform",
    "estimated_losses",
    "output_error",
]

IDENTITY = "identity"
UNJUDGED = "identity: no held-out rows to choose with"
Finish = Callable[[Tensor, LayerInputs, WeightFormat], float]
"""The output error on held-out rows, see `output_error`, of a weight rounded in full."""

_Map = TypeVar("_Map", Transform, Mixing)
_DAMPING = 0.01  # of the mean diagonal, as error feedback itself uses about as much
_N_FINALISTS = 2
_WEIGHTS = 1 << 16  # that an estimate rounds: the mean of their squared errors is 0.02 dB sure
_LEAST_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Price:
    """What a rounding error in each column costs after feedback, float64 I, and the layer's input.

    fit_I: on the rows that the feedback was made for. held_out_I: with it, on the held-out rows.
    """

    fit_I: Tensor
    held_out_I: Tensor

    def mapped(self, along: Callable[[Tensor], Tensor]) -> _Price:
        """The prices of scaled or reordered columns."""
        return _Price(fit_I=along(self.fit_I), held_out_I=along(self.held_out_I))

    @classmethod
    def of(cls, inputs: LayerInputs) -> _Price:
        hessian = inputs.fit.hessian(centred=inputs.takes_bias)
        other = _held_out(inputs)
        mean = float(hessian.diagonal().mean())
        if not math.isfinite(mean) or not bool(torch.isfinite(other).all()):
            raise ValueError("input statistics hold NaN or infinity")
        order = hessian.diagonal().argsort(descending=True, stable=True)
        damping = _DAMPING * mean if mean > 0 else 1.0
        for _ in range(6):
            damped = hessian.clone()
            damped.diagonal().add_(damping)
            if factor := factorise(damped, order):
                break
            damping *= 10
        else:
            raise ValueError("the inputs' covariance is not positive semidefinite")
        half = torch.linalg.solve_triangular(
            factor.unit_II, other[order[:, None], order], upper=True
        )
        whole = torch.linalg.solve_triangular(factor.unit_II, half.mT.contiguous(), upper=True)
        held_out = torch.empty_like(factor.pivots_I)
        held_out[order] = whole.diagonal()
        return cls(fit_I=factor.pivots_I.double(), held_out_I=held_out.clamp_min(0).double())


def output_error(weight_OI: Tensor, rounded_OI: Tensor, inputs: LayerInputs) -> float:
    """(W - Q) H (W - Q)^T / (W H W^T) on the held-out rows, 0..inf; 0 if the layer gives nothing.

    H is Cov(y) where a bias takes the mean, else E[y y^T].
    """
    hessian = _held_out(inputs)
    lost = _energy(weight_OI.double() - rounded_OI.double(), hessian)
    kept = _energy(weight_OI.double(), hessian)
    return lost / kept if kept > 0 else 0.0


def estimated_losses(
    weights: Sequence[Tensor], slices: Sequence[LayerInputs], fmts: Sequence[Sequence[WeightFormat]]
) -> list[list[float]]:
    """The (W - Q) H (W - Q)^T on held-out rows that rounding with feedback would leave.

    weights: O I of layers of one input, and for each the formats in question. slices: what is known
    of the input, in order; between them nothing is fed back. The sum over outputs, H as in
    `output_error`. A format's low-rank branch is split off first, weighted by the inputs' variance.
    """
    prices = [_Price.of(one) for one in slices]
    price = _Price(
        fit_I=torch.cat([one.fit_I for one in prices]),
        held_out_I=torch.cat([one.held_out_I for one in prices]),
    )
    power_I = torch.cat([channel_power(one) for one in slices])
    losses = []
    for weight_OI, own in zip(weights, fmts, strict=True):
        found = []
        for fmt in own:
            rest_OI = weight_OI.float()
            if fmt.rank:
                low_rank = split_low_rank(weight_OI, power_I, fmt.rank)
                rest_OI = (weight_OI.double() - branch(low_rank)).float()
            found.append(_estimate(rest_OI, fmt, price, 1.0))
        losses.append(found)
    return losses


def choose_transform(
    weights: Sequence[Tensor],
    inputs: LayerInputs,
    fmts: Sequence[WeightFormat],
    candidates: Iterable[tuple[str, Transform]],
    least_gain_db: float = 0.3,
    finish: Finish | None = None,
    activation: ActivationFormat | None = None,
) -> tuple[str, Transform, float]:
    """Name, transform and gain in dB for layers of one input; the identity unless one gains enough.

    weights: O I of each layer, and fmts its format; the mean of their relative errors counts, of
    those that have codes. activation: what their input is rounded to. The gain is the estimate's,
    or that of `finish` if given, which knows no activation.
    """
    if inputs.held_out is None:
        return UNJUDGED, Transform(), 0.0
    layers = [(w, fmt) for w, fmt in zip(weights, fmts, strict=True) if any(fmt.n_levels)]
    if not layers:
        return IDENTITY, Transform(), 0.0
    plain, bare = _Price.of(inputs), inputs.without_products()
    kept = [_energy(_sample(weight_OI), _held_out(inputs)) for weight_OI, _ in layers]

    def estimate(transform: Transform) -> float:
        seen = transform.inputs(inputs if transform.block else bare)
        if transform.block:
            price = _Price.of(seen)
        else:  # in one order and without damping, d -> r^2 d is exact
            price = plain.mapped(lambda d_I: transform.apply(transform.apply(d_I)))
        errors = []
        for (weight_OI, fmt), energy in zip(layers, kept, strict=True):
            rows_OI = transform.weight(_sample(weight_OI))
            errors.append(_estimate(rows_OI, fmt, price, energy))
            if activation is not None:
                errors[-1] += _of_input(rows_OI, seen, activation, energy)
        return _mean(errors)

    def in_full(transform: Transform, finish: Finish) -> float:
        seen = transform.inputs(inputs)
        return _mean(finish(transform.weight(weight_OI), seen, fmt) for weight_OI, fmt in layers)

    thorough = None if finish is None else partial(in_full, finish=finish)
    return _decide(Transform(), candidates, estimate, thorough, least_gain_db)


def choose_mixing(
    first_FI: Tensor,
    second_OF: Tensor,
    inputs_of_first: LayerInputs | None,
    inputs_of_second: LayerInputs,
    fmts: tuple[WeightFormat, WeightFormat],
    candidates: Iterable[tuple[str, Mixing]],
    least_gain_db: float = 0.05,
    finish: Finish | None = None,
) -> tuple[str, Mixing, float]:
    """Name, mixing and gain in dB for the features between two layers, as `choose_transform`.

    The mean of both layers' relative errors counts; the first's does not without its inputs, nor
    that of a layer whose format has no codes.
    """
    if inputs_of_second.held_out is None:
        return UNJUDGED, Mixing(), 0.0
    judged_first = None if not any(fmts[0].n_levels) else inputs_of_first
    judges_second = any(fmts[1].n_levels)
    if judged_first is not None and judged_first.held_out is None:
        return UNJUDGED, Mixing(), 0.0
    if judged_first is None and not judges_second:
        return IDENTITY, Mixing(), 0.0
    plain = _Price.of(inputs_of_second)
    kept = _energy(_sample(second_OF), _held_out(inputs_of_second))
    price_of_first = None if judged_first is None else _Price.of(judged_first)

    def estimate(mixing: Mixing) -> float:
        errors = []
        if judged_first is not None and price_of_first is not None:
            rows = _sample(first_FI if mixing.turn_NDD is None else mixing.first(first_FI, None)[0])
            energy = _energy(rows, _held_out(judged_first))
            errors.append(_estimate(rows, fmts[0], price_of_first, energy))
        if judges_second:
            if mixing.turn_NDD is None:
                price = plain.mapped(mixing.apply)
            else:
                price = _Price.of(mixing.inputs(inputs_of_second))
            errors.append(_estimate(mixing.second(_sample(second_OF)), fmts[1], price, kept))
        return _mean(errors)

    def in_full(mixing: Mixing, finish: Finish) -> float:
        errors = []
        if judged_first is not None:  # its rows are rounded one by one: their order is no matter
            rows = first_FI if mixing.turn_NDD is None else mixing.first(first_FI, None)[0]
            errors.append(finish(rows, judged_first, fmts[0]))
        if judges_second:
            seen = mixing.inputs(inputs_of_second)
            errors.append(finish(mixing.second(second_OF), seen, fmts[1]))
        return _mean(errors)

    thorough = None if finish is None else partial(in_full, finish=finish)
    return _decide(Mixing(), candidates, estimate, thorough, least_gain_db)


def _decide(
    identity: _Map,
    candidates: Iterable[tuple[str, _Map]],
    estimate: Callable[[_Map], float],
    in_full: Callable[[_Map], float] | None,
    least_gain_db: float,
) -> tuple[str, _Map, float]:
    """The best candidate if it beats the identity by enough; ties go to the earlier one.

    Errors alike to nine digits tie: the last ones depend on the number of threads.
    """
    base = estimate(identity)
    tried = [(estimate(candidate), name, candidate) for name, candidate in candidates]
    best = sorted((one for one in tried if one[0] < base), key=lambda one: _rounded(one[0]))
    if not best:
        return IDENTITY, identity, 0.0
    if in_full is not None:
        base = in_full(identity)
        finals = [
            (in_full(candidate), name, candidate) for _, name, candidate in best[:_N_FINALISTS]
        ]
        best = sorted((one for one in finals if one[0] < base), key=lambda one: _rounded(one[0]))
    if not best:
        return IDENTITY, identity, 0.0
    error, name, chosen = best[0]
    gain_db = 10 * math.log10(base / max(error, 1e-30))
    return (name, chosen, gain_db) if gain_db >= least_gain_db else (IDENTITY, identity, 0.0)


def _rounded(error: float) -> float:
    return float(f"{error:.9g}")


def _estimate(weight_OI: Tensor, fmt: WeightFormat, price: _Price, output: float) -> float:
    """Relative output error of a weight rounded with feedback; 0 if the output is zero."""
    grid = search_scales(weight_OI, fmt, price.fit_I.float())
    error_OI = (weight_OI - grid.value(grid.levels(weight_OI))).double()
    return float(error_OI.square().sum(0) @ price.held_out_I) / output if output > 0 else 0.0


def _of_input(
    weight_OI: Tensor, inputs: LayerInputs, activation: ActivationFormat, output: float
) -> float:
    """Relative output error of rounding the input alone, on held-out rows; 0 if the output is."""
    assert inputs.held_out is not None
    if output <= 0:
        return 0.0
    rows_NI = torch.cat(inputs.held_out.examples).float()
    rounded_NI = activation.apply(rows_NI, activation.payload(inputs.everything().absmax_I))
    lost_NO = (rounded_NI - rows_NI) @ weight_OI.T
    return float(lost_NO.double().square().sum()) / len(rows_NI) / output


def _sample(weight_OI: Tensor) -> Tensor:
    """Evenly spaced rows, float32, enough of them for an estimate."""
    n_out, n_in = weight_OI.shape
    n_rows = min(n_out, max(_LEAST_ROWS, _WEIGHTS // n_in))
    return weight_OI[torch.arange(n_rows) * n_out // n_rows].float()


def _held_out(inputs: LayerInputs) -> Tensor:
    if inputs.held_out is None:
        raise ValueError("there are no held-out rows to judge with")
    return inputs.held_out.hessian(centred=inputs.takes_bias)


def _energy(weight_OI: Tensor, hessian_II: Tensor) -> float:
    """Sum over the rows of w H w^T."""
    exact = weight_OI.to(hessian_II)
    return float((exact @ hessian_II * exact).sum())


def _mean(errors: Iterable[float]) -> float:
    listed = list(errors)
    return sum(listed) / len(listed)
