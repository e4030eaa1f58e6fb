"""Levels and scales improved in turn until the quadratic loss of each row stops falling.

A row's loss is e H e^T, e = target - rounded. `descend` moves one level at a time to the exact
minimum over that level, all rows at once; `refit_scales` solves for all scales of a row with its
levels fixed. Neither ever raises a row's loss.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hbxt_compress.algorithms.feedback import Spans, in_halves
from hbxt_compress.algorithms.grid import Grid
from hbxt_compress.algorithms.runs import move

__all__ = ["descend", "refit_scales", "slopes"]

_ROWS_AT_ONCE = 256  # in a refit, whose copies then stay near the core
_RIDGE = 1e-9  # of the mean curvature of a row's scales; keeps unused groups solvable
_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # magnitudes that float16 holds


def descend(
    target_OI: Tensor, levels_OI: Tensor, grid: Grid, hessian_II: Tensor, order_I: Tensor
) -> tuple[Tensor, Tensor]:
    """Levels O I, each once put where it costs least, and what each row gains, float64 O.

    Levels are in the precision of H.
    """
    spans = Spans.of(grid, hessian_II.dtype, order_I)
    units_IO = spans.units(levels_OI, order_I)
    gradient_IO = slopes(target_OI, levels_OI, grid, hessian_II).T.contiguous()[order_I]
    gain_O = gradient_IO.new_zeros(len(levels_OI), dtype=torch.float64)
    for run, later in in_halves(len(order_I)):
        own_I = order_I[run]
        if later is not None:  # gradient_IO holds the moves of what was put
            part_II = hessian_II[order_I[later, None], own_I]
            gradient_IO[later].addmm_(part_II, gradient_IO[run], alpha=-1)
            continue
        own_RR, own = hessian_II[own_I[:, None], own_I], spans.of_run(run)
        moved = move(gradient_IO[run], units_IO[run], own_RR, own, len(order_I))
        units_IO[run], gradient_IO[run] = moved.units_RO, moved.moves_RO
        gain_O += moved.gain_O
    return spans.natural_order(units_IO, order_I), gain_O


def slopes(target_OI: Tensor, levels_OI: Tensor, grid: Grid, hessian_II: Tensor) -> Tensor:
    """e H, O I."""
    error_OI = target_OI.to(hessian_II) - grid.value(levels_OI).to(hessian_II)
    return error_OI @ hessian_II


def refit_scales(
    target_OI: Tensor,
    levels_OI: Tensor,
    grid: Grid,
    hessian_II: Tensor,
    slope_OI: Tensor | None = None,
) -> tuple[Grid, Tensor]:
    """The grid with the scales that suit these levels best, and what each row gains, float64 O.

    slope_OI: e H, if it is known.

    Each row solves A s = r, A_gh = l_g H_gh l_h^T and r_g = l_g (H w^T)_g over its groups, l being
    levels less zeros; the scales are then rounded to float16 and kept only where the loss falls.
    """
    unit_OI = levels_OI.to(hessian_II)
    if grid.zeros_OG is not None:
        unit_OI = unit_OI - grid.zeros_OG.to(hessian_II).repeat_interleave(grid.group, dim=1)
    if slope_OI is None:
        slope_OI = slopes(target_OI, levels_OI, grid, hessian_II)
    parts = [one.split(_ROWS_AT_ONCE) for one in (unit_OI, slope_OI, grid.scales_OG)]
    fitted = [
        _fitted(units, slope, scales, hessian_II)
        for units, slope, scales in zip(*parts, strict=True)
    ]
    scales_OG = torch.cat([scales for scales, _ in fitted])
    return replace(grid, scales_OG=scales_OG), torch.cat([gain_O for _, gain_O in fitted])


def _fitted(
    unit_OI: Tensor, slope_OI: Tensor, scales_OG: Tensor, hessian_II: Tensor
) -> tuple[Tensor, Tensor]:
    """The scales that suit some rows best, and what each row gains; 0 where none are better."""
    n_out, n_groups = scales_OG.shape
    size = unit_OI.shape[1] // n_groups
    old_OG = scales_OG.double()
    slope_OG = (slope_OI * unit_OI).reshape(n_out, n_groups, size).sum(2).double()
    curve_OGG = slope_OG.new_empty(n_out, n_groups, n_groups)
    for g in range(n_groups):
        one, later = slice(g * size, (g + 1) * size), slice(g * size, None)
        product_OI = (unit_OI[:, one] @ hessian_II[one, later]).mul_(unit_OI[:, later])
        curve_OGG[:, g, g:] = product_OI.reshape(n_out, n_groups - g, size).sum(2)
        curve_OGG[:, g + 1 :, g] = curve_OGG[:, g, g + 1 :]
    mean_O = curve_OGG.diagonal(dim1=1, dim2=2).mean(1)
    ridge_O = (_RIDGE * mean_O).clamp_min(torch.finfo(torch.float64).tiny)
    eye_GG = torch.eye(n_groups).to(curve_OGG)
    solved_OG, failed_O = torch.linalg.solve_ex(
        curve_OGG + ridge_O[:, None, None] * eye_GG, slope_OG
    )
    new_OG = (old_OG + solved_OG).to(torch.float16).double()
    storable_OG = (new_OG.abs() >= _SMALLEST) & (new_OG.abs() <= _LARGEST)
    change_OG = torch.where(storable_OG, new_OG - old_OG, 0.0)
    bent_O = torch.einsum("og,ogh,oh->o", change_OG, curve_OGG, change_OG)
    gain_O = 2 * (change_OG * slope_OG).sum(1) - bent_O
    taken_O = (gain_O > 0) & (failed_O == 0)
    scales_OG = torch.where(taken_O[:, None], old_OG + change_OG, old_OG)
    return scales_OG.float(), torch.where(taken_O, gain_O, 0.0)
