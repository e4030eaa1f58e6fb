"""Round to nearest, with a search for the scales that lose least.

For each group of a row, scales s = sigma * |a| / n * r are tried, a the entry of largest magnitude,
n the depth of the grid's negative side, sigma in {+, -}, r in linspace(0.5, 1.12, 63); the one with
the least sum (w - s * q)^2 is kept, then refined once in closed form, s = sum(q w) / sum(q^2), if
that helps. A negative scale puts the largest entry on the deeper, negative side of the grid.
Scales are rounded to float16 before codes are computed, so what is searched is what is stored.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from hbxt_compress.formats import WeightFormat
from hbxt_compress.quantized import QuantizedWeight
from hbxt_compress.stats import LayerStats, Need
from hbxt_compress.strict import Settings

__all__ = ["Rtn", "relative_error", "search_scales"]

_N_RATIOS = 63
_ROWS_AT_ONCE = 1 << 20  # weights a chunk of rows may hold, to bound memory
_SMALLEST = 2.0**-24  # least positive float16


class Rtn(Settings):
    """Round to nearest."""

    VERSION: ClassVar[int] = 1
    NEEDS: ClassVar[frozenset[Need]] = frozenset({"moments"})

    search: Literal["none", "mse"] = "mse"
    """How scales are chosen: from the largest entry alone, or by least squared error."""

    def round(self, weight_OI: Tensor, stats: LayerStats, fmt: WeightFormat) -> QuantizedWeight:
        """The weight in `fmt`; the error is measured on the calibration inputs' mean squares."""
        scales = search_scales(weight_OI, fmt.group, fmt.n_levels, thorough=self.search == "mse")
        payload = fmt.encode(weight_OI, scales)
        error = relative_error(weight_OI, fmt.decode(payload), stats.mean_square_I)
        return QuantizedWeight(
            format=fmt.name, payload=payload, shape=tuple(weight_OI.shape), error=error
        )


def search_scales(
    weight_OI: Tensor, group: int | None, n_levels: tuple[int, int], *, thorough: bool
) -> Tensor:
    """Scales float16 O G of least squared error; group None means one per row (O 1).

    n_levels: how many codes lie below and above zero, for example (8, 7) for int4.
    """
    n_in = weight_OI.shape[1]
    size = group or n_in
    chunks = []
    for rows in weight_OI.float().split(max(1, _ROWS_AT_ONCE // n_in)):
        chunks.append(_search(rows.reshape(rows.shape[0], -1, size), n_levels, thorough))
    return torch.cat(chunks)


def _search(w_OGI: Tensor, n_levels: tuple[int, int], thorough: bool) -> Tensor:
    below, above = n_levels
    extreme = w_OGI.gather(-1, w_OGI.abs().argmax(-1, keepdim=True)).squeeze(-1)
    unit = -extreme / below if below > above else extreme.abs() / above
    best = _storable(unit)
    if not thorough:
        return best
    least = _loss(w_OGI, best, n_levels)
    signs = (1.0, -1.0) if below > above else (1.0,)
    for ratio in torch.linspace(0.5, 1.12, _N_RATIOS).tolist():
        for sign in signs:
            best, least = _better(w_OGI, best, least, _storable(unit * ratio * sign), n_levels)
    q = _codes(w_OGI, best, n_levels)
    refit = (q * w_OGI).sum(-1) / q.square().sum(-1).clamp_min(1e-30)
    return _better(w_OGI, best, least, _storable(refit), n_levels)[0]


def _better(
    w: Tensor, best: Tensor, least: Tensor, trial: Tensor, n_levels: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    loss = _loss(w, trial, n_levels)
    wins = loss < least
    return torch.where(wins, trial, best), torch.where(wins, loss, least)


def _storable(scale: Tensor) -> Tensor:
    """The scale as float16 holds it, never zero (an all-zero group gets the least positive one)."""
    half = scale.to(torch.float16)
    return torch.where(half == 0, torch.full_like(half, _SMALLEST), half)


def _codes(w_OGI: Tensor, scale_OG: Tensor, n_levels: tuple[int, int]) -> Tensor:
    return (w_OGI / scale_OG.float().unsqueeze(-1)).round().clamp(-n_levels[0], n_levels[1])


def _loss(w_OGI: Tensor, scale_OG: Tensor, n_levels: tuple[int, int]) -> Tensor:
    q = _codes(w_OGI, scale_OG, n_levels)
    return (w_OGI - q * scale_OG.float().unsqueeze(-1)).square().sum(-1)


def relative_error(weight_OI: Tensor, decoded_OI: Tensor, mean_square_I: Tensor) -> float:
    """sum (w - q)^2 E[x^2] / sum w^2 E[x^2]: relative output error for uncorrelated inputs."""
    lost = (weight_OI - decoded_OI).double().square().sum(0) @ mean_square_I.double()
    kept = weight_OI.double().square().sum(0) @ mean_square_I.double()
    return float(lost / kept) if kept > 0 else 0.0
