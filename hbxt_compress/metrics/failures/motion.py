"""Failures in time: frames held, lost, doubled or out of order, and motion at another speed.

All are told from the distances between frames (miniature.Timeline). What a damage would have left
is compared with what is there, so an error that has nothing to do with it cancels: of a candidate
c, a reference r and a damaged reference m, |c-r|^2 - |c-m|^2 is |m-r|^2 where c shows m, and minus
that where c shows r. Where r and m hardly differ, nothing can be told.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hbxt_compress.clips import Clip
from hbxt_compress.metrics.failures.miniature import Timeline

__all__ = [
    "DROPPED_FRAME",
    "FRAME_SHUFFLE",
    "FROZEN",
    "REPEATED_FRAME",
    "SLOW_MOTION",
    "DroppedFrame",
    "FrameShuffle",
    "Frozen",
    "RepeatedFrame",
    "SlowMotion",
]

_STILL = 0.3  # levels squared of mean change a frame: less is a still picture
_LEAST_FRAMES = 5
_SPEEDS = np.concatenate([np.arange(0, 0.5, 0.05), np.arange(0.5, 1.6, 0.01), [1.8, 2.0]])


def _timeline(reference: Clip, candidate: Clip) -> Timeline | None:
    """None where the reference does not move, or is too short to tell."""
    if len(reference.frames) < _LEAST_FRAMES:
        return None
    found = Timeline.of(reference.frames, candidate.frames)
    return found if found.steps.mean() >= _STILL else None


def _at_speeds(line: Timeline, speeds: np.ndarray) -> np.ndarray:
    """How much nearer the candidate is to the reference at each speed than to it as it is.

    Levels squared, summed over frames; float64 S. Frames past the reference's end count nothing.
    """
    last = len(line) - 1
    times = speeds[:, None] * np.arange(len(line))
    nearer = line.across.diagonal() - line.at(np.minimum(times, last))
    return np.where(times <= last + 1e-9, nearer, 0).sum(axis=1)


def _shifted(line: Timeline, by: int) -> tuple[float, float]:
    """The best of all clips that leave out `by` frames (less than 0: show one -by times more).

    Gives how much nearer the candidate is to it, as _at_speeds does, and how far it is from the
    reference itself. Frames that run past the end count nothing.
    """
    t = np.arange(len(line))
    other = np.clip(t + by, 0, len(line) - 1)
    known = t + by <= len(line) - 1
    nearer = np.where(known, line.across[t, t] - line.across[t, other], 0)
    apart = np.where(known, line.reference[t, other], 0)
    first = max(1, 1 - by)
    gains, sizes = (np.cumsum(one[::-1])[::-1][first:-1] for one in (nearer, apart))
    best = int(np.argmax(gains)) if len(gains) else -1
    return (float(gains[best]), float(sizes[best])) if len(gains) else (0.0, 0.0)


def _jump(line: Timeline) -> tuple[int, float, float]:
    """The best number of frames left out, with its gain and size as of _shifted; 0 for none."""
    found = [(by, *_shifted(line, by)) for by in (1, -1, 2, -2, 3, -3)]
    return max(found, key=lambda one: one[1])


def _explains(line: Timeline, gain: float, size: float) -> bool:
    """Whether a gain speaks for a damage of this size: half of it, and of all error a fifth."""
    error = float(line.across.diagonal().sum())
    return gain > 0.5 * size and gain > 0.2 * error


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowMotion:
    """Speed against the reference's, by aligning the two in time from the first frame on."""

    name: str = "slow_motion"
    meaning: str = "motion at another speed than the reference's"
    unit: str = "%"
    tolerance: float = 4.0
    alarm: float | None = None

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """100 * (speed / reference's - 1): -10 is a tenth slower.

        None where the reference stands still, moves too little for the error there is, or frames
        are left out, which is another failure.
        """
        line = _timeline(reference, candidate)
        if line is None:
            return None
        gains = _at_speeds(line, _SPEEDS)
        best = int(np.argmax(gains))
        speed, gain = _SPEEDS[best], float(gains[best])
        by, jumped, size = _jump(line)
        if by and jumped > gain and _explains(line, jumped, size):
            return None
        return float(100 * (speed - 1))


SLOW_MOTION = SlowMotion()


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """The share of frame changes that are missing where the reference's picture changes."""

    name: str = "frozen"
    meaning: str = "the picture stands still where the reference's moves"
    unit: str = "% of changes"
    tolerance: float = 10.0
    alarm: float | None = 40.0

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """Percent of the reference's changes, 0..100; None where its picture does not move."""
        held = _held(reference, candidate)
        return None if held is None else float(100 * held.mean())


FROZEN = Frozen()


def _held(reference: Clip, candidate: Clip) -> np.ndarray | None:
    """Which of the candidate's frames 1.. hardly differ from the one before, as they should.

    Bool, one for each change that the reference has; a change near it that is as small is enough,
    for at another speed changes come earlier or later.
    """
    line = _timeline(reference, candidate)
    if line is None:
        return None
    near = np.pad(line.steps, 1, mode="edge")
    least = np.min([near[:-2], near[1:-1], near[2:]], axis=0)
    moves = line.steps >= _STILL
    return np.asarray((line.candidate.diagonal(1) < 0.3 * least)[moves])


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatedFrame:
    """Frames shown again for one that is missing, after which the clip goes on in time."""

    name: str = "repeated_frame"
    meaning: str = "a frame is shown twice and the next one left out"
    unit: str = "frames"
    tolerance: float = 0.3
    alarm: float | None = 0.9

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """How many frames are copies of a neighbour; None where the picture does not move."""
        line = _timeline(reference, candidate)
        if line is None:
            return None
        own, before = line.across.diagonal()[1:-1], line.across.diagonal(-1)[:-1]
        after, step = line.across.diagonal(1)[1:], line.steps
        nearer = np.maximum(own - before - 0.5 * step[:-1], own - after - 0.5 * step[1:])
        fits = np.minimum(line.candidate.diagonal(1)[:-1], line.candidate.diagonal(1)[1:])
        around = 0.5 * (own[:-2] + own[2:])
        copied = (nearer > 0) & (fits < 0.3 * np.minimum(step[:-1], step[1:]))
        alone = own[1:-1] > 2 * around
        return float(np.sum(copied[1:-1] & alone & (step[1:-2] >= _STILL)))


REPEATED_FRAME = RepeatedFrame()


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedFrame:
    """Frames left out, the rest moved up; or doubled, the rest moved back."""

    name: str = "dropped_frame"
    meaning: str = "frames are left out, or shown one time more, and the rest moves in time"
    unit: str = "frames"
    tolerance: float = 0.3
    alarm: float | None = 0.9

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """Frames left out, less than 0 for doubled ones; None where the picture does not move."""
        line = _timeline(reference, candidate)
        if line is None:
            return None
        by, gain, size = _jump(line)
        steady = float(_at_speeds(line, _SPEEDS).max())
        return float(by) if _explains(line, gain, size) and gain > 1.1 * steady else 0.0


DROPPED_FRAME = DroppedFrame()


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameShuffle:
    """Steps back in time: frames that show what came before the frame ahead of them."""

    name: str = "frame_shuffle"
    meaning: str = "frames are out of order"
    unit: str = "% of frames"
    tolerance: float = 4.0
    alarm: float | None = 15.0

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """Percent of changes that go back, 0..100; None where the picture does not move."""
        line = _timeline(reference, candidate)
        if line is None:
            return None
        t = np.arange(len(line))
        best = np.argmin(line.across, axis=1)
        own, found = line.across[t, t], line.across[t, best]
        apart = line.reference[t, best]
        shown = np.where(own - found > 0.5 * np.maximum(apart, found), best, t)
        return float(100 * np.mean(np.diff(shown) < 0))


FRAME_SHUFFLE = FrameShuffle()
