"""Levels and scales improved in turn until the quadratic loss of each row stops falling.

A row's loss is e H e^T, e = target - rounded. `descend` moves one level at a time to the exact
minimum over that level, all rows at once; `refit_scales` solves for all scales of a row with its
levels fixed. Neither ever raises a row's loss.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hbxt_compress.algorithms.feedback import runs, steps
from hbxt_compress.algorithms.grid import Grid

__all__ = ["descend", "quadratic", "refit_scales"]

_BLOCK = 128  # columns between updates of all other columns' gradients
_RIDGE = 1e-9  # of the mean curvature of a row's scales; keeps unused groups solvable
_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # magnitudes that float16 holds


def quadratic(error_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """e H e^T of each row, O in the precision of H."""
    error_OI = error_OI.to(hessian_II)
    return (error_OI @ hessian_II * error_OI).sum(1)


def descend(
    target_OI: Tensor, levels_OI: Tensor, grid: Grid, hessian_II: Tensor, order_I: Tensor
) -> tuple[Tensor, int]:
    """Levels O I, in the precision of H, each once put where it costs least; how many changed."""
    scale_IO, zero_IO = steps(grid, order_I, hessian_II.dtype)
    low_IO, high_IO = -grid.below - zero_IO, grid.above - zero_IO
    units_IO = levels_OI.to(hessian_II).T[order_I] - zero_IO
    hessian_II = hessian_II[order_I[:, None], order_I]
    gradient_IO = hessian_II @ (target_OI.to(hessian_II).T[order_I] - units_IO * scale_IO)
    curve_I = hessian_II.diagonal()
    n_changed = 0
    for start in range(0, len(order_I), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(order_I)))
        local_BO = gradient_IO[block].clone()
        move_BO = torch.zeros_like(local_BO)
        for run in runs(block):
            first, behind = run.start - start, run.stop - start
            for i, j in enumerate(range(run.start, run.stop), start=first):
                best_O = units_IO[j] + local_BO[i].div_(curve_I[j]).div_(scale_IO[j])
                step_O = best_O.round_().clamp_(low_IO[j], high_IO[j]).sub_(units_IO[j])
                changed = int(step_O.count_nonzero())
                if not changed:
                    continue
                n_changed += changed
                units_IO[j] += step_O
                move_O = torch.mul(step_O, scale_IO[j], out=move_BO[i])
                local_BO[i + 1 : behind].addr_(hessian_II[j + 1 : run.stop, j], move_O, alpha=-1)
            rest_II = hessian_II[run.stop : block.stop, run]
            local_BO[behind:].addmm_(rest_II, move_BO[first:behind], alpha=-1)
        gradient_IO[block.stop :].addmm_(hessian_II[block.stop :, block], move_BO, alpha=-1)
    moved_OI = torch.empty_like(target_OI, dtype=hessian_II.dtype)
    moved_OI[:, order_I] = (units_IO + zero_IO).T
    return moved_OI, n_changed


def refit_scales(
    target_OI: Tensor, levels_OI: Tensor, grid: Grid, hessian_II: Tensor
) -> tuple[Grid, int]:
    """The grid with the scales that suit these levels best, and how many rows took new ones.

    Each row solves A s = r, A_gh = l_g H_gh l_h^T and r_g = l_g (H w^T)_g over its groups, l being
    levels less zeros; the scales are then rounded to float16 and kept only where the loss falls.
    """
    n_out = len(levels_OI)
    size, n_groups = grid.group, grid.scales_OG.shape[1]
    unit_OI = levels_OI.to(hessian_II)
    if grid.zeros_OG is not None:
        unit_OI = unit_OI - grid.zeros_OG.to(hessian_II).repeat_interleave(size, dim=1)
    old_OG = grid.scales_OG.double()
    step_OI = old_OG.to(hessian_II).repeat_interleave(size, dim=1)
    error_OI = target_OI.to(hessian_II) - unit_OI * step_OI
    slope_OG = (error_OI @ hessian_II * unit_OI).reshape(n_out, n_groups, size).sum(2).double()
    curve_OGG = slope_OG.new_empty(n_out, n_groups, n_groups)
    for g in range(n_groups):
        one, later = slice(g * size, (g + 1) * size), slice(g * size, None)
        product_OI = unit_OI[:, one] @ hessian_II[one, later] * unit_OI[:, later]
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
    return replace(grid, scales_OG=scales_OG.float()), int(taken_O.sum())
