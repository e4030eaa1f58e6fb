"""Noise levels of few-step students, and clips noised to them."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

from pydantic import AfterValidator, Field
from torch import Tensor

__all__ = ["NoiseLevels", "noised", "shifted", "wide"]


def _falling(levels: tuple[float, ...]) -> tuple[float, ...]:
    if levels[0] != 1 or any(b >= a or b <= 0 for a, b in pairwise(levels)):
        raise ValueError(f"must start at 1 and fall, staying above 0: {list(levels)}")
    return levels


NoiseLevels = Annotated[tuple[float, ...], Field(min_length=1), AfterValidator(_falling)]
"""where a student's steps start"""


def shifted(levels: Tensor, shift: float) -> Tensor:
    """Levels 0..1 warped as a flow-matching schedule's are: shift l / (1 + (shift - 1) l)."""
    return shift * levels / (1 + (shift - 1) * levels)


def noised(clean: Tensor, level: Tensor, eps: Tensor) -> Tensor:
    """(1 - s) x0 + s eps."""
    return (1 - level) * clean + level * eps


def wide(values_N: Tensor) -> Tensor:
    """N 1 1 1 1: one number for each clip's latents."""
    return values_N.view(-1, 1, 1, 1, 1)
