"""Rounding one column at a time, each column made to repair the errors of those before it.

With H the inputs' second moments, a row's loss is e H e^T, e = target - rounded. With H = B D B^T,
B unit upper triangular and D diagonal, that is sum_j d_j (e B)_j^2. So column j is rounded not from
its target but from target_j + sum_{i<j} e_i B_ij, which leaves (e B)_j as its rounding error.
These are the codes of GPTQ (arXiv 2210.17323) in the form of LDLQ (QuIP, arXiv 2307.13304): B and D
come from one Cholesky of H read backwards, so H is never inverted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hbxt_compress.algorithms.grid import Grid

__all__ = ["Factor", "Fed", "by_group", "factorise", "feed_back", "in_halves", "natural_order"]

_RUN = 32  # columns whose errors go to those next to them one by one
_DRIFT = 2.0  # steps between a column's value and its level that count as drift


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """H = B D B^T in the order in which columns are rounded, in the precision of H.

    order_I: input columns, first to last. unit_II: B, unit upper triangular, rows and columns in
    that order. pivots_I: D, but for the columns in their natural order; each is the variance of a
    column that the columns after it (which can still answer for its error) cannot explain.
    """

    order_I: Tensor
    unit_II: Tensor
    pivots_I: Tensor

    def solve(self, rows_OI: Tensor) -> Tensor:
        """rows H^-1, O I in the precision of H."""
        rows_IO = rows_OI.to(self.unit_II).T[self.order_I]
        rows_IO = torch.linalg.solve_triangular(
            self.unit_II, rows_IO, upper=True, unitriangular=True
        )
        rows_IO = rows_IO / self.pivots_I[self.order_I, None]
        rows_IO = torch.linalg.solve_triangular(
            self.unit_II.T, rows_IO, upper=False, unitriangular=True
        )
        solved_OI = torch.empty_like(rows_OI, dtype=self.unit_II.dtype)
        solved_OI[:, self.order_I] = rows_IO.T
        return solved_OI


def factorise(hessian_II: Tensor, order_I: Tensor) -> Factor | None:
    """The factor of a symmetric matrix, or None if its precision finds it not positive definite."""
    backwards_I = order_I.flip(0)
    upper_II = hessian_II[backwards_I[:, None], backwards_I].mT
    failed = torch.empty((), dtype=torch.int32, device=upper_II.device)
    torch.linalg.cholesky_ex(upper_II, out=(upper_II, failed))  # in place: it may take 0.8 GB
    if int(failed) or not bool(torch.isfinite(torch.stack(upper_II.aminmax())).all()):
        return None
    _reverse(upper_II.mT.view(-1))  # now H = R R^T, R upper triangular
    root_I = upper_II.diagonal().clone()
    pivots_I = torch.empty_like(root_I)
    pivots_I[order_I] = root_I.square()
    return Factor(order_I=order_I, unit_II=upper_II.div_(root_I), pivots_I=pivots_I)


def _reverse(numbers: Tensor) -> None:
    """Puts the last first, in place."""
    step = 1 << 15  # more are shared between cores, which takes flip ten times as long
    for start in range(0, len(numbers) // 2, step):
        stop = min(start + step, len(numbers) // 2)
        first, last = numbers[start:stop], numbers[len(numbers) - stop : len(numbers) - start]
        kept = first.flip(0)
        first.copy_(last.flip(0))
        last.copy_(kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fed:
    """What feedback found. levels_OI: whole. loss_O: e H e^T of each row. In the precision of H.

    n_drifted: levels more than two steps from the value that they stand for, at an end of the grid.
    """

    levels_OI: Tensor
    loss_O: Tensor
    n_drifted: int


def feed_back(target_OI: Tensor, factor: Factor, grid: Grid) -> Fed:
    """Levels of the target, rounded column by column in the factor's order.

    Drift off the grid is counted, not stopped: what is passed on suits the remaining columns best
    under every error so far, and pulling a column back to the grid before passing on costs dB.
    """
    order_I, unit_II = factor.order_I, factor.unit_II
    scale_GO, zero_GO = by_group(grid, unit_II.dtype)
    low_GO, high_GO = -grid.below - zero_GO, grid.above - zero_GO
    group_I = order_I // grid.group
    goal_IO = target_OI.to(unit_II).T.contiguous()[order_I]
    work_IO, units_IO = goal_IO.clone(), torch.empty_like(goal_IO)
    loss_O = goal_IO.new_zeros(len(target_OI))
    n_drifted = 0
    for run, later in in_halves(len(order_I)):
        if later is not None:  # goal_IO holds the errors of what is rounded
            work_IO[later].addmm_(unit_II[run, later].T, goal_IO[run])
            continue
        for j, g in zip(range(run.start, run.stop), group_I[run].tolist(), strict=True):
            steps_O = work_IO[j].div_(scale_GO[g])
            units_O = torch.clamp(steps_O.round(), low_GO[g], high_GO[g], out=units_IO[j])
            error_O = goal_IO[j].sub_(units_O * scale_GO[g])
            work_IO[j + 1 : run.stop].addr_(unit_II[j, j + 1 : run.stop], error_O)
        away_RO = work_IO[run] - units_IO[run]
        n_drifted += int((away_RO.abs() > _DRIFT).sum())
        away_RO *= scale_GO[group_I[run]]
        loss_O += factor.pivots_I[order_I[run]] @ away_RO.square_()
    levels_OI = natural_order(units_IO, order_I, grid, zero_GO)
    return Fed(levels_OI=levels_OI, loss_O=loss_O, n_drifted=n_drifted)


def in_halves(n: int) -> Iterator[tuple[slice, slice | None]]:
    """In which order to take columns 0..n-1, each of which changes all after it.

    (run, None): take these, one by one. (done, later): what was taken in `done` now changes
    `later`. So nearly all work is products of matrices as large as can be.
    """

    def span(start: int, stop: int) -> Iterator[tuple[slice, slice | None]]:
        if stop - start <= _RUN:
            yield slice(start, stop), None
            return
        middle = start + -(-(stop - start) // (2 * _RUN)) * _RUN
        yield from span(start, middle)
        yield slice(start, middle), slice(middle, stop)
        yield from span(middle, stop)

    return span(0, n)


def by_group(grid: Grid, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero of each group, G O."""
    scale_GO = grid.scales_OG.to(precision).T.contiguous()
    if grid.zeros_OG is None:
        return scale_GO, torch.zeros_like(scale_GO)
    return scale_GO, grid.zeros_OG.to(precision).T.contiguous()


def natural_order(units_IO: Tensor, order_I: Tensor, grid: Grid, zero_GO: Tensor) -> Tensor:
    """Levels O I of levels less zeros whose columns are in another order."""
    place_I = torch.empty_like(order_I)
    place_I[order_I] = torch.arange(len(order_I), device=order_I.device)
    levels_IO = units_IO[place_I]
    if grid.zeros_OG is not None:
        levels_IO += zero_GO.repeat_interleave(grid.group, dim=0)
    return levels_IO.T.contiguous()
