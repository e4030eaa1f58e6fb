"""Trajectory: few steps, each learnt from where the teacher's path has come meanwhile.

At levels s_0 = 1 > s_1 > ... > s_N = 0 the teacher passes x_0 .. x_N. The student learns, first at
the teacher's states and later at its own x, where it is to go:

    min E ||v_student(x, s_k, text) - (x_(k+1) - x) / (s_(k+1) - s_k)||^2

which is progressive distillation's target (Salimans, Ho 2022, arXiv 2202.00512) with all of the
teacher's steps between two levels taken at once. Guidance is in those states, so the student runs
without. The map from noise to clips stays the teacher's: nothing is drawn anew. A student that is
to noise its predictions again (`solver: renoise`, what dmd starts from) learns at each level where
the path ends instead: x_N in place of x_(k+1), as CausVid's does (Yin et al. 2024, arXiv
2412.07772).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hbxt_compress.algorithms.noise_levels import NoiseLevels, nearest, shared, wide
from hbxt_compress.algorithms.pupil import Distilled, Network, Pupil
from hbxt_compress.algorithms.training import Net, Training, Watch, drawn, own, train
from hbxt_compress.lessons import Lessons
from hbxt_compress.strict import Settings

__all__ = ["Trajectory"]

_SHOWN = 4  # clips that are shown after a judgement


class Trajectory(Settings):
    """Regression on the teacher's paths."""

    VERSION: ClassVar[int] = 1

    noise_levels: NoiseLevels = (1.0, 0.9375, 0.8333, 0.625)
    """where the steps start; the teacher's nearest are taken"""
    solver: Literal["euler", "renoise"] = "euler"
    train: Training = Training(n_steps=2000, rate=5.0e-4, average=0.99)
    own_states: Annotated[float, Field(ge=0, le=1)] = 0.0
    """share of the training, at its end, at states that the student itself came to by Euler"""
    n_clips: Annotated[int, Field(ge=8)] = 1024
    """clips that the teacher makes for it; the last sixteenth judges only"""
    prompts: str = "captions"
    """the prompt set that they are made of"""

    @model_validator(mode="after")
    def _own(self) -> Self:
        if self.solver == "renoise" and self.own_states:
            raise ValueError("own_states: with fresh noise the path leads elsewhere; leave it at 0")
        return self

    def levels(self, sigmas: Sequence[float]) -> Sequence[float]:
        """Noise levels at which the teacher's states are kept."""
        return shared(self.noise_levels)

    def n_velocities(self, n_levels: int) -> int:
        """About how many states the model answers; a gradient counts as three forwards."""
        walked = self.own_states * (len(self.noise_levels) - 1) / 2
        return int(self.train.n_steps * self.train.batch * (3 + walked))

    @property
    def networks(self) -> tuple[Network, ...]:
        """What it holds: the student alone, the teacher's answers are in the lessons."""
        n, walked = self.train.n_steps * self.train.batch, (len(self.noise_levels) - 1) / 2
        student = Network(
            name="student", trained=True, n_gradients=n, n_forwards=n * self.own_states * walked
        )
        return (student,)

    def distill(self, pupil: Pupil, lessons: Lessons, watch: Watch) -> Distilled:
        """The student's weights and its sampler: Euler at these levels, without guidance.

        Raises:
            ValueError: two of the levels are one of the teacher's, or it has two experts.
            Diverged: a loss is not finite.
        """
        clean = len(lessons.levels_K) - 1
        lessons = lessons.at([*nearest(lessons.levels_K[:clean], self.noise_levels), clean])
        levels, how, n_steps = lessons.levels_K, self.train, len(self.noise_levels)
        module, ranks = pupil.trainable(), pupil.ranks
        device = next(module.parameters()).device
        net, call = Net(module, how, ranks=ranks), how.compile(pupil.call, ranks)
        n_judged = max(1, len(lessons) // 16)
        aims = torch.arange(n_steps) + 1
        if self.solver == "renoise":
            aims = torch.full_like(aims, n_steps)
        gaps = levels[aims] - levels[:-1]

        def velocity(x: Tensor, at: Tensor, text: Tensor) -> Tensor:
            t = levels[at] * pupil.teachers.n_train_timesteps
            with how.autocast(device):
                found = call(module, x.to(device), t.to(device), text.to(device))
            return found.float().to(x.device)

        def advanced(x: Tensor, at: Tensor, text: Tensor) -> Tensor:
            """x at its levels taken to where those steps aim."""
            return x + wide(gaps[at]) * velocity(x, at, text)

        @torch.no_grad()
        def walked(x: Tensor, at: Tensor, text: Tensor, most: int) -> Tensor:
            """Rows of noise, by rising level, each taken to its level by the student.

            most: the highest level of all ranks' rows.
            """
            for k in range(most):
                first = int((at <= k).sum())
                # A rank whose rows are all there still runs a forward: the others wait for it.
                rest = slice(first, None) if first < len(x) else slice(1)
                step = torch.full((len(x[rest]),), k)
                after = advanced(x[rest], step, text[rest])
                x = torch.cat([x[:first], after[: len(x) - first]])
            return x

        def turn(k: int) -> tuple[dict[str, float], dict[str, Tensor]]:
            draw = drawn(how.seed, k)
            rows = torch.randint(len(lessons) - n_judged, (how.batch,), generator=draw).tolist()
            at = torch.arange(how.batch) * n_steps // how.batch
            most, rows = int(at[-1]), own(ranks, torch.tensor(rows))[0].tolist()
            at, text = own(ranks, at)[0], lessons.text(rows)
            if k >= (1 - self.own_states) * how.n_steps:
                x = walked(lessons.states(rows, [0] * len(rows)), at, text, most)
            else:
                x = lessons.states(rows, at.tolist())
            wanted = (lessons.states(rows, aims[at].tolist()) - x) / wide(gaps[at])
            weights = gaps[at].abs() / gaps.abs().mean()
            missed = (velocity(x, at, text) - wanted).square().flatten(1).mean(1)
            loss = (missed * weights).mean()
            norm = net.descend(loss, k / how.n_steps)
            return {"loss": float(loss.detach()), "norm": norm}, {"x": x, "text": text}

        @torch.no_grad()
        def sampled(rows: Sequence[int]) -> Tensor:
            """Clean latents of the student, from the rows' noise; a renoiser's of its last step."""
            x, text = lessons.states(rows, [0] * len(rows)), lessons.text(rows)
            for k in range(n_steps):
                if self.solver == "renoise":
                    x = lessons.states(rows, [k] * len(rows))
                x = advanced(x, torch.full((len(rows),), k), text)
            return x

        def show() -> tuple[Tensor, Tensor]:
            rows = range(len(lessons) - n_judged, len(lessons))[:_SHOWN]
            return sampled(rows), lessons.states(rows, [n_steps] * len(rows))

        @torch.no_grad()
        def judge() -> float:
            """The relative squared error of the clean latents; the mean over a renoiser's steps."""
            held_out = range(len(lessons) - n_judged, len(lessons))
            lost = kept = 0.0
            for start in range(0, n_judged, how.batch):
                rows = held_out[start : start + how.batch]
                text, clean = lessons.text(rows), lessons.states(rows, [n_steps] * len(rows))
                x = lessons.states(rows, [0] * len(rows))
                for k in range(n_steps):
                    if self.solver == "renoise":
                        x = lessons.states(rows, [k] * len(rows))
                    x = advanced(x, torch.full((len(rows),), k), text)
                    if k + 1 == n_steps or self.solver == "renoise":
                        lost += float((x - clean).double().square().sum())
                        kept += float(clean.double().square().sum())
            return lost / kept

        before, after = train({"student": net}, how, turn, judge, watch, show)
        sampler = replace(
            pupil.sampler.with_guidance(1.0),
            solver=self.solver,
            n_steps=n_steps,
            levels=tuple(levels[:-1].tolist()),
            coefficients=(),
        )
        return Distilled(
            sampler=sampler,
            measured={"held_out_error_before": before, "held_out_error": after},
            weights=net.weights(),
        )
