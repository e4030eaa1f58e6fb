"""DMD: few steps whose clips are distributed as the teacher's (Yin et al. 2024, arXiv 2405.14867).

The student's clip x0, noised to z = (1 - s) x0 + s eps, is moved along the difference of two
denoisers: the frozen teacher's, with guidance, and a critic's, which keeps learning what the
student's own clips look like:

    g = (critic_x0(z) - teacher_x0(z)) / mean |x0 - teacher_x0(z)|
    loss = ||x0 - sg(x0 - g)||^2 / 2

As in Hummingbird-XT: no adversarial and no regression loss, the critic descends several times for
each step of the student, one step of the sampler is drawn for each batch and only that one has a
gradient, and the sampler predicts clean latents and noises them again to its next level. The critic
learns velocities (Hummingbird-XT's long-video form; its other one weighs them by s^2). What is
judged is how much better or worse the teacher's denoiser does on the student's held-out clips than
on the teacher's own, with their prompts: on blurred ones better, on others worse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from hbxt_compress.algorithms.low_rank_update import adapt
from hbxt_compress.algorithms.noise_levels import NoiseLevels, noised, shared, shifted, wide
from hbxt_compress.algorithms.pupil import Distilled, Network, Pupil
from hbxt_compress.algorithms.sharding import gathered, shard
from hbxt_compress.algorithms.training import Net, Training, Watch, drawn, own, train
from hbxt_compress.lessons import Lessons
from hbxt_compress.ranks import ALONE, Ranks
from hbxt_compress.strict import Settings

__all__ = ["Dmd", "energy_distance", "matching_gradient"]

_JUDGED = -1  # the number of the draw that judges
_SHOWN = 4  # clips that are shown after a judgement
_JUDGED_AT = (0.2, 0.4, 0.6, 0.8)  # levels, before the teacher's shift
_CRITIC = 1_000_003  # added to a step's number in the draws of its critic


class Dmd(Settings):
    """Distribution matching, without a clip of the teacher's but those that judge."""

    VERSION: ClassVar[int] = 1

    noise_levels: NoiseLevels = (1.0, 0.9375, 0.8333, 0.625)
    """where the steps start: 1000, 750, 500, 250 warped by shift 5"""
    train: Training = Training(n_steps=500, rate=2e-5, betas=(0.0, 0.999), clip=10.0, average=0.99)
    critic_rate: Annotated[float, Field(gt=0)] = 1.0e-4
    critic_steps: Annotated[int, Field(ge=1)] = 5
    """of the critic for each of the student's"""
    critic_first: Annotated[int, Field(ge=0)] = 100
    """steps of it before the student's first: it begins as the teacher without guidance"""
    guidance: Annotated[float, Field(ge=1)] | None = None
    """of the teacher, in the standard form (Hummingbird-XT writes 6.0 for 7.0); none: its own"""
    score_levels: tuple[float, float] = (0.02, 0.98)
    """between which the clips are noised, before the teacher's shift"""
    rank: Annotated[int, Field(ge=1)] | None = None
    """of low-rank updates of the student and the critic; none: all weights are trained"""
    n_clips: Annotated[int, Field(ge=8)] = 1024
    """whose prompts it trains on; the last eighth judges, against the teacher's clips"""
    prompts: str = "captions"
    """the prompt set that they are made of"""

    @field_validator("score_levels")
    @classmethod
    def _between(cls, ends: tuple[float, float]) -> tuple[float, float]:
        if not 0 < ends[0] < ends[1] < 1:
            raise ValueError(f"must rise, between 0 and 1: {list(ends)}")
        return ends

    def levels(self, sigmas: Sequence[float]) -> Sequence[float]:
        """Only clean latents are needed; asking for these shares the lessons of a trajectory."""
        return shared(self.noise_levels)

    def n_velocities(self, n_levels: int) -> int:
        """About how many states the model answers; a gradient counts as three forwards."""
        walked = (len(self.noise_levels) - 1) / 2
        n_critic = self.train.n_steps * self.critic_steps + self.critic_first
        each = self.train.n_steps * (walked + 3 + 1 + 2) + n_critic * (walked + 1 + 3)
        return int(self.train.batch * each)

    @property
    def networks(self) -> tuple[Network, ...]:
        """What it holds: student and critic, both trained, and the teacher."""
        n, walked = self.train.n_steps * self.train.batch, (len(self.noise_levels) - 1) / 2
        n_critic = n * self.critic_steps + self.critic_first * self.train.batch
        made = n * walked + n_critic * (walked + 1)
        return (
            Network(name="student", trained=True, n_gradients=n, n_forwards=made),
            Network(name="critic", trained=True, n_gradients=n_critic, n_forwards=n),
            Network(name="teacher", trained=False, n_forwards=2 * n),
        )

    def distill(self, pupil: Pupil, lessons: Lessons, watch: Watch) -> Distilled:
        """The student's weights and its sampler: `renoise` at these levels, without guidance.

        Raises:
            ValueError: it has two experts.
            Diverged: a loss is not finite.
        """
        how, levels = self.train, torch.tensor([*self.noise_levels, 0.0])
        student, critic = pupil.trainable(), pupil.original().requires_grad_(True)
        merged = adapt(student, self.rank), adapt(critic, self.rank)
        device, ranks = next(student.parameters()).device, pupil.ranks
        nets = {
            "student": Net(student, how, ranks=ranks),
            "critic": Net(critic, how, self.critic_rate, ranks),
        }
        call = how.compile(pupil.call, ranks)
        teacher, none = pupil.original().requires_grad_(False), lessons.none_1LD.to(device)
        shard(teacher, ranks)
        scale = pupil.teachers.guidance if self.guidance is None else self.guidance
        n_judged = max(1, len(lessons) // 8)

        def velocity(module: nn.Module, x: Tensor, level: Tensor, text: Tensor) -> Tensor:
            with how.autocast(device):
                t = level.expand(len(x)) * pupil.teachers.n_train_timesteps
                return call(module, x, t.to(device), text).float()

        def guided(x: Tensor, level: Tensor, text: Tensor) -> Tensor:
            if scale == 1:
                return velocity(teacher, x, level, text)
            both = torch.cat([text, none.expand(len(x), -1, -1)])
            of_text, of_none = velocity(
                teacher, x.repeat(2, 1, 1, 1, 1), level.repeat(2), both
            ).chunk(2)
            return of_none + scale * (of_text - of_none)

        def generated(
            eps: Tensor, text: Tensor, last: int, draw: torch.Generator, among: Ranks = ranks
        ) -> Tensor:
            """The clean latents that the student predicts at one of its steps, all before it run.

            Only that step has a gradient. among: whose rows of a batch these are.
            """
            x = eps
            for k in range(last + 1):
                with torch.set_grad_enabled(k == last and torch.is_grad_enabled()):
                    clean = x - levels[k] * velocity(student, x, levels[k], text)
                if k < last:
                    x = noised(clean, levels[k + 1], _normal(x, draw, among))
            return clean

        def batch(draw: torch.Generator) -> tuple[Tensor, Tensor, int]:
            rows = torch.randint(len(lessons) - n_judged, (how.batch,), generator=draw).tolist()
            eps = torch.randn(lessons.states(rows, [0] * len(rows)).shape, generator=draw)
            last = int(torch.randint(len(self.noise_levels), (1,), generator=draw))
            eps, text = own(ranks, eps, lessons.text(rows))
            return eps.to(device), text.to(device), last

        def scored(clean: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
            """The clips noised, at which levels N, and with which noise."""
            low, high = self.score_levels
            u = low + (high - low) * _rows(ranks, (len(clean),), torch.rand, draw)
            s, eps = shifted(u, pupil.teachers.shift).to(device), _normal(clean, draw, ranks)
            return noised(clean, wide(s), eps), s, eps

        def learn_critic(draw: torch.Generator, done: float) -> float:
            eps, text, last = batch(draw)
            with torch.no_grad():
                clean = generated(eps, text, last, draw)
            z, s, noise = scored(clean, draw)
            loss = (velocity(critic, z, s, text) - (noise - clean)).square().mean()
            nets["critic"].descend(loss, done)
            return float(loss.detach())

        def turn(k: int) -> tuple[dict[str, float], dict[str, Tensor]]:
            done, fakes = k / how.n_steps, []
            for j in range(self.critic_steps + (0 if k else self.critic_first)):
                fakes.append(learn_critic(drawn(how.seed, k, _CRITIC, j), done))
            draw = drawn(how.seed, k)
            eps, text, last = batch(draw)
            clean = generated(eps, text, last, draw)
            with torch.no_grad():
                z, s, _ = scored(clean, draw)
                fake = z - wide(s) * velocity(critic, z, s, text)
                real = z - wide(s) * guided(z, s, text)
                gradient = matching_gradient(clean, fake, real)
            loss = 0.5 * (clean - (clean - gradient).detach()).square().mean()
            norm = nets["student"].descend(loss, done)
            values = {"loss": float(loss.detach()), "critic": sum(fakes) / len(fakes), "norm": norm}
            return values, {"noise": eps, "text": text}

        @torch.no_grad()
        def missed(clean: Tensor, text: Tensor) -> Tensor:
            """By level, how far off the teacher's guided denoiser is on such clips."""
            found = []
            for i, u in enumerate(_JUDGED_AT):
                s = shifted(torch.full((len(clean),), u), pupil.teachers.shift).to(device)
                z = noised(clean, wide(s), _normal(clean, drawn(how.seed, _JUDGED, i), ALONE))
                found.append((z - wide(s) * guided(z, s, text) - clean).square().sum().double())
            return torch.stack(found).cpu()

        @torch.no_grad()
        def sampled(draw: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            """Of the clips that judge: the student's, from fresh noise, the teacher's, and text."""
            held_out = range(len(lessons) - n_judged, len(lessons))
            for start in range(0, n_judged, how.batch):
                rows, at = held_out[start : start + how.batch], len(lessons.levels_K) - 1
                real = lessons.states(rows, [at] * len(rows)).to(device)
                text = lessons.text(rows).to(device)
                eps = torch.randn(real.shape, generator=draw).to(device)
                made = generated(eps, text, len(self.noise_levels) - 1, draw, ALONE)
                yield made, real, text

        def judge() -> float:
            """Mean |log| of the teacher's error on the student's clips over that on its own."""
            errors = torch.zeros(2, len(_JUDGED_AT), dtype=torch.float64)
            for made, real, text in sampled(drawn(how.seed, _JUDGED)):
                errors += torch.stack([missed(made, text), missed(real, text)])
            return float((errors[0] / errors[1]).log().abs().mean())

        def show() -> tuple[Tensor, Tensor]:
            made, real, _ = next(sampled(drawn(how.seed, _JUDGED)))
            return made[:_SHOWN], real[:_SHOWN]

        before, after = train(nets, how, turn, judge, watch, show)
        pairs = [(made.cpu(), real.cpu()) for made, real, _ in sampled(drawn(how.seed, _JUDGED))]
        made, real = (torch.cat(side) for side in zip(*pairs, strict=True))
        sampler = replace(
            pupil.sampler.with_guidance(1.0),
            solver="renoise", n_steps=len(self.noise_levels), levels=self.noise_levels,
            coefficients=(),
        )  # fmt: skip
        return Distilled(
            sampler=sampler,
            measured={
                "denoising_gap_before": before,
                "denoising_gap": after,
                "energy_distance": energy_distance(made, real),
                "energy": float(made.square().sum() / real.square().sum()),
            },
            weights=gathered(merged[0](), ranks),
        )


def matching_gradient(clean: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """Where clips are to go less of: N C T H W, each scaled by the teacher's distance to it."""
    scale = (clean - real).abs().flatten(1).mean(1).clamp_min(1e-6)
    return (fake - real) / wide(scale)


def energy_distance(a_NCTHW: Tensor, b_NCTHW: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'|, over the root of the dimension (Szekely, Rizzo 2013).

    Unbiased: about 0, and perhaps below it, for sets of one distribution.
    """
    a, b = a_NCTHW.double().flatten(1), b_NCTHW.double().flatten(1)
    own = [torch.cdist(x, x).sum() / max(1, len(x) * (len(x) - 1)) for x in (a, b)]
    return float((2 * torch.cdist(a, b).mean() - own[0] - own[1]) / a.shape[1] ** 0.5)


def _normal(like: Tensor, draw: torch.Generator, ranks: Ranks) -> Tensor:
    return _rows(ranks, tuple(like.shape), torch.randn, draw).to(like.device)


def _rows(
    ranks: Ranks, shape: tuple[int, ...], how: Callable[..., Tensor], draw: torch.Generator
) -> Tensor:
    """Random numbers for this rank's rows, the same as one rank draws for them."""
    return own(ranks, how(shape[0] * ranks.world, *shape[1:], generator=draw))[0]
