"""search_scales: the grid on which a weight, rounded to nearest, loses least.

For each group of a row many scales are tried. Symmetric grids: sigma * |a| / below * r, a the entry
of largest magnitude, sigma in {+, -}; a negative scale puts the largest entry on the deeper end.
Asymmetric grids: (max - min) / (below + above) * r, with the two whole zeros next to what centres
the range. r runs from 0.24 to 1.36 by 0.06, by 0.03 near 1: steps three times finer find 0.004 dB
more. Below 0.5 pays where few entries matter, above 1.12 where a group is small: with log-normal
importances of sigma 2 and groups of 32 both are worth 0.1 dB, of sigma 3 0.3 dB. The best is
refined in closed form if that helps, with u the importance s = sum(u w q) / sum(u q^2). Entries of
no importance set no range. Every scale is rounded to float16 before levels are computed, so what is
searched is what is stored.

The loss is that of squares or, on request, of another power of the error. Powers above 2 cut large
entries off less, which is what a net wants when nothing is known of its inputs: an entry that is
cut off errs always the same way. r is then 0.54 to 1.26 by 0.06 where all entries matter alike,
and the refit a step of Newton's method.

Large weights are searched by compiled code, which needs a C++ compiler: some hundred operations on
each number become one pass over it. Its sums differ from the others' in the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import mul

import torch
from torch import Tensor

from hbxt_compress.algorithms.compiled import Compiled
from hbxt_compress.algorithms.grid import Grid
from hbxt_compress.algorithms.threads import each_alone, one_thread
from hbxt_compress.formats import WeightFormat

__all__ = ["search_scales"]

_RATIOS = tuple(i / 100 for i in (*range(24, 60, 6), *range(60, 112, 3), *range(112, 141, 6)))
_RATIOS_NEAR_1 = tuple(i / 100 for i in range(54, 127, 6))
_N_REFITS = 2
_WEIGHTS_AT_ONCE = 1 << 18  # of a chunk of rows: its few copies stay near the core
_COMPILED_AT_ONCE = 1 << 20  # weights of a chunk in compiled code, which keeps no copies
_EAGER_UP_TO = 1024  # inputs: compiling takes as long as searching some ten million weights
_CODE = Compiled("scales of large weights are searched")
_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # magnitudes that float16 holds

Found = tuple[Tensor, Tensor | None]
Find = Callable[[Tensor, Tensor | None, Tensor], Found]


def search_scales(
    weight_OI: Tensor,
    fmt: WeightFormat,
    importance_I: Tensor | None = None,
    *,
    norm: float = 2.0,
    thorough: bool = True,
) -> Grid:
    """The grid of least sum_j importance_j |w_j - q_j|^norm per group; importance None: ones.

    norm: a multiple of 0.5, at least 2. A group whose importances are all zero is searched as if
    they were ones. Without `thorough` the range of each group alone decides: its largest entry is
    the deepest level (symmetric), or its least and largest entries are the outer levels
    (asymmetric).

    Raises:
        ValueError: the format has no levels, its group does not divide the inputs, or a weight or
            an importance is not finite (or, an importance, negative).
    """
    _checked(weight_OI, fmt, importance_I)
    n_in = weight_OI.shape[1]
    size = fmt.group or n_in
    root_GS = None if importance_I is None else _root(importance_I, size, norm).to(weight_OI.device)
    how = _Search(
        below=fmt.n_levels[0],
        above=fmt.n_levels[1],
        asymmetric=fmt.asymmetric,
        halves=round(2 * norm),
    )
    factors_C = how.factors(weighted=root_GS is not None).to(weight_OI.device)
    wide = weight_OI.device.type == "cpu" and n_in > _EAGER_UP_TO
    compiled = _compiled(how, root_GS is not None) if thorough and wide else None
    find: Find = compiled or (how.nearest if thorough else how.range_alone)

    def of_rows(rows_OI: Tensor) -> Found:
        return find(rows_OI.float().reshape(len(rows_OI), -1, size), root_GS, factors_C)

    at_once = _WEIGHTS_AT_ONCE if compiled is None else _COMPILED_AT_ONCE
    # Of like sizes: for a chunk of a single row, code would be compiled anew
    chunks = weight_OI.detach().tensor_split(-(-weight_OI.numel() // max(n_in, at_once)))
    found = [of_rows(one) for one in chunks] if compiled is None else each_alone(of_rows, chunks)
    zeros = [zero_OG for _, zero_OG in found if zero_OG is not None]
    return Grid(
        scales_OG=torch.cat([scale_OG for scale_OG, _ in found]),
        zeros_OG=torch.cat(zeros) if zeros else None,
        group=size,
        below=how.below,
        above=how.above,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """How grids are searched. The weights are O G S: groups of a row, inputs of a group; C trials.

    halves: twice the norm's power; whole, because compiled code is made for any float. root_GS:
    importances to the power 1 / norm, None for ones.
    """

    below: int
    above: int
    asymmetric: bool
    halves: int

    def factors(self, *, weighted: bool) -> Tensor:
        """What the range's own scale is multiplied with, C: the first is 1."""
        ratios = _RATIOS_NEAR_1 if not weighted and self.halves > 4 else _RATIOS
        if self.asymmetric:
            return torch.tensor([1.0, *(ratio for ratio in ratios for _ in range(2))])
        signs = (1.0, -1.0) if self.below != self.above else (1.0,)
        return torch.tensor([1.0, *(ratio * sign for ratio in ratios for sign in signs)])

    def range_alone(self, w_OGS: Tensor, root_GS: Tensor | None, factors_C: Tensor) -> Found:
        """The scale, and zero if asymmetric, that the range of each group asks for."""
        scale_OGC, zero_OGC = self._trials(_counted(w_OGS, root_GS), factors_C[:1])
        return _nearest_storable(scale_OGC[..., 0]), None if zero_OGC is None else zero_OGC[..., 0]

    def nearest(self, w_OGS: Tensor, root_GS: Tensor | None, factors_C: Tensor) -> Found:
        """The best scale and zero of each group: of the trials, the first, and then refitted."""
        scale_OGC, zero_OGC = self._trials(_counted(w_OGS, root_GS), factors_C)
        unit_OG1 = _nearest_storable(scale_OGC[..., :1])
        half_OGC = torch.cat([unit_OG1, scale_OGC[..., 1:].to(torch.float16).float()], dim=-1)
        loss_OGC = self._losses(w_OGS, root_GS, half_OGC, zero_OGC, unit_OG1)
        best_OG1 = loss_OGC.argmin(-1, keepdim=True)
        scale_OG1, least_OG1 = half_OGC.gather(-1, best_OG1), loss_OGC.gather(-1, best_OG1)
        zero_OG1 = None if zero_OGC is None else zero_OGC.gather(-1, best_OG1)
        for _ in range(_N_REFITS):
            trial_OG1 = self._refitted(w_OGS, root_GS, scale_OG1, zero_OG1)
            trial_OG1 = trial_OG1.to(torch.float16).float()
            loss_OG1 = self._loss(w_OGS, root_GS, trial_OG1, zero_OG1, unit_OG1)
            wins_OG1 = loss_OG1 < least_OG1
            scale_OG1 = torch.where(wins_OG1, trial_OG1, scale_OG1)
            least_OG1 = torch.where(wins_OG1, loss_OG1, least_OG1)
        return scale_OG1.squeeze(-1), None if zero_OG1 is None else zero_OG1.squeeze(-1)

    def _trials(self, w_OGS: Tensor, factors_C: Tensor) -> Found:
        """Scales and zeros to try: what suits the range, 0 included, and multiples of it."""
        if not self.asymmetric:
            extreme_OG1 = w_OGS.gather(-1, w_OGS.abs().argmax(-1, keepdim=True))
            deeper = self.below > self.above
            unit_OG1 = -extreme_OG1 / self.below if deeper else extreme_OG1.abs() / self.above
            return unit_OG1 * factors_C, None
        low_OG1 = w_OGS.amin(-1, keepdim=True).clamp_max(0)
        high_OG1 = w_OGS.amax(-1, keepdim=True).clamp_min(0)
        unit_OG1 = (high_OG1 - low_OG1) / (self.below + self.above)
        middle_OG1, centre = (high_OG1 + low_OG1) / 2, (self.above - self.below) / 2
        scale_OGC = unit_OG1 * factors_C
        centred_OGC = centre - middle_OG1 / _nearest_storable(scale_OGC)
        first_OG1 = centred_OGC[..., :1].round()
        upper_C = torch.arange(len(factors_C) - 1, device=w_OGS.device) % 2
        zero_OGC = torch.cat([first_OG1, centred_OGC[..., 1:].floor() + upper_C], dim=-1)
        return scale_OGC, zero_OGC.clamp(-self.below, self.above)

    def _steps(
        self, w_OGS: Tensor, scale_OGC: Tensor, zero_OGC: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """w / scale, and the nearest level less the zero, O G C S."""
        exact_OGCS = w_OGS.unsqueeze(-2) * scale_OGC.reciprocal().unsqueeze(-1)
        if zero_OGC is None:
            return exact_OGCS, exact_OGCS.round().clamp(-self.below, self.above)
        zero_OGC1 = zero_OGC.unsqueeze(-1)
        low_OGC1, high_OGC1 = -self.below - zero_OGC1, self.above - zero_OGC1
        return exact_OGCS, exact_OGCS.round().clamp(low_OGC1, high_OGC1)

    def _losses(
        self,
        w_OGS: Tensor,
        root_GS: Tensor | None,
        scale_OGC: Tensor,
        zero_OGC: Tensor | None,
        unit_OG1: Tensor,
    ) -> Tensor:
        """What `_loss` says of all trials; one after the other where each step makes a tensor."""
        if torch.compiler.is_compiling():
            return self._loss(w_OGS, root_GS, scale_OGC, zero_OGC, unit_OG1)
        losses = []
        for c in range(scale_OGC.shape[-1]):
            zero_OG1 = None if zero_OGC is None else zero_OGC[..., c, None]
            losses.append(self._loss(w_OGS, root_GS, scale_OGC[..., c, None], zero_OG1, unit_OG1))
        return torch.cat(losses, dim=-1)

    def _loss(
        self,
        w_OGS: Tensor,
        root_GS: Tensor | None,
        scale_OGC: Tensor,
        zero_OGC: Tensor | None,
        unit_OG1: Tensor,
    ) -> Tensor:
        """What each group loses under each trial: a number that rises with it, O G C.

        Infinite where float16 does not hold the scale.
        """
        exact_OGCS, steps_OGCS = self._steps(w_OGS, scale_OGC, zero_OGC)
        error_OGCS = exact_OGCS - steps_OGCS
        if root_GS is not None:
            error_OGCS = error_OGCS * root_GS.unsqueeze(-2)
        if self.halves == 4:
            loss_OGC = (torch.linalg.vector_norm(error_OGCS, dim=-1) * scale_OGC).abs()
        else:
            loss_OGC = _power(error_OGCS.abs(), self.halves).sum(-1)
            loss_OGC = loss_OGC * _power((scale_OGC / unit_OG1).abs(), self.halves)
        holds_OGC = torch.isfinite(scale_OGC) & (scale_OGC != 0)
        return torch.where(holds_OGC, loss_OGC, torch.inf)

    def _refitted(
        self, w_OGS: Tensor, root_GS: Tensor | None, scale_OG1: Tensor, zero_OG1: Tensor | None
    ) -> Tensor:
        """The scale that suits the levels under these best, or better, O G 1."""
        exact_OG1S, steps_OG1S = self._steps(w_OGS, scale_OG1, zero_OG1)
        exact_OGS, steps_OGS = exact_OG1S.squeeze(-2), steps_OG1S.squeeze(-2)
        heavy_OGS = steps_OGS
        if root_GS is not None:
            heavy_OGS = steps_OGS * _power(root_GS, self.halves)
        if self.halves != 4:
            heavy_OGS = heavy_OGS * _power((exact_OGS - steps_OGS).abs(), self.halves - 4)
        product_OG = (heavy_OGS * w_OGS).sum(-1)
        fitted_OG1 = (product_OG / (heavy_OGS * steps_OGS).sum(-1)).unsqueeze(-1)
        if self.halves != 4:
            fitted_OG1 = torch.lerp(scale_OG1, fitted_OG1, 2 / (self.halves - 2))
        return fitted_OG1


def _compiled(how: _Search, weighted: bool) -> Find | None:
    some_OGS, some_GS = torch.ones(3, 5, 32), torch.ones(5, 32)
    factors_C = how.factors(weighted=weighted)
    with one_thread():  # as chunks of rows are searched
        return _CODE.of(
            (how, weighted),
            how.nearest,
            [some_OGS, some_GS if weighted else None, factors_C],
            [(0, 1, 2), (0, 1), ()],  # all sizes differ, but not the number of trials
        )


def _power(size: Tensor, halves: int) -> Tensor:
    """Numbers >= 0 to the power halves / 2, halves > 0."""
    roots = [size.sqrt()] if halves % 2 else []
    return reduce(mul, [size] * (halves // 2) + roots)


def _counted(w_OGS: Tensor, root_GS: Tensor | None) -> Tensor:
    """The weights, but zeros where the importance is zero: they set no range."""
    return w_OGS if root_GS is None else w_OGS * (root_GS > 0)


def _nearest_storable(scale: Tensor) -> Tensor:
    """The nearest float16 but 0, as float32; all-zero groups get the least positive one."""
    sign = torch.where(scale < 0, -1.0, 1.0)
    return (sign * scale.abs().clamp(_SMALLEST, _LARGEST)).to(torch.float16).float()


def _root(importance_I: Tensor, size: int, norm: float) -> Tensor:
    """Powers 1 / norm, G S, scaled to at most 1 in every group, where only ratios matter."""
    grouped_GS = importance_I.detach().double().reshape(-1, size)
    most_G1 = grouped_GS.amax(-1, keepdim=True)
    share_GS = torch.where(most_G1 > 0, grouped_GS / most_G1, torch.ones_like(grouped_GS))
    return share_GS.pow(1 / norm).float()


def _checked(weight_OI: Tensor, fmt: WeightFormat, importance_I: Tensor | None) -> None:
    if weight_OI.dim() != 2 or not weight_OI.numel():
        raise ValueError(f"a weight of shape {tuple(weight_OI.shape)}, expected O I")
    n_in = weight_OI.shape[1]
    if not any(fmt.n_levels):
        raise ValueError(f"{fmt.name} has no levels, so no scales to search for")
    if n_in % (fmt.group or n_in):
        raise ValueError(
            f"{fmt.name}: {n_in} input features are not a multiple of {fmt.group}; "
            "WeightFormat.fits says what to use instead"
        )
    if not bool(torch.isfinite(torch.stack(weight_OI.aminmax())).all()):  # makes no copy
        raise ValueError("a weight holds NaN or infinity")
    if importance_I is None:
        return
    if importance_I.shape != (n_in,):
        raise ValueError(f"importances of shape {tuple(importance_I.shape)} for {n_in} inputs")
    if not bool((torch.isfinite(importance_I) & (importance_I >= 0)).all()):
        raise ValueError("an importance is negative, NaN or infinite")
