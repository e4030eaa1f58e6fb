"""Guidance: one forward a step instead of two, by learning the guided velocity.

    min E ||v_student(x_t, t, text) - (v_none + g (v_text - v_none))||^2 / ||the same||^2

of the teacher's velocities (Meng et al. 2023, arXiv 2210.03142, with g fixed), at clips that the
teacher made, noised to levels spread as its sampler spreads them. g is the standard scale, 1 for no
guidance: what Hummingbird-XT and FastVideo write as 6.0 in cond + w (cond - uncond) is 7.0 here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hbxt_compress.algorithms.noise_levels import noised, shifted, wide
from hbxt_compress.algorithms.pupil import Distilled, Network, Pupil
from hbxt_compress.algorithms.training import Net, Training, Watch, drawn, own, train
from hbxt_compress.lessons import Lessons
from hbxt_compress.strict import Settings

__all__ = ["Guidance"]

_JUDGED = -1  # the number of the draw that judges
_SHOWN = 4  # clips that are shown after a judgement


class Guidance(Settings):
    """Folds the teacher's guidance into the weights."""

    VERSION: ClassVar[int] = 1

    train: Training = Training()
    n_clips: Annotated[int, Field(ge=8)] = 512
    """clips that the teacher makes for it; the last eighth judges only"""
    prompts: str = "wide"
    """the prompt set that they are made of"""

    def levels(self, sigmas: Sequence[float]) -> Sequence[float]:
        """Noise levels at which the teacher's states are needed: the clean latents do."""
        return ()

    def n_velocities(self, n_levels: int) -> int:
        """About how many states the model answers: three forwards' worth a gradient, one guided."""
        return self.train.n_steps * self.train.batch * 3

    @property
    def networks(self) -> tuple[Network, ...]:
        """What it holds: the student, and the teacher, which answers with and without a prompt."""
        n = self.train.n_steps * self.train.batch
        return (
            Network(name="student", trained=True, n_gradients=n),
            Network(name="teacher", trained=False, n_forwards=2 * n),
        )

    def distill(self, pupil: Pupil, lessons: Lessons, watch: Watch) -> Distilled:
        """The student's weights, and its sampler without guidance.

        Raises:
            ValueError: the teacher has no guidance to fold in, or two experts.
            Diverged: a loss is not finite.
        """
        if pupil.teachers.guidance == 1:
            raise ValueError("guidance: this model runs without any, there is nothing to fold in")
        module, how = pupil.trainable(), self.train
        device, ranks = next(module.parameters()).device, pupil.ranks
        net, call = Net(module, how, ranks=ranks), how.compile(pupil.call, ranks)
        n_judged = max(1, len(lessons) // 8)

        def batch(rows: Sequence[int], draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
            x0 = lessons.states(rows, [len(lessons.levels_K) - 1] * len(rows))
            spread = (torch.arange(len(rows)) + torch.rand(len(rows), generator=draw)) / len(rows)
            levels = shifted(spread.clamp(1e-3, 1), pupil.teachers.shift)
            x = noised(x0, wide(levels), torch.randn(x0.shape, generator=draw))
            t = levels * pupil.teachers.n_train_timesteps
            return x.to(device), t.to(device), lessons.text(rows).to(device)

        def error(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
            wanted = pupil.teacher(x, t, text)
            with how.autocast(device):
                found = call(module, x, t, text).float()
            whole = ranks.sum(wanted.square().mean()) / ranks.world
            return (found - wanted).square().mean() / whole

        def turn(k: int) -> tuple[dict[str, float], dict[str, Tensor]]:
            draw = drawn(how.seed, k)
            rows = torch.randint(len(lessons) - n_judged, (how.batch,), generator=draw).tolist()
            x, t, text = own(ranks, *batch(rows, draw))
            loss = error(x, t, text)
            norm = net.descend(loss, k / how.n_steps)
            return {"loss": float(loss.detach()), "norm": norm}, {"x": x, "t": t, "text": text}

        @torch.no_grad()
        def judge() -> float:
            held_out = range(len(lessons) - n_judged, len(lessons))
            draw, found = drawn(how.seed, _JUDGED), []
            for start in range(0, n_judged, how.batch):
                rows = held_out[start : start + how.batch]
                found += [float(error(*batch(rows, draw)))] * len(rows)
            return sum(found) / len(found)

        @torch.no_grad()
        def show() -> tuple[Tensor, Tensor]:
            """Clean latents as both foretell them of the same noised ones."""
            rows = range(len(lessons) - n_judged, len(lessons))[:_SHOWN]
            x, t, text = batch(rows, drawn(how.seed, _JUDGED))
            s = wide(t) / pupil.teachers.n_train_timesteps
            with how.autocast(device):
                found = call(module, x, t, text).float()
            return x - s * found, x - s * pupil.teacher(x, t, text)

        before, after = train({"student": net}, how, turn, judge, watch, show)
        return Distilled(
            sampler=pupil.sampler.with_guidance(1.0),
            measured={"held_out_error_before": before, "held_out_error": after},
            weights=net.weights(),
        )
