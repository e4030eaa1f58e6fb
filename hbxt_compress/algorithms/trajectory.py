"""Trajectory: few steps of Euler, each learnt from where the teacher's path has come meanwhile.

At levels s_0 = 1 > s_1 > ... > s_N = 0 the teacher passes x_0 .. x_N. The student learns, first at
the teacher's states and later at its own x, where it is to go:

    min E ||v_student(x, s_k, text) - (x_(k+1) - x) / (s_(k+1) - s_k)||^2

which is progressive distillation's target (Salimans, Ho 2022, arXiv 2202.00512) with all of the
teacher's steps between two levels taken at once. Guidance is in those states, so the student runs
without. The map from noise to clips stays the teacher's: nothing is drawn anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from hbxt_compress.algorithms.pupil import Distilled, Pupil
from hbxt_compress.algorithms.training import Net, Training, Watch, drawn, train
from hbxt_compress.lessons import Lessons
from hbxt_compress.strict import Settings

__all__ = ["Trajectory"]


class Trajectory(Settings):
    """Regression on the teacher's paths."""

    VERSION: ClassVar[int] = 1

    noise_levels: Annotated[tuple[float, ...], Field(min_length=1)] = (1.0, 0.9375, 0.8333, 0.625)
    """where the steps start; the teacher's nearest are taken"""
    train: Training = Training(n_steps=6000)
    own_states: Annotated[float, Field(ge=0, le=1)] = 0.5
    """share of the training, at its end, at states that the student itself came to"""
    n_clips: Annotated[int, Field(ge=8)] = 1024
    """clips that the teacher makes for it; the last sixteenth judges only"""
    prompts: str = "wide"
    """the prompt set that they are made of"""

    @field_validator("noise_levels")
    @classmethod
    def _falling(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
        if levels[0] != 1 or any(b >= a or b <= 0 for a, b in itertools.pairwise(levels)):
            raise ValueError(f"must start at 1 and fall, staying above 0: {list(levels)}")
        return levels

    def levels(self, sigmas: Sequence[float]) -> Sequence[float]:
        """Noise levels at which the teacher's states are needed."""
        return self.noise_levels

    def n_velocities(self, n_levels: int) -> int:
        """About how many states the model answers; a gradient counts as three forwards."""
        walked = self.own_states * (len(self.noise_levels) - 1) / 2
        return int(self.train.n_steps * self.train.batch * (3 + walked))

    def distill(self, pupil: Pupil, lessons: Lessons, watch: Watch) -> Distilled:
        """The student's weights and its sampler: Euler at these levels, without guidance.

        Raises:
            ValueError: two of the levels are one of the teacher's, or it has two experts.
            Diverged: a loss is not finite.
        """
        levels, how = lessons.levels_K, self.train
        n_steps = len(levels) - 1
        if n_steps != len(self.noise_levels):
            raise ValueError(
                f"trajectory: {len(self.noise_levels)} levels are {n_steps} of the teacher's"
            )
        module = pupil.trainable()
        net, device = Net(module, how), next(module.parameters()).device
        n_judged = max(1, len(lessons) // 16)
        gaps = levels[1:] - levels[:-1]

        def velocity(x: Tensor, at: Tensor, text: Tensor) -> Tensor:
            t = levels[at] * pupil.teachers.n_train_timesteps
            with how.autocast(device):
                found = pupil.call(module, x.to(device), t.to(device), text.to(device))
            return found.float().to(x.device)

        def advanced(x: Tensor, at: Tensor, text: Tensor) -> Tensor:
            return x + _wide(gaps[at]) * velocity(x, at, text)

        @torch.no_grad()
        def walked(x: Tensor, at: Tensor, text: Tensor) -> Tensor:
            """Each row from noise to its level, by the student."""
            for k in range(int(at.max())):
                on_way = (at > k).nonzero().flatten()
                step = torch.full((len(on_way),), k)
                x = x.index_copy(0, on_way, advanced(x[on_way], step, text[on_way]))
            return x

        def turn(k: int) -> tuple[dict[str, float], dict[str, Tensor]]:
            draw = drawn(how.seed, k)
            rows = torch.randint(len(lessons) - n_judged, (how.batch,), generator=draw).tolist()
            at, text = torch.randint(n_steps, (how.batch,), generator=draw), lessons.text(rows)
            if k >= (1 - self.own_states) * how.n_steps:
                x = walked(lessons.states(rows, [0] * len(rows)), at, text)
            else:
                x = lessons.states(rows, at.tolist())
            wanted = (lessons.states(rows, (at + 1).tolist()) - x) / _wide(gaps[at])
            found = velocity(x, at, text)
            weights = gaps[at].abs() / gaps.abs().mean()
            loss = ((found - wanted).square().flatten(1).mean(1) * weights).mean()
            norm = net.descend(loss, k / how.n_steps)
            return {"loss": float(loss.detach()), "norm": norm}, {"x": x, "text": text}

        @torch.no_grad()
        def judge() -> float:
            held_out = range(len(lessons) - n_judged, len(lessons))
            lost = kept = 0.0
            for start in range(0, n_judged, how.batch):
                rows = held_out[start : start + how.batch]
                x, text = lessons.states(rows, [0] * len(rows)), lessons.text(rows)
                for k in range(n_steps):
                    x = advanced(x, torch.full((len(rows),), k), text)
                clean = lessons.states(rows, [n_steps] * len(rows))
                lost += float((x - clean).double().square().sum())
                kept += float(clean.double().square().sum())
            return lost / kept

        before, after = train({"student": net}, how, turn, judge, watch)
        sampler = replace(
            pupil.sampler.with_guidance(1.0),
            solver="euler", n_steps=n_steps, levels=tuple(levels[:-1].tolist()), coefficients=(),
        )  # fmt: skip
        return Distilled(
            sampler=sampler,
            measured={"held_out_error_before": before, "held_out_error": after},
            weights={name: p.detach() for name, p in net.chosen.items()},
        )


def _wide(values_N: Tensor) -> Tensor:
    """N 1 1 1 1: one number for each row of latents."""
    return values_N.view(-1, 1, 1, 1, 1)
