"""Few steps: noise levels and coefficients by which a model needs fewer of them; no weight changes.

Step k of the fitted solver gives c_0 eps + sum_j c_(j+1) v_j, linear in the initial noise and in
all velocities so far (the family of bespoke non-stationary solvers, Shaul et al. 2024, arXiv
2403.01329). Its coefficients are least squares on the states that the teacher passes at the next
level, over the solver's own states, with a ridge towards Euler's step:

    min sum_n ||B_n c - x_n||^2 + ridge * sum_i (c_i - e_i)^2 ||B_i||^2

Levels are first some of the teacher's: those of the shortest path under the error of one Euler step
between two of them, or the sampler's own for so few steps, whichever is better; then moved one by
one while clips that were not fitted to come nearer. From there all of it is tuned together, see
tuned_steps.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hbxt_compress.algorithms.pupil import Distilled, Network, Pupil
from hbxt_compress.algorithms.training import Training, Watch
from hbxt_compress.algorithms.tuned_steps import FittedSolver, tune
from hbxt_compress.lessons import Lessons
from hbxt_compress.sampler import SamplerSpec
from hbxt_compress.strict import Settings

__all__ = ["FewSteps", "Fit", "Path", "fit_coefficients", "shortest_path"]

Velocity = Callable[[Tensor, float, Tensor], Tensor]
_N_ON_PATH = 16  # clips that the first guess looks at
_N_IN_SEARCH = 64  # and those that the search does


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """How a teacher took some clips from noise to clean latents.

    states_NKCTHW: float32 at the falling levels_K, whose last is 0. text_NLD: of the prompts.
    """

    states_NKCTHW: Tensor
    levels_K: Tensor
    text_NLD: Tensor

    def rows(self, chosen: slice) -> Path:
        return replace(
            self, states_NKCTHW=self.states_NKCTHW[chosen], text_NLD=self.text_NLD[chosen]
        )

    def ends(self) -> tuple[Tensor, Tensor, Tensor]:
        """The noise, the clean latents and the text."""
        return self.states_NKCTHW[:, 0], self.states_NKCTHW[:, -1], self.text_NLD

    def __len__(self) -> int:
        return len(self.text_NLD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """coefficients: of step k, k + 2 of them. errors: relative squared ones of the clean latents,
    on the clips fitted to and on the others. energy: of the others' latents over the teacher's.
    """

    coefficients: tuple[tuple[float, ...], ...]
    errors: tuple[float, float]
    energy: float


class FewSteps(Settings):
    """Refits the sampler to a smaller number of steps."""

    VERSION: ClassVar[int] = 2

    n_steps: Annotated[int, Field(ge=1, le=50)] = 8
    n_clips: Annotated[int, Field(ge=8)] = 192
    """clips that the teacher makes for it; the last third judges only"""
    prompts: str = "captions"
    """the prompt set that they are made of"""
    search: Annotated[int, Field(ge=0)] = 60
    """sets of levels that are tried at most"""
    ridge: Annotated[float, Field(ge=0)] = 1.0e-6
    """pull towards Euler's step, relative to each basis vector's energy"""
    tune: Training = Training(
        n_steps=200, batch=16, rate=2e-3, warmup=10, betas=(0.9, 0.95), average=0.9, judge_every=40
    )
    """how all of it is tuned together, from the fitted steps on"""

    def levels(self, sigmas: Sequence[float]) -> Sequence[float]:
        """Noise levels at which the teacher's states are needed: all that it has."""
        return sigmas

    def n_velocities(self, n_levels: int) -> int:
        """About how many states the model answers; a gradient counts as three forwards."""
        n_learnt = self.n_clips - self.n_clips // 3
        n_judged = n_learnt // 4 * (2 + self.tune.n_steps // self.tune.judge_every)
        tuned = 3 * self.tune.n_steps * self.tune.batch + n_judged
        searched = min(_N_IN_SEARCH, n_learnt) * (3 + self.search)
        fitted = searched + n_learnt + 2 * (self.n_clips - n_learnt)
        return n_levels * _N_ON_PATH + self.n_steps * (fitted + tuned)

    @property
    def networks(self) -> tuple[Network, ...]:
        """What it holds: the model itself, not trained; it answers with and without a prompt."""
        return (Network(name="model", trained=False, n_forwards=2 * self.n_velocities(0)),)

    def distill(self, pupil: Pupil, lessons: Lessons, watch: Watch) -> Distilled:
        """The sampler with its new levels and coefficients; how far its clips end from the
        teacher's, on the last third of them, beside Euler's.

        Raises:
            ValueError: the teacher itself took fewer steps, or the fit is not finite.
            Diverged: a loss is not finite.
        """
        rows, levels = range(len(lessons)), range(len(lessons.levels_K))
        states = [lessons.states(rows, [k] * len(rows)) for k in levels]
        path = Path(
            states_NKCTHW=torch.stack(states, dim=1),
            levels_K=lessons.levels_K,
            text_NLD=lessons.text(rows),
        )
        n_learnt = len(path) - len(path) // 3
        learnt, judged = path.rows(slice(n_learnt)), path.rows(slice(n_learnt, None))
        pupil.compile(self.tune.compile)
        with self.tune.autocast(pupil.device):
            solver = self.fit(pupil.velocity, learnt, pupil.sampler, watch)
        kept = n_learnt - n_learnt // 4
        before, after = tune(
            solver, pupil.velocity, learnt.rows(slice(kept)).ends(),
            learnt.rows(slice(kept, None)).ends(), self.tune, pupil.device, watch,
        )  # fmt: skip
        with torch.no_grad():
            found = solver(pupil.velocity, judged.states_NKCTHW[:, 0], judged.text_NLD)
        clean = judged.states_NKCTHW[:, -1]
        lost, energy = _energy(found - clean) / _energy(clean), _energy(found) / _energy(clean)
        if not (math.isfinite(lost) and math.isfinite(energy)):
            raise ValueError("the fitted solver's latents are not finite")
        measured = {
            "error_db_before_tuning": 10 * math.log10(before),
            "error_db": 10 * math.log10(after),
            "held_out_error_db": 10 * math.log10(lost),
            "held_out_error_db_of_euler": 10 * math.log10(self._eulers(pupil, judged)),
            "energy": energy,
        }
        sampler = replace(
            pupil.sampler,
            solver="fitted",
            n_steps=self.n_steps,
            levels=tuple(solver.levels().tolist()),
            coefficients=tuple(tuple(row.tolist()) for row in solver.rows),
            corrections=(),
        )
        return Distilled(sampler=sampler, measured=measured, weights={})

    def _eulers(self, pupil: Pupil, judged: Path) -> float:
        """The relative squared error of Euler at the sampler's levels, on some clips."""
        levels, x = self._plain(pupil.sampler).sigmas().tolist(), judged.states_NKCTHW[:, 0]
        with torch.no_grad():
            for a, b in pairwise(levels):
                x = x + (b - a) * pupil.velocity(x, a, judged.text_NLD)
        clean = judged.states_NKCTHW[:, -1]
        return _energy(x - clean) / _energy(clean)

    def _plain(self, sampler: SamplerSpec) -> SamplerSpec:
        return replace(sampler, solver="euler", n_steps=self.n_steps, levels=(), coefficients=())

    @torch.no_grad()
    def fit(
        self, velocity: Velocity, path: Path, sampler: SamplerSpec, watch: Watch
    ) -> FittedSolver:
        """A solver fitted a step at a time, at the teacher's levels that a search has found.

        velocity(x, level, text): guided, of the model that is to need fewer steps. A search that
        was finished once is not repeated.

        Raises:
            ValueError: the teacher itself took fewer.
        """
        looked = path.rows(slice(_N_IN_SEARCH))
        n_tried = max(1, len(looked) // 4)
        parts = [slice(len(looked) - n_tried), slice(len(looked) - n_tried, None)]
        tried = looked.rows(parts[0]), looked.rows(parts[1])

        def error(steps: Sequence[int]) -> float:
            return fit_coefficients(velocity, *tried, steps, self.ridge).errors[1]

        found = watch.load("levels")
        if found is None:
            starts = (
                shortest_path(velocity, path.rows(slice(_N_ON_PATH)), self.n_steps),
                _nearest(path.levels_K, self._plain(sampler).sigmas()[:-1].tolist()),
            )
            last = len(path.levels_K) - 1
            found = {
                "steps": torch.tensor(
                    _moved(min(starts, key=error), last, error, self.search, watch)
                )
            }
            watch.save("levels", found)
        steps = found["steps"].tolist()
        fit = fit_coefficients(velocity, path, tried[1], steps, self.ridge)
        return FittedSolver([float(path.levels_K[k]) for k in steps], fit.coefficients)


def fit_coefficients(
    velocity: Velocity, learnt: Path, judged: Path, steps: Sequence[int], ridge: float
) -> Fit:
    """The coefficients for steps that start at these of the teacher's levels, the first at 0."""
    levels = [float(learnt.levels_K[k]) for k in steps]
    ends = [*steps[1:], len(learnt.levels_K) - 1]
    bases = [[one.states_NKCTHW[:, 0]] for one in (learnt, judged)]
    states = [basis[0] for basis in bases]
    euler, rows = torch.ones(1, dtype=torch.float64), []
    for level, end in zip(levels, ends, strict=True):
        for basis, x, one in zip(bases, states, (learnt, judged), strict=True):
            basis.append(velocity(x, level, one.text_NLD))
        step = float(learnt.levels_K[end]) - level
        euler = torch.cat([euler, torch.tensor([step], dtype=torch.float64)])
        row = _least_squares(bases[0], learnt.states_NKCTHW[:, end], euler, ridge)
        rows.append(tuple(row.tolist()))
        states = [
            sum((c * b for c, b in zip(row.float(), basis, strict=True)), torch.zeros(()))
            for basis in bases
        ]
    ends_of = [one.states_NKCTHW[:, -1] for one in (learnt, judged)]
    errors = [_energy(x - end) / _energy(end) for x, end in zip(states, ends_of, strict=True)]
    return Fit(
        coefficients=tuple(rows),
        errors=(errors[0], errors[1]),
        energy=_energy(states[1]) / _energy(ends_of[1]),
    )


def shortest_path(velocity: Velocity, path: Path, n_steps: int) -> tuple[int, ...]:
    """Which levels n_steps start at, so that the errors of Euler's steps sum to the least."""
    states, levels = path.states_NKCTHW, path.levels_K
    last = len(levels) - 1
    if n_steps > last:
        raise ValueError(f"{n_steps} steps: the model itself takes {last}; ask for fewer")
    cost = torch.full((last + 1, last + 1), math.inf, dtype=torch.float64)
    for i in range(last):
        v = velocity(states[:, i], float(levels[i]), path.text_NLD)
        for j in range(i + 1, last + 1):
            reached = states[:, i] + (levels[j] - levels[i]) * v
            cost[i, j] = math.sqrt(_energy(reached - states[:, j]))
    best = torch.full((n_steps + 1, last + 1), math.inf, dtype=torch.float64)
    came = torch.zeros(n_steps + 1, last + 1, dtype=torch.long)
    best[0, 0] = 0.0
    for n in range(1, n_steps + 1):
        best[n], came[n] = (best[n - 1].unsqueeze(1) + cost).min(0)
    steps, at = [], last
    for n in range(n_steps, 0, -1):
        at = int(came[n, at])
        steps.append(at)
    return tuple(reversed(steps))


def _nearest(levels_K: Tensor, wanted: Sequence[float]) -> tuple[int, ...]:
    """The levels nearest to falling ones, all of them different, the first at 0."""
    last, found = len(levels_K) - 1, list[int]()
    for k, level in enumerate(wanted):
        nearest = int((levels_K[:-1] - level).abs().argmin()) if k else 0
        least = found[-1] + 1 if found else 0
        found.append(min(max(nearest, least), last - (len(wanted) - k)))
    return tuple(found)


def _moved(
    steps: tuple[int, ...],
    last: int,
    error: Callable[[Sequence[int]], float],
    most: int,
    watch: Watch,
) -> tuple[int, ...]:
    """The steps moved along the teacher's levels as long as that helps; the first one stays.

    most: sets of levels that are tried.
    """
    least, n_tried = error(steps), 0
    for far in (max(1, last // 16), 1):
        better = True
        while better and n_tried < most:
            better = False
            for k in range(1, len(steps)):
                for move in (-far, far):
                    moved = (*steps[:k], steps[k] + move, *steps[k + 1 :])
                    beyond = list(moved) != sorted({*moved}) or moved[-1] >= last
                    if beyond or n_tried >= most:
                        continue
                    now, n_tried = error(moved), n_tried + 1
                    if now < least:
                        steps, least, better = moved, now, True
                watch.searched(n_tried, most, 10 * math.log10(least))
    return steps


def _least_squares(
    basis: Sequence[Tensor], wanted: Tensor, towards: Tensor, ridge: float
) -> Tensor:
    """The coefficients, float64, of a combination of tensors that comes nearest to one."""
    rows = torch.stack([one.double().flatten() for one in basis])
    gram = rows @ rows.T
    right = rows @ wanted.double().flatten() - gram @ towards
    return towards + torch.linalg.solve(gram + ridge * torch.diag(gram.diagonal()), right)


def _energy(x: Tensor) -> float:
    return float(x.double().square().sum())
