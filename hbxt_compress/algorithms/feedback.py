"""Rounding one column at a time, each column made to repair the errors of those before it.

With H the inputs' second moments, a row's loss is e H e^T, e = target - rounded. With H = B D B^T,
B unit upper triangular and D diagonal, that is sum_j d_j (e B)_j^2. So column j is rounded not from
its target but from target_j + sum_{i<j} e_i B_ij, which leaves (e B)_j as its rounding error.
These are the codes of GPTQ (arXiv 2210.17323) in the form of LDLQ (QuIP, arXiv 2307.13304): B and D
come from one Cholesky of H read backwards, so H is never inverted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hbxt_compress.algorithms.grid import Grid

__all__ = ["Factor", "Fed", "factorise", "feed_back", "runs", "steps"]

_BLOCK = 128  # columns between updates of everything to their right
_RUN = 32  # columns of a block between updates of the rest of the block
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
    lower_II, failed = torch.linalg.cholesky_ex(hessian_II[backwards_I[:, None], backwards_I])
    if int(failed) or not bool(torch.isfinite(torch.stack(lower_II.aminmax())).all()):
        return None
    upper_II = lower_II.flip(0, 1)  # H = R R^T, R upper triangular
    del lower_II  # of many inputs it takes 0.8 GB
    root_I = upper_II.diagonal().clone()
    pivots_I = torch.empty_like(root_I)
    pivots_I[order_I] = root_I.square()
    return Factor(order_I=order_I, unit_II=upper_II.div_(root_I), pivots_I=pivots_I)


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
    scale_IO, zero_IO = steps(grid, order_I, unit_II.dtype)
    low_IO, high_IO = -grid.below - zero_IO, grid.above - zero_IO
    goal_IO = target_OI.to(unit_II).T[order_I]
    work_IO, units_IO = goal_IO.clone(), torch.empty_like(goal_IO)
    loss_O = goal_IO.new_zeros(len(target_OI))
    n_drifted = 0
    for start in range(0, len(order_I), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(order_I)))
        error_BO = torch.empty_like(work_IO[block])
        for run in runs(block):
            for j in range(run.start, run.stop):
                steps_O = work_IO[j].div_(scale_IO[j])
                units_O = torch.clamp(steps_O.round(), low_IO[j], high_IO[j], out=units_IO[j])
                own_O = error_BO[j - start]
                error_O = torch.sub(goal_IO[j], units_O * scale_IO[j], out=own_O)
                work_IO[j + 1 : run.stop].addr_(unit_II[j, j + 1 : run.stop], error_O)
            error_RO = error_BO[run.start - start : run.stop - start]
            work_IO[run.stop : block.stop].addmm_(unit_II[run, run.stop : block.stop].T, error_RO)
        away_BO = work_IO[block] - units_IO[block]
        n_drifted += int((away_BO.abs() > _DRIFT).sum())
        loss_O += factor.pivots_I[order_I[block]] @ (away_BO * scale_IO[block]).square()
        work_IO[block.stop :].addmm_(unit_II[block, block.stop :].T, error_BO)
    levels_OI = torch.empty_like(target_OI, dtype=unit_II.dtype)
    levels_OI[:, order_I] = (units_IO + zero_IO).T
    return Fed(levels_OI=levels_OI, loss_O=loss_O, n_drifted=n_drifted)


def runs(block: slice) -> list[slice]:
    """A block of columns in runs: few enough that what one column changes stays near the core."""
    starts = range(block.start, block.stop, _RUN)
    return [slice(start, min(start + _RUN, block.stop)) for start in starts]


def steps(grid: Grid, order_I: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero of each input column in an order, I O."""
    scale_OI, zero_OI = grid.columns(order_I)
    scale_IO = scale_OI.to(precision).T.contiguous()
    if zero_OI is None:
        return scale_IO, torch.zeros_like(scale_IO)
    zero_IO = zero_OI.to(precision).T.contiguous()
    return scale_IO, zero_IO
