"""Failures that people see in generated clips, each told by a signal that is 0 for the reference.

To add one: write a class with the members of `Detector` in a file here, and a line in FAILURES.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from hbxt_compress.clips import Clip
from hbxt_compress.metrics.failures import content, levels, motion, texture
from hbxt_compress.metrics.failures.findings import Detector, conclude_one
from hbxt_compress.report import Finding

__all__ = ["FAILURES", "Detector", "find", "signals"]


_ALL: tuple[Detector, ...] = (
    levels.BLACK,
    levels.CONSTANT,
    levels.NON_FINITE,
    levels.RED_SHIFT,
    levels.GREEN_SHIFT,
    levels.BLUE_SHIFT,
    levels.CONTRAST,
    levels.SATURATION,
    levels.SWAPPED_CHANNELS,
    levels.INVERTED,
    levels.UINT8_WRAP,
    motion.FROZEN,
    motion.SLOW_MOTION,
    motion.REPEATED_FRAME,
    motion.DROPPED_FRAME,
    motion.FRAME_SHUFFLE,
    texture.BLUR,
    texture.FLICKER,
    texture.LOCAL_FLICKER,
    texture.SEAMS,
    texture.GRAIN,
    content.WRONG_PROMPT,
    content.OTHER_SCENE,
    content.FIRST_FRAME_ONLY,
    content.OFF_BY_ONE_STEP,
)
FAILURES: Final[Mapping[str, Detector]] = {one.name: one for one in _ALL}


def signals(pairs: Iterable[tuple[Clip, Clip]]) -> dict[str, list[float | None]]:
    """The signal of every detector for each (reference, candidate) pair of one shape, in order."""
    found: dict[str, list[float | None]] = {name: [] for name in FAILURES}
    for reference, candidate in pairs:
        for name, detector in FAILURES.items():
            found[name].append(detector.signal(reference, candidate))
    return found


def find(signals: Mapping[str, Sequence[float | None]], seed: int) -> list[Finding]:
    """A finding for each failure named in `signals`, in the order of the table."""
    return [
        conclude_one(detector, signals[name], seed)
        for name, detector in FAILURES.items()
        if name in signals
    ]
