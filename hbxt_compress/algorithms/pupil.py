"""Pupil: what a distiller works on, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hbxt_compress.ranks import ALONE, Ranks
from hbxt_compress.sampler import SamplerSpec

__all__ = ["Distilled", "Network", "Pupil"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A copy of the transformer that a distiller holds; trained: with optimizer and average.

    n_forwards, n_gradients: states that it answers over the whole training, without and with a
    gradient. n_bytes: of a weight.
    """

    name: str
    trained: bool
    n_forwards: float = 0.0
    n_gradients: float = 0.0
    n_bytes: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Pupil:
    """A student before its lesson, and its teacher.

    module: its transformer, float32; None where it has two. call(module, x, t, text): its velocity.
    velocity(x, level, text): its guided velocity at one noise level. teacher(x, t, text): that of
    the original at timesteps N, without a gradient. original(): its transformer once more, to
    change. compile(by): has `velocity` run what `by` makes of a forward. sampler: the pupil's so
    far; teachers: the original's. ranks: who trains it, each with its own rows of a batch.
    """

    module: nn.Module | None
    call: Callable[..., Tensor]
    velocity: Callable[[Tensor, float | Tensor, Tensor], Tensor]
    teacher: Callable[[Tensor, Tensor, Tensor], Tensor]
    original: Callable[[], nn.Module]
    compile: Callable[[Callable[[Callable[..., Tensor]], Callable[..., Tensor]]], None]
    device: torch.device
    sampler: SamplerSpec
    teachers: SamplerSpec
    ranks: Ranks = ALONE

    def trainable(self) -> nn.Module:
        """The module, its parameters waiting for gradients; ValueError if there are two."""
        if self.module is None:
            raise ValueError("a model of two experts has no distillers that train it yet")
        return self.module.requires_grad_(True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distilled:
    """sampler: what the student runs on. weights: those that changed, by name; none: all stayed.

    measured: what to tell of it.
    """

    sampler: SamplerSpec
    measured: Mapping[str, float]
    weights: Mapping[str, Tensor]
