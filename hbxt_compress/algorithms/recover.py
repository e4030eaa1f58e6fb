"""Recovery: tune a quantized model until its velocity is the original's again.

The student sees states of the full-precision trajectory and is pulled to the velocities that the
original has there, by Adam with a cosine schedule: to those of both guidance branches, and to the
guided one, where what both do wrong alike counts once and what they do differently counts much.
Trainable are one factor a scale group, low-rank factors, biases, norms and modulation tables (the
idea of EfficientQAT's end-to-end phase, Chen et al. 2024, arXiv 2407.11062) and, on request, codes:
error feedback chose each to suit its own layer, here all of them suit the velocity. Adam moves each
by about the rate a step while its gradient keeps its sign, so few cross to the next code.
An average of the late weights is kept only if it is better on prompts that nobody tuned on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from hbxt_compress.algorithms.example import Example, velocity_error
from hbxt_compress.strict import Settings

__all__ = ["Progress", "Recover"]

_SAVE_EVERY = 100
_DECAY = 0.98  # of the average over steps


class Progress(Protocol):
    """Who watches a tuning and keeps its checkpoints."""

    def step(self, done: int, total: int, loss: float) -> None: ...

    def save(self, state: Mapping[str, Tensor]) -> None: ...

    def load(self) -> Mapping[str, Tensor] | None: ...


class Recover(Settings):
    """Recovery tuning, of codes too if they have a rate."""

    VERSION: ClassVar[int] = 4

    n_steps: Annotated[int, Field(ge=1)] = 300
    scale_rate: Annotated[float, Field(gt=0)] = 1e-3
    """largest change of a scale's logarithm a step"""
    rate: Annotated[float, Field(gt=0)] = 2e-4
    """learning rate of biases, norms, modulation and low-rank factors"""
    code_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """largest move of a code of 4 bits a step, in levels; 0: codes are frozen"""
    guided: Annotated[float, Field(ge=0, le=1)] = 0.2
    """share of the guided velocity's relative error in what falls; the rest is both branches'"""
    seed: int = 0
    largest: Annotated[float, Field(gt=0)] = 1.0e9
    """parameters of the largest component that it may hold, in float32; else it is left out"""

    def tune(
        self,
        student: nn.Module,
        call: Callable[..., Tensor],
        parameters: Mapping[str, Sequence[nn.Parameter]],
        examples: Sequence[Example],
        held_out: Sequence[Example],
        progress: Progress,
    ) -> tuple[float, float]:
        """Relative guided velocity errors on held-out states before and after tuning, in place.

        call(student, *inputs) gives a velocity. If tuning did not help, everything is as it was.
        """
        chosen = [p.requires_grad_(True) for group in parameters.values() for p in group]
        started = [p.detach().clone() for p in chosen]
        before = velocity_error(student, call, held_out)
        special = {"scales": self.scale_rate, "codes": self.code_rate}
        groups = [
            {"params": list(group), "lr": special.get(kind, self.rate)}
            for kind, group in parameters.items()
            if group
        ]
        rates = [float(group["lr"]) for group in groups]  # type: ignore[arg-type]
        adam = torch.optim.Adam(groups, betas=(0.9, 0.95))
        average = [p.detach().clone() for p in chosen]
        loss_of = self._loss(examples)
        for step in range(_resume(progress, chosen, average, adam), self.n_steps):
            one = examples[_shuffled(len(examples), step, self.seed)]
            warm = min(1.0, (step + 1) / 20)
            fall = 0.5 * (1 + math.cos(math.pi * step / self.n_steps))
            for group, rate in zip(adam.param_groups, rates, strict=True):
                group["lr"] = rate * warm * fall
            with torch.enable_grad():
                loss = loss_of(one, call(student, *one.inputs))
                adam.zero_grad()
                loss.backward()
            if not bool(torch.isfinite(loss)):
                break
            adam.step()
            decay = min(_DECAY, (step + 1) / (step + 10))
            for kept, p in zip(average, chosen, strict=True):
                kept.lerp_(p.detach(), 1 - decay)
            progress.step(step + 1, self.n_steps, float(loss.detach()))
            if (step + 1) % _SAVE_EVERY == 0:
                progress.save(_state(step + 1, chosen, average, adam))
        _assign(chosen, average)
        after = velocity_error(student, call, held_out)
        if not after < before:
            _assign(chosen, started)
            after = before
        for p in chosen:
            p.requires_grad_(False)
        return before, after

    def _loss(self, examples: Sequence[Example]) -> Callable[[Example, Tensor], Tensor]:
        """What falls: two mean squares of errors, each relative to that of all the targets."""
        n = len(examples)
        guided = sum(e.weight * float(e.guided_square(e.target)) for e in examples) / n
        branch = sum(e.weight * float(e.branch_square(e.target)) for e in examples) / n

        def loss(example: Example, velocity: Tensor) -> Tensor:
            error = velocity - example.target
            return example.weight * (
                (1 - self.guided) / branch * example.branch_square(error)
                + self.guided / guided * example.guided_square(error)
            )

        return loss


def _shuffled(n: int, step: int, seed: int) -> int:
    """Which example a step uses: each once an epoch, in an order that depends on nothing else."""
    order = torch.Generator().manual_seed(seed + step // n)
    return int(torch.randperm(n, generator=order)[step % n])


def _state(
    step: int, chosen: Sequence[Tensor], average: Sequence[Tensor], adam: torch.optim.Adam
) -> dict[str, Tensor]:
    """Everything that the next step depends on."""
    state = {"step": torch.tensor(step)}
    for i, (p, kept) in enumerate(zip(chosen, average, strict=True)):
        own = adam.state[p]
        state |= {f"{i}.value": p.detach(), f"{i}.average": kept}
        state |= {f"{i}.first": own["exp_avg"], f"{i}.second": own["exp_avg_sq"]}
    return state


@torch.no_grad()
def _resume(
    progress: Progress, chosen: Sequence[Tensor], average: Sequence[Tensor], adam: torch.optim.Adam
) -> int:
    """Puts back what an interrupted run saved; the step to go on with."""
    state = progress.load()
    if state is None:
        return 0
    for i, (p, kept) in enumerate(zip(chosen, average, strict=True)):
        p.copy_(state[f"{i}.value"])
        kept.copy_(state[f"{i}.average"])
        adam.state[p] = {
            "step": state["step"].float(),
            "exp_avg": state[f"{i}.first"].to(p.device),
            "exp_avg_sq": state[f"{i}.second"].to(p.device),
        }
    return int(state["step"])


@torch.no_grad()
def _assign(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
