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
from hbxt_compress.algorithms.runs import RUN, feed
from hbxt_compress.stats import panels

__all__ = ["Factor", "Fed", "Spans", "factorise", "feed_back", "in_halves"]

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

    def slopes(self, away_IO: Tensor) -> Tensor:
        """e H, O I, of an e B as feedback leaves it: half the work of multiplying e with H."""
        scaled_IO = away_IO * self.pivots_I[self.order_I, None]
        slope_IO = torch.empty_like(scaled_IO)
        for some, _ in panels(len(scaled_IO)):
            later = slice(some.start, None)
            torch.mm(self.unit_II[some, later], scaled_IO[later], out=slope_IO[some])
        return _placed(slope_IO, self.order_I).T.contiguous()


def factorise(hessian_II: Tensor, order_I: Tensor) -> Factor | None:
    """The factor of a symmetric matrix, or None if its precision finds it not positive definite."""
    backwards_I = order_I.flip(0)
    upper_II = hessian_II[backwards_I[:, None], backwards_I].mT
    failed = torch.empty((), dtype=torch.int32, device=upper_II.device)
    torch.linalg.cholesky_ex(upper_II, out=(upper_II, failed))  # in place: it may take 0.8 GB
    whole = upper_II.mT  # lies in memory as it is looked at: otherwise aminmax copies it
    if int(failed) or not bool(torch.isfinite(torch.stack(whole.aminmax())).all()):
        return None
    _reverse(whole.view(-1))  # now H = R R^T, R upper triangular
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
    """What feedback found, in the precision of H. levels_OI: whole. loss_O: e H e^T of each row.

    away_IO: e B, columns in the factor's order; loss_O is its square, weighted by the pivots.
    n_drifted: levels more than two steps from the value that they stand for, at an end of the grid.
    """

    levels_OI: Tensor
    loss_O: Tensor
    away_IO: Tensor
    n_drifted: int


def feed_back(target_OI: Tensor, factor: Factor, grid: Grid) -> Fed:
    """Levels of the target, rounded column by column in the factor's order.

    Drift off the grid is counted, not stopped: what is passed on suits the remaining columns best
    under every error so far, and pulling a column back to the grid before passing on costs dB.
    """
    order_I, unit_II = factor.order_I, factor.unit_II
    spans = Spans.of(grid, unit_II.dtype, order_I)
    goal_IO = target_OI.to(unit_II).T.contiguous()[order_I]
    work_IO, units_IO = goal_IO.clone(), torch.empty_like(goal_IO)
    loss_O = goal_IO.new_zeros(len(target_OI))
    n_drifted = 0
    for run, later in in_halves(len(order_I)):
        if later is not None:  # goal_IO holds the errors of what is rounded
            work_IO[later].addmm_(unit_II[run, later].T, goal_IO[run])
            continue
        own = spans.of_run(run)
        fed = feed(work_IO[run], goal_IO[run], unit_II[run, run], own, len(order_I))
        units_IO[run], goal_IO[run], work_IO[run] = fed.units_RO, fed.errors_RO, fed.away_RO
        n_drifted += int((fed.away_RO.abs() > _DRIFT * own[0].abs()).sum())
        loss_O += factor.pivots_I[order_I[run]] @ fed.away_RO.square()
    levels_OI = spans.natural_order(units_IO, order_I)
    return Fed(levels_OI=levels_OI, loss_O=loss_O, away_IO=work_IO, n_drifted=n_drifted)


def in_halves(n: int) -> Iterator[tuple[slice, slice | None]]:
    """In which order to take columns 0..n-1, each of which changes all after it.

    (run, None): take these, one by one. (done, later): what was taken in `done` now changes
    `later`. So nearly all work is products of matrices as large as can be.
    """

    def span(start: int, stop: int) -> Iterator[tuple[slice, slice | None]]:
        if stop - start <= RUN:
            yield slice(start, stop), None
            return
        middle = start + -(-(stop - start) // (2 * RUN)) * RUN
        yield from span(start, middle)
        yield slice(start, middle), slice(middle, stop)
        yield from span(middle, stop)

    return span(0, n)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """A grid by columns, in the order in which they are taken: scales and outer units.

    Units are levels less zeros; a weight is its units times its scale.
    """

    scale_GO: Tensor
    low_GO: Tensor
    high_GO: Tensor
    zero_GO: Tensor | None
    group_I: Tensor

    @classmethod
    def of(cls, grid: Grid, precision: torch.dtype, order_I: Tensor) -> Spans:
        """Those of a grid; order_I: input columns, first to last."""
        scale_GO = grid.scales_OG.to(precision).T.contiguous()
        zero_GO = None if grid.zeros_OG is None else grid.zeros_OG.to(precision).T.contiguous()
        none_GO = torch.zeros_like(scale_GO) if zero_GO is None else zero_GO
        return cls(
            scale_GO=scale_GO,
            low_GO=-grid.below - none_GO,
            high_GO=grid.above - none_GO,
            zero_GO=zero_GO,
            group_I=order_I // grid.group,
        )

    def of_run(self, run: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Scales, least and largest units of some columns, R O."""
        group_R = self.group_I[run]
        return self.scale_GO[group_R], self.low_GO[group_R], self.high_GO[group_R]

    def units(self, levels_OI: Tensor, order_I: Tensor) -> Tensor:
        """The units I O, in order, of levels O I."""
        units_IO = levels_OI.to(self.scale_GO).T.contiguous()[order_I]
        return units_IO if self.zero_GO is None else units_IO.sub_(self.zero_GO[self.group_I])

    def natural_order(self, units_IO: Tensor, order_I: Tensor) -> Tensor:
        """The levels O I of units in order."""
        if self.zero_GO is not None:
            units_IO = units_IO + self.zero_GO[self.group_I]
        return _placed(units_IO, order_I).T.contiguous()


def _placed(rows_IO: Tensor, order_I: Tensor) -> Tensor:
    """Rows in order put back to where they come from."""
    place_I = torch.empty_like(order_I)
    place_I[order_I] = torch.arange(len(order_I), device=order_I.device)
    return rows_IO[place_I]
