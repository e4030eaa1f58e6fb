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
_NEAR = 3  # frames by which a change may come earlier or later
_KNOWN = 0.8  # of a clip's frames, what a faster or shorter one shows still lies within the clip
_SPEAKS = 0.06  # of all error, what a damage explains at least
_ELSEWHERE = 30.0  # levels squared by which a clip errs that goes its own way
_SPEEDS = np.concatenate([np.arange(0, 0.5, 0.05), np.arange(0.5, 1.6, 0.01), [1.8, 2.0]])


def _timeline(reference: Clip, candidate: Clip) -> Timeline | None:
    """None where the reference does not move, or is too short to tell."""
    if len(reference.frames) < _LEAST_FRAMES:
        return None
    found = Timeline.of(reference.frames, candidate.frames)
    return found if found.steps.mean() >= _STILL else None


def _followed(reference: Clip, candidate: Clip) -> Timeline | None:
    """As _timeline; None also where the candidate, in whatever order, shows something else."""
    line = _timeline(reference, candidate)
    if line is None or line.across.min(axis=1).mean() > _ELSEWHERE:
        return None
    return line


def _placed(reference: Clip, candidate: Clip) -> Timeline | None:
    """As _followed; None also where frames err by more than one differs from the next.

    There it is chance which of the reference's frames one shows.
    """
    line = _followed(reference, candidate)
    if line is None or np.median(line.across.min(axis=1)) > np.median(line.steps):
        return None
    return line


def _at_speeds(line: Timeline, n_frames: int) -> np.ndarray:
    """How much nearer the candidate is to the reference at each speed than to it as it is.

    Levels squared, summed over the first n_frames; float64, as _SPEEDS. Frames past the
    reference's end count nothing.
    """
    last = len(line) - 1
    times = _SPEEDS[:, None] * np.arange(len(line))
    nearer = line.across.diagonal() - line.at(np.minimum(times, last))
    return np.where(times <= last + 1e-9, nearer, 0)[:, :n_frames].sum(axis=1)


def _speed(line: Timeline) -> float:
    """The speed at which the reference is nearest, by the share of error that goes away.

    Of a share, frames past the reference's end, which fewer are at a lower speed, take nothing.
    """
    last = len(line) - 1
    times = _SPEEDS[:, None] * np.arange(len(line))
    known = times <= last + 1e-9
    left = np.where(known, line.at(np.minimum(times, last)), 0).sum(axis=1)
    error = np.where(known, line.across.diagonal(), 0).sum(axis=1)
    own = int(np.argmin(np.abs(_SPEEDS - 1)))
    share = np.where(error > 0, left / np.where(error > 0, error, 1), np.inf)
    best = int(np.argmin(share))
    return float(_SPEEDS[best]) if share[best] < share[own] else 1.0


def _shifted(line: Timeline, by: int, n_frames: int) -> tuple[float, float]:
    """The best of all clips that leave out `by` frames (less than 0: show one -by times more).

    Gives how much nearer the candidate is to it, as _at_speeds does, and how far it is from the
    reference itself.
    """
    t = np.arange(len(line))
    other = np.clip(t + by, 0, len(line) - 1)
    nearer = line.across[t, t] - line.across[t, other]
    first = max(1, 1 - by)
    gains, sizes = (
        np.cumsum(one[:n_frames][::-1])[::-1][first:] for one in (nearer, line.reference[t, other])
    )
    if not len(gains):
        return 0.0, 0.0
    best = int(np.argmax(gains))
    return float(gains[best]), float(sizes[best])


def _left_out(line: Timeline) -> int:
    """How many frames are left out at one place; less than 0: doubled, 0: none, or another speed.

    It must explain the candidate better than the reference does and any speed, by the frames whose
    place in time all of these know.
    """
    n_frames = max(3, round(_KNOWN * len(line)))
    steady = float(_at_speeds(line, n_frames).max())
    tried = [(by, *_shifted(line, by, n_frames)) for by in (1, -1, 2, -2, 3, -3)]
    by, gain, size = max(tried, key=lambda one: one[1])
    error = float(line.across.diagonal()[:n_frames].sum())
    return by if gain > max(1.03 * steady, 0.75 * size, _SPEAKS * error) else 0


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
        if _left_out(line):
            return None
        return float(100 * (_speed(line) - 1))


SLOW_MOTION = SlowMotion()


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """The share of frame changes that are missing where the reference's picture changes."""

    name: str = "frozen"
    meaning: str = "the picture stands still where the reference's moves"
    unit: str = "% of changes"
    tolerance: float = 10.0
    alarm: float | None = 25.0

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """Percent of the reference's changes, 0..100; None where its picture does not move."""
        held = _held(reference, candidate)
        return None if held is None else float(100 * held.mean())


FROZEN = Frozen()


def _held(reference: Clip, candidate: Clip) -> np.ndarray | None:
    """Which of the candidate's changes, where the reference has one, are missing; bool.

    A change is missing if it goes nowhere along any change that the reference makes near it, and
    is no larger than what the frames differ from the reference's anyway.
    """
    line = _timeline(reference, candidate)
    if line is None:
        return None
    d, n = line.across, len(line)
    t, u = np.arange(1, n)[:, None], np.arange(1, n)[None]
    along = 0.5 * (d[t, u - 1] + d[t - 1, u] - d[t, u] - d[t - 1, u - 1])
    along = along / np.maximum(line.steps, 0.5 * _STILL)
    along = np.where(np.abs(t - u) <= _NEAR, along, -np.inf).max(axis=1)
    error = d.min(axis=1)
    small = line.candidate.diagonal(1) < 0.3 * line.steps + 1.5 * (error[1:] + error[:-1])
    known = (error[1:] < line.reference.max()) & (line.steps >= _STILL)
    return np.asarray(((along < 0.35) & small & known)[line.steps >= _STILL])


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatedFrame:
    """Frames shown again for one that is missing, after which the clip goes on in time."""

    name: str = "repeated_frame"
    meaning: str = "a frame is shown twice and the next one left out"
    unit: str = "frames"
    tolerance: float = 0.3
    alarm: float | None = 0.9

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """How many frames are copies of a neighbour; None where places in time cannot be told."""
        line = _placed(reference, candidate)
        if line is None:
            return None
        own, step = line.across.diagonal(), line.steps
        least = np.minimum(step[:-1], step[1:])
        before, after = line.across.diagonal(-1)[:-1], line.across.diagonal(1)[1:]
        nearer = np.maximum(own[1:-1] - before - step[:-1] / 2, own[1:-1] - after - step[1:] / 2)
        around = (own[:-2] + own[2:]) / 2
        change = line.candidate.diagonal(1)
        same = np.minimum(change[:-1], change[1:]) < 0.3 * least + 3 * around
        alone = own[1:-1] - around > 0.5 * least
        return float(np.sum((nearer > 0) & same & alone & (least >= _STILL)))


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
        """Frames left out, less than 0: doubled; None where places in time cannot be told."""
        line = _followed(reference, candidate)
        if line is None:
            return None
        return float(_left_out(line))


DROPPED_FRAME = DroppedFrame()


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameShuffle:
    """Steps back in time: frames that show what came before the frame ahead of them."""

    name: str = "frame_shuffle"
    meaning: str = "frames are out of order"
    unit: str = "% of frames"
    tolerance: float = 3.0
    alarm: float | None = 5.0

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """Percent of changes that go back, 0..100; None where places in time cannot be told."""
        line = _placed(reference, candidate)
        if line is None:
            return None
        t = np.arange(len(line))
        best = np.argmin(line.across, axis=1)
        own, found = line.across[t, t], line.across[t, best]
        apart = line.reference[t, best]
        shown = np.where(own - found > np.maximum(0.5 * apart, 0.2 * found), best, t)
        return float(100 * np.mean(np.diff(shown) < 0))


FRAME_SHUFFLE = FrameShuffle()
