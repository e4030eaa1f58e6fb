"""GPTQ towards the weight that suits the inputs the quantized net really sees, then descent.

The objective is objective.py's (that of GPTAQ, arXiv 2504.02692, and Qronos, arXiv 2505.11695). How
far to correct the target and how much to damp are chosen on rows of other prompts. Scales belong to
groups of the original column order, whatever the order of rounding, so nothing is stored for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hbxt_compress.algorithms.feedback import Fed, feed_back
from hbxt_compress.algorithms.grid import Grid
from hbxt_compress.algorithms.low_rank import branch, split_low_rank
from hbxt_compress.algorithms.objective import (
    Judge,
    Moments,
    Order,
    Problem,
    ScaleWeights,
    fitted,
    fitted_problem,
)
from hbxt_compress.algorithms.polish import descend, refit_scales, slopes
from hbxt_compress.algorithms.rounded import Rounded
from hbxt_compress.algorithms.scales import search_scales
from hbxt_compress.formats import WeightFormat
from hbxt_compress.stats import LayerInputs, Need
from hbxt_compress.strict import Settings

__all__ = ["Gptq"]

_JUDGED_ROWS = 128  # output rows, evenly spread, on which damping and correction are chosen
_ALTERNATIONS = 3  # most times that the low-rank branch is split off anew
_ROWS_AT_ONCE = 2048  # output rows rounded together, to bound memory
_LEAST_GAIN = 0.2  # of a round of polishing, for another one: that gains a tenth of it, 0.1 dB

_Damping = Annotated[float, Field(gt=0, le=10)]
_Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """Levels on a grid, and the 16-bit branch beside them.

    n_drifted: levels that stand for values off the grid. n_plain: rows where rounding to nearest
    was no worse than error feedback.
    """

    grid: Grid
    levels_OI: Tensor
    n_drifted: int
    n_plain: int
    low_rank: tuple[Tensor, Tensor] | None = None

    @property
    def rest_OI(self) -> Tensor:
        """What the levels stand for, without the branch."""
        return self.grid.value(self.levels_OI).to(self.levels_OI)

    @property
    def weight_OI(self) -> Tensor:
        rest_OI = self.rest_OI
        return rest_OI if self.low_rank is None else rest_OI + branch(self.low_rank).to(rest_OI)


class Gptq(Settings):
    """Round column by column, each column repairing the errors of those before it.

    Lists are candidates: the best on held-out rows is used, or the middle one if there are none.
    """

    VERSION: ClassVar[int] = 6

    damping: Annotated[tuple[_Damping, ...], Field(min_length=1)] = (0.001, 0.01, 0.1)
    """Added to the variance of each input, as a share of the mean variance."""
    correct: Annotated[tuple[_Share, ...], Field(min_length=1)] = (0.0, 0.5, 1.0)
    """How far the target goes from the weight towards the one that fits the quantized net."""
    polish: Annotated[int, Field(ge=0, le=100)] = 2
    """Rounds of scale refit and descent; in the first one error feedback again in between.

    Of layers of more than 2048 inputs no more once one gained less than 20 %."""
    order: Order = "activation"
    """Columns by falling variance of their inputs, or as they stand."""
    scale_weights: ScaleWeights = "pivots"
    """What an error counts in the scale search: what later columns cannot repair, E[y^2], or 1."""
    refit: bool = True
    """Whether scales are solved for once levels are known."""

    @property
    def need(self) -> Need | None:
        """Statistics that calibration must gather."""
        return "covariance"

    def round(self, weight_OI: Tensor, inputs: LayerInputs | None, fmt: WeightFormat) -> Rounded:
        """The weight in `fmt`, and the bias shift of centred inputs where the layer has a bias.

        Raises:
            ValueError: there are no covariances, their size is not the weight's, or one of the two
                holds NaN or infinity.
        """
        weight_OI = _checked(weight_OI, inputs)
        assert inputs is not None
        blind = inputs.fit.products_xy_II is None
        damping, alternations = _middle(self.damping), 0
        share = 0.0 if blind else _middle(self.correct)
        centred, held_out = inputs.takes_bias, inputs.held_out
        if held_out is not None and held_out.weight > 0:
            judge = inputs.once(
                ("judge", centred),
                lambda: Judge(fit=fitted(inputs, centred=centred), held_out=held_out),
            )
            problem, share = self._choose(weight_OI, inputs, judge, fmt)
            damping = problem.damping
            if fmt.rank:
                target_OI = problem.target(weight_OI, share)
                alternations = self._alternations(weight_OI, target_OI, problem, judge, fmt)
        everything = inputs.once("everything", inputs.everything)
        if blind:  # no rows are held out, and matrices of 0.8 GB are not kept
            problem = fitted_problem(inputs, damping, self.order, centred=centred)
        else:
            moments = inputs.once(
                ("moments", centred), lambda: Moments.of(everything, centred=centred)
            )
            problem = inputs.once(
                ("problem", centred, damping, self.order),
                lambda: moments.problem(damping, self.order),
            )
        correction_II = None
        if share:  # of I rows, once for all layers of an input, of which many have more rows
            key = "correction", centred, damping, self.order
            correction_II = inputs.once(key, problem.correction)
        target_OI = problem.target(weight_OI, share, correction_II)
        attempts = self._attempts(target_OI, problem, fmt, self.polish)
        best = next(attempts)
        for _ in range(alternations):
            best = next(attempts)
        payload = _stored(best, fmt)
        shift_O = None
        if inputs.takes_bias:
            mean_x_I, mean_y_I = everything.mean_x_I, everything.mean_y_I
            kept_O = fmt.decode(payload).to(weight_OI) @ mean_y_I.to(weight_OI)
            shift_O = (weight_OI @ mean_x_I.to(weight_OI) - kept_O).float()
        notes: dict[str, float | str] = {
            "damping": problem.damping,
            "correct": share,
            "dead_inputs": int(problem.dead_I.sum()),
            "drifted_levels": best.n_drifted,
            "rows_no_better_than_nearest": best.n_plain,
        }
        if fmt.rank:
            notes["alternations"] = alternations
        if blind:
            notes["uncorrected"] = f"{len(inputs.fit.shift_I)} inputs are too many for E[x y^T]"
        corrected_OI = target_OI if share else None
        return Rounded(payload=payload, shift_O=shift_O, target_OI=corrected_OI, notes=notes)

    def _choose(
        self, weight_OI: Tensor, inputs: LayerInputs, judge: Judge, fmt: WeightFormat
    ) -> tuple[Problem, float]:
        """Damping and correction, each best given the other, starting from the middle ones.

        All are judged on one grid, that of the middle ones: searching it takes most of the time.
        """
        rows = torch.linspace(0, len(weight_OI) - 1, min(len(weight_OI), _JUDGED_ROWS)).long()
        some_OI = weight_OI[rows]
        centred = inputs.takes_bias
        problems = [
            fitted_problem(inputs, damping, self.order, centred=centred)
            for damping in sorted(self.damping)
        ]
        shares = [0.0] if judge.fit.cross_II is None else sorted(self.correct)
        i, before = len(problems) // 2, None
        j = len(shares) // 2
        if len(problems) == len(shares) == 1:
            return problems[0], shares[0]
        base_OI = torch.zeros_like(some_OI)
        if fmt.rank:
            low_rank = split_low_rank(weight_OI, problems[i].factor.pivots_I, fmt.rank)
            base_OI = branch(low_rank)[rows].to(some_OI)
        middle_OI = problems[i].target(some_OI, shares[j]) - base_OI
        importance_I = problems[i].importance(self.scale_weights)
        grid = search_scales(middle_OI.float(), fmt, importance_I)
        known: dict[tuple[int, int], float] = {}

        def loss(i: int, j: int) -> float:
            if (i, j) not in known:
                target_OI = problems[i].target(some_OI, shares[j]) - base_OI
                nearest_OI = grid.levels(target_OI.float()).to(target_OI)
                levels_OI, _, _ = _nearer(target_OI, problems[i], grid, nearest_OI)
                known[i, j] = judge.loss(some_OI, grid.value(levels_OI).to(base_OI) + base_OI)
            return known[i, j]

        while before != (i, j):
            before = i, j
            by_damping = [loss(one, j) for one in range(len(problems))]
            i = by_damping.index(min(by_damping))
            by_share = [loss(i, one) for one in range(len(shares))]
            j = by_share.index(min(by_share))
        return problems[i], shares[j]

    def _alternations(
        self,
        weight_OI: Tensor,
        target_OI: Tensor,
        problem: Problem,
        judge: Judge,
        fmt: WeightFormat,
    ) -> int:
        """How many times splitting the branch off anew lowers the loss on held-out rows."""
        attempts = self._attempts(target_OI, problem, fmt, polish=0)
        least = judge.loss(weight_OI, next(attempts).weight_OI)
        for done in range(_ALTERNATIONS):
            loss = judge.loss(weight_OI, next(attempts).weight_OI)
            if loss >= least:
                return done
            least = loss
        return _ALTERNATIONS

    def _attempts(
        self, target_OI: Tensor, problem: Problem, fmt: WeightFormat, polish: int
    ) -> Iterator[_Result]:
        """Roundings of a target, each with the branch split off what the one before left over."""
        left_OI = target_OI
        while True:
            if not fmt.rank:
                yield self._rounded(target_OI, problem, fmt, polish)
                continue
            low_rank = split_low_rank(left_OI, problem.factor.pivots_I, fmt.rank)
            rest_OI = target_OI - branch(low_rank).to(target_OI)
            result = self._rounded(rest_OI, problem, fmt, polish)
            left_OI = target_OI - result.rest_OI
            yield replace(result, low_rank=low_rank)

    def _rounded(
        self, target_OI: Tensor, problem: Problem, fmt: WeightFormat, polish: int
    ) -> _Result:
        n_chunks = -(-len(target_OI) // _ROWS_AT_ONCE)
        parts = [
            self._rounded_rows(rows_OI, problem, fmt, polish)
            for rows_OI in target_OI.tensor_split(n_chunks)
        ]
        zeros = [part.grid.zeros_OG for part in parts]
        grid = replace(
            parts[0].grid,
            scales_OG=torch.cat([part.grid.scales_OG for part in parts]),
            zeros_OG=None if zeros[0] is None else torch.cat([z for z in zeros if z is not None]),
        )
        return _Result(
            grid=grid,
            levels_OI=torch.cat([part.levels_OI for part in parts]),
            n_drifted=sum(part.n_drifted for part in parts),
            n_plain=sum(part.n_plain for part in parts),
        )

    def _rounded_rows(
        self, target_OI: Tensor, problem: Problem, fmt: WeightFormat, polish: int
    ) -> _Result:
        hessian_II, factor = problem.hessian_II, problem.factor
        grid = search_scales(target_OI.float(), fmt, problem.importance(self.scale_weights))
        levels_OI = grid.levels(target_OI.float()).to(target_OI)
        levels_OI, loss_O, fed = _nearer(target_OI, problem, grid, levels_OI)
        plain_O = (levels_OI != fed.levels_OI).any(1)
        least = _LEAST_GAIN if target_OI.dtype == torch.float32 else 0.0
        for n_done in range(polish):
            before = loss_O
            if self.refit:
                slope_OI = None
                if n_done == 0:  # feedback has done half of the product already
                    slope_OI = _slopes_left(fed, target_OI, levels_OI, grid, problem, plain_O)
                grid, gain_O = refit_scales(target_OI, levels_OI, grid, hessian_II, slope_OI)
                loss_O = loss_O - gain_O.to(loss_O)
                if n_done == 0:
                    levels_OI, loss_O, _ = _nearer(target_OI, problem, grid, levels_OI, loss_O)
            levels_OI, gain_O = descend(target_OI, levels_OI, grid, hessian_II, factor.order_I)
            loss_O = loss_O - gain_O.to(loss_O)
            if float(loss_O.sum()) >= (1 - least) * float(before.sum()):
                break
        n_plain = int(plain_O.sum())
        return _Result(grid=grid, levels_OI=levels_OI, n_drifted=fed.n_drifted, n_plain=n_plain)


def _nearer(
    target_OI: Tensor,
    problem: Problem,
    grid: Grid,
    levels_OI: Tensor,
    loss_O: Tensor | None = None,
) -> tuple[Tensor, Tensor, Fed]:
    """Per row the better of these levels and those of error feedback on the same grid.

    loss_O: that of these levels, where it is known. Returns levels, their losses, and the feedback.
    """
    if loss_O is None:
        error_OI = target_OI - grid.value(levels_OI).to(target_OI)
        loss_O = problem.loss(error_OI)
    fed = feed_back(target_OI, problem.factor, grid)
    wins_O = fed.loss_O < loss_O
    levels_OI = torch.where(wins_O[:, None], fed.levels_OI, levels_OI)
    return levels_OI, torch.where(wins_O, fed.loss_O, loss_O), fed


def _slopes_left(
    fed: Fed,
    target_OI: Tensor,
    levels_OI: Tensor,
    grid: Grid,
    problem: Problem,
    plain_O: Tensor,
) -> Tensor:
    """e H, O I, of the levels that feedback found, but for plain rows, which have others."""
    slope_OI = problem.factor.slopes(fed.away_IO)
    if bool(plain_O.any()):
        rows = target_OI[plain_O], levels_OI[plain_O], grid.rows(plain_O)
        slope_OI[plain_O] = slopes(*rows, problem.hessian_II)
    return slope_OI


def _checked(weight_OI: Tensor, inputs: LayerInputs | None) -> Tensor:
    """The weight in the precision of the statistics."""
    if inputs is None:
        raise ValueError("gptq rounds by the covariance of a layer's inputs: calibrate it first")
    if not bool(torch.isfinite(weight_OI).all()):
        raise ValueError("gptq: the weight holds NaN or infinity")
    n_in = len(inputs.fit.shift_I)
    if weight_OI.ndim != 2 or weight_OI.shape[1] != n_in:
        shape = tuple(weight_OI.shape)
        raise ValueError(f"gptq: a weight {shape} and statistics of {n_in} inputs do not match")
    products_II = inputs.fit.products_yy_II
    return weight_OI.double() if products_II is None else weight_OI.to(products_II)


def _stored(result: _Result, fmt: WeightFormat) -> dict[str, Tensor]:
    grid = result.grid
    if result.low_rank is None:
        return dict(fmt.store(result.levels_OI, grid.scales_OG, grid.zeros_OG))
    return dict(
        fmt.store(result.levels_OI, grid.scales_OG, grid.zeros_OG, low_rank=result.low_rank)
    )


def _middle(candidates: tuple[float, ...]) -> float:
    return sorted(candidates)[len(candidates) // 2]
