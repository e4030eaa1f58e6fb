"""Noise levels of few-step students, and clips noised to them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Final

from pydantic import AfterValidator, Field
from torch import Tensor

__all__ = ["USUAL", "NoiseLevels", "nearest", "noised", "shared", "shifted", "wide"]

USUAL: Final = (1.0, 0.9722, 0.9375, 0.8929, 0.8333, 0.75, 0.625, 0.4167)
"""eight even steps warped by shift 5; students of 3, 4 and 8 steps start theirs at some of these"""


def _falling(levels: tuple[float, ...]) -> tuple[float, ...]:
    if levels[0] != 1 or any(b >= a or b <= 0 for a, b in pairwise(levels)):
        raise ValueError(f"must start at 1 and fall, staying above 0: {list(levels)}")
    return levels


NoiseLevels = Annotated[tuple[float, ...], Field(min_length=1), AfterValidator(_falling)]
"""where a student's steps start"""


def shared(levels: Sequence[float]) -> Sequence[float]:
    """What lessons are asked for: all usual levels if these are among them, so one set serves."""
    return USUAL if set(levels) <= set(USUAL) else levels


def nearest(levels_K: Tensor, wanted: Sequence[float]) -> list[int]:
    """Of falling levels the places of those nearest to the wanted ones.

    Raises:
        ValueError: two of the wanted levels are nearest to the same one.
    """
    found = [int((levels_K - level).abs().argmin()) for level in wanted]
    if len(set(found)) != len(found):
        raise ValueError(f"{len(found)} levels are {len(set(found))} of the teacher's")
    return found


def shifted(levels: Tensor, shift: float) -> Tensor:
    """Levels 0..1 warped as a flow-matching schedule's are: shift l / (1 + (shift - 1) l)."""
    return shift * levels / (1 + (shift - 1) * levels)


def noised(clean: Tensor, level: Tensor, eps: Tensor) -> Tensor:
    """(1 - s) x0 + s eps."""
    return (1 - level) * clean + level * eps


def wide(values_N: Tensor) -> Tensor:
    """N 1 1 1 1: one number for each clip's latents."""
    return values_N.view(-1, 1, 1, 1, 1)
