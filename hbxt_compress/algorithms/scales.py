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
cut off errs always the same way. The refit is then a step of Newton's method.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hbxt_compress.algorithms.grid import Grid
from hbxt_compress.formats import WeightFormat

__all__ = ["search_scales"]

_RATIOS = tuple(i / 100 for i in (*range(24, 60, 6), *range(60, 112, 3), *range(112, 141, 6)))
_N_REFITS = 2
_WEIGHTS_AT_ONCE = 1 << 18  # of a chunk of rows: its few copies stay near the core
_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # magnitudes that float16 holds


def search_scales(
    weight_OI: Tensor,
    fmt: WeightFormat,
    importance_I: Tensor | None = None,
    *,
    norm: float = 2.0,
    thorough: bool = True,
) -> Grid:
    """The grid of least sum_j importance_j |w_j - q_j|^norm per group; importance None: ones.

    A group whose importances are all zero is searched as if they were ones. Without `thorough` the
    range of each group alone decides: its largest entry is the deepest level (symmetric), or its
    least and largest entries are the outer levels (asymmetric).

    Raises:
        ValueError: the format has no levels, its group does not divide the inputs, or a weight or
            an importance is not finite (or, an importance, negative).
    """
    _checked(weight_OI, fmt, importance_I)
    n_in = weight_OI.shape[1]
    size = fmt.group or n_in
    root_GS = None if importance_I is None else _root(importance_I, size, norm).to(weight_OI.device)
    rows = max(1, _WEIGHTS_AT_ONCE // n_in)
    found = []
    for chunk_OI in weight_OI.detach().float().split(rows):
        groups = _Groups(
            w_OGS=chunk_OI.reshape(len(chunk_OI), -1, size),
            root_GS=root_GS,
            levels=fmt.n_levels,
            norm=norm,
        )
        found.append(_search(groups, asymmetric=fmt.asymmetric, thorough=thorough))
    zeros = [pair.zero_OG for pair in found if pair.zero_OG is not None]
    return Grid(
        scales_OG=torch.cat([pair.scale_OG for pair in found]),
        zeros_OG=torch.cat(zeros) if zeros else None,
        group=size,
        below=fmt.n_levels[0],
        above=fmt.n_levels[1],
    )


@dataclass(frozen=True, slots=True)
class _Pair:
    """A scale and a zero for every group, O G; zero None: 0."""

    scale_OG: Tensor
    zero_OG: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Groups:
    """Weights of some rows by group, and importances to the power 1 / norm, None for ones."""

    w_OGS: Tensor
    root_GS: Tensor | None
    levels: tuple[int, int]
    norm: float

    def steps(self, pair: _Pair) -> tuple[Tensor, Tensor]:
        """w / scale, and the nearest level less the zero, O G S."""
        exact_OGS = self.w_OGS / pair.scale_OG.unsqueeze(-1)
        low, high = -self.levels[0], self.levels[1]
        if pair.zero_OG is None:
            return exact_OGS, exact_OGS.round().clamp_(low, high)
        zero_OG1 = pair.zero_OG.unsqueeze(-1)
        return exact_OGS, exact_OGS.round().clamp_(low - zero_OG1, high - zero_OG1)

    def loss(self, pair: _Pair) -> Tensor:
        """What each group loses, the norm-th root of it, O G."""
        exact_OGS, steps_OGS = self.steps(pair)
        exact_OGS -= steps_OGS
        if self.root_GS is not None:
            exact_OGS *= self.root_GS
        norm_OG = torch.linalg.vector_norm(exact_OGS, ord=self.norm, dim=-1)
        return (norm_OG * pair.scale_OG).abs_()

    def refitted(self, pair: _Pair) -> _Pair:
        """The scale that suits the levels under this pair best, or better, in float32."""
        exact_OGS, steps_OGS = self.steps(pair)
        heavy_OGS = steps_OGS
        if self.root_GS is not None:
            heavy_OGS = steps_OGS * self.root_GS.pow(self.norm)
        if self.norm != 2:
            heavy_OGS = heavy_OGS * (exact_OGS - steps_OGS).abs_().pow_(self.norm - 2)
        product_OG = (heavy_OGS * self.w_OGS).sum(-1)
        scale_OG = product_OG / (heavy_OGS * steps_OGS).sum(-1)
        if self.norm != 2:
            scale_OG = torch.lerp(pair.scale_OG, scale_OG, 1 / (self.norm - 1))
        return _Pair(scale_OG, pair.zero_OG)

    @property
    def counted_OGS(self) -> Tensor:
        """The weights, but zeros where the importance is zero: they set no range."""
        return self.w_OGS if self.root_GS is None else self.w_OGS * (self.root_GS > 0)


def _search(groups: _Groups, *, asymmetric: bool, thorough: bool) -> _Pair:
    candidates = _asymmetric(groups, thorough) if asymmetric else _symmetric(groups, thorough)
    first = next(candidates)
    best = _Pair(_nearest_storable(first.scale_OG), first.zero_OG)
    if not thorough:
        return best
    least_OG = groups.loss(best)
    for trial in candidates:
        best, least_OG = _better(groups, best, least_OG, trial)
    for _ in range(_N_REFITS):
        best, least_OG = _better(groups, best, least_OG, groups.refitted(best))
    return best


def _symmetric(groups: _Groups, thorough: bool) -> Iterator[_Pair]:
    """The scale under which the largest entry is the deepest level, then the others."""
    below, above = groups.levels
    w_OGS = groups.counted_OGS
    extreme_OG = w_OGS.gather(-1, w_OGS.abs().argmax(-1, keepdim=True)).squeeze(-1)
    unit_OG = -extreme_OG / below if below > above else extreme_OG.abs() / above
    yield _Pair(unit_OG, None)
    for ratio in _RATIOS:
        yield _Pair(unit_OG * ratio, None)
        if below != above:
            yield _Pair(unit_OG * -ratio, None)


def _asymmetric(groups: _Groups, thorough: bool) -> Iterator[_Pair]:
    """The scale and zero under which the range, 0 included, just fits, then the others."""
    below, above = groups.levels
    w_OGS = groups.counted_OGS
    low_OG, high_OG = w_OGS.amin(-1).clamp_max(0), w_OGS.amax(-1).clamp_min(0)
    unit_OG, middle_OG = (high_OG - low_OG) / (below + above), (high_OG + low_OG) / 2
    centre = (above - below) / 2

    def centred_OG(scale_OG: Tensor) -> Tensor:
        return centre - middle_OG / _nearest_storable(scale_OG)

    yield _Pair(unit_OG, centred_OG(unit_OG).round().clamp_(-below, above))
    for ratio in _RATIOS:
        scale_OG = unit_OG * ratio
        floor_OG = centred_OG(scale_OG).floor()
        for zero_OG in (floor_OG, floor_OG + 1):
            yield _Pair(scale_OG, zero_OG.clamp(-below, above))


def _better(groups: _Groups, best: _Pair, least_OG: Tensor, trial: _Pair) -> tuple[_Pair, Tensor]:
    """Per group the pair that loses less; a trial whose scale float16 does not hold is refused."""
    half_OG = trial.scale_OG.to(torch.float16).float()
    holds_OG = torch.isfinite(half_OG) & (half_OG != 0)
    trial = _Pair(torch.where(holds_OG, half_OG, best.scale_OG), trial.zero_OG)
    loss_OG = groups.loss(trial)
    wins_OG = holds_OG & (loss_OG < least_OG)
    zero_OG = trial.zero_OG
    if zero_OG is not None and best.zero_OG is not None:
        zero_OG = torch.where(wins_OG, zero_OG, best.zero_OG)
    best = _Pair(torch.where(wins_OG, trial.scale_OG, best.scale_OG), zero_OG)
    return best, torch.where(wins_OG, loss_OG, least_OG)


def _nearest_storable(scale_OG: Tensor) -> Tensor:
    """The nearest float16 but 0, as float32; all-zero groups get the least positive one."""
    sign_OG = torch.where(scale_OG < 0, -1.0, 1.0)
    size_OG = scale_OG.abs().clamp(_SMALLEST, _LARGEST)
    return (sign_OG * size_OG).to(torch.float16).float()


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
    if not bool(torch.isfinite(weight_OI).all()):
        raise ValueError("a weight holds NaN or infinity")
    if importance_I is None:
        return
    if importance_I.shape != (n_in,):
        raise ValueError(f"importances of shape {tuple(importance_I.shape)} for {n_in} inputs")
    if not bool((torch.isfinite(importance_I) & (importance_I >= 0)).all()):
        raise ValueError("an importance is negative, NaN or infinite")
