"""Example: some states of a trajectory, and the velocity that the original answers there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Example", "velocity_error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Inputs of a forward, the velocity that the original answers, and how much it counts.

    guidance: other than 1, the first half of every input (along its first axis) has the prompt and
    the second half has none, at the same latents and timesteps.
    """

    inputs: tuple[Tensor, ...]
    target: Tensor
    weight: float
    guidance: float = 1.0

    def guided(self, velocity: Tensor) -> Tensor:
        """What the sampler goes along, once for each state."""
        if self.guidance == 1:
            return velocity
        cond, uncond = velocity.chunk(2)
        return uncond + self.guidance * (cond - uncond)

    def guided_square(self, velocity: Tensor) -> Tensor:
        """Mean square of the guided velocity, or of its error if errors are given."""
        return self.guided(velocity).square().mean()

    def branch_square(self, velocity: Tensor) -> Tensor:
        """Mean square of both branches, each counted by its factor in the guided velocity."""
        if self.guidance == 1:
            return velocity.square().mean()
        cond, uncond = (one.square().mean() for one in velocity.chunk(2))
        return self.guidance**2 * cond + (self.guidance - 1) ** 2 * uncond


@torch.no_grad()
def velocity_error(
    student: nn.Module, call: Callable[..., Tensor], examples: Sequence[Example]
) -> float:
    """sum w ||g - g'||^2 / sum w ||g||^2 of guided velocities; inf without any."""
    lost = kept = 0.0
    for one in examples:
        own = one.weight * one.guided(one.target).numel()
        lost += own * float(one.guided_square(call(student, *one.inputs) - one.target))
        kept += own * float(one.guided_square(one.target))
    return lost / kept if kept else math.inf
