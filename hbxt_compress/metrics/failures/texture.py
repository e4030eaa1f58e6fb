"""Failures of texture: blur, flicker, seams between tiles, grain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hbxt_compress.clips import Clip
from hbxt_compress.metrics.failures.miniature import block_means, luminance

__all__ = [
    "BLUR",
    "FLICKER",
    "GRAIN",
    "LOCAL_FLICKER",
    "SEAMS",
    "Blur",
    "Flicker",
    "Grain",
    "LocalFlicker",
    "Seams",
]

_SECOND = np.sqrt(6.0)  # the second difference of values that flicker by 1 has this deviation


@dataclass(frozen=True, slots=True, kw_only=True)
class Blur:
    """How steep the steepest places are: little changed by noise, and no need to align them."""

    name: str = "blur"
    meaning: str = "edges are softer or harder than the reference's"
    unit: str = "% of steepness"
    tolerance: float = 12.0
    alarm: float | None = 60.0
    share: float = 0.01

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """100 * (steepness / reference's - 1): -30 is softer. None where it has no edges."""
        right, wrong = (self._steepness(clip.frames) for clip in (reference, candidate))
        return 100 * (wrong / right - 1) if right >= 4 else None

    def _steepness(self, frames: np.ndarray) -> float:
        """Mean |difference| of neighbours over the steepest share of places, levels."""
        grey = np.rint(luminance(frames)).astype(np.int16)
        steps = [np.abs(np.diff(grey, axis=axis)).ravel() for axis in (1, 2)]
        counts = np.bincount(np.concatenate(steps), minlength=256)[::-1]
        n = max(1, round(self.share * sum(step.size for step in steps)))
        kept = np.diff(np.minimum(np.cumsum(counts), n), prepend=0)
        return float(kept @ np.arange(len(kept))[::-1] / n)


def _second_difference(values: np.ndarray) -> float:
    """Mean |second difference| over the first axis, as levels that values flicker by."""
    return float(np.abs(np.diff(values, n=2, axis=0)).mean() / _SECOND / 0.798)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flicker:
    """Brightness of whole frames that jumps from frame to frame."""

    name: str = "flicker"
    meaning: str = "brightness flickers more or less than the reference's"
    unit: str = "levels of 255"
    tolerance: float = 0.8
    alarm: float | None = 5.0

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """Standard deviation of the flicker, less the reference's; None below 3 frames."""
        if len(reference.frames) < 3:
            return None
        right, wrong = (
            _second_difference(clip.frames.mean(axis=(1, 2, 3), dtype=np.float64))
            for clip in (reference, candidate)
        )
        return wrong - right


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFlicker:
    """Brightness of places that jumps from frame to frame."""

    name: str = "local_flicker"
    meaning: str = "places flicker more or less than the reference's"
    unit: str = "levels of 255"
    tolerance: float = 1.2
    alarm: float | None = 8.0
    places: int = 8

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """Flicker of an eighth of the frame's side, less the reference's; None below 3 frames."""
        if len(reference.frames) < 3:
            return None
        step = max(1, min(reference.frames.shape[1:3]) // self.places)
        right, wrong = (
            _second_difference(luminance(block_means(clip.frames, step)))
            for clip in (reference, candidate)
        )
        return wrong - right


@dataclass(frozen=True, slots=True, kw_only=True)
class Seams:
    """Straight steps along tile borders in candidate less reference, which no moved edge makes."""

    name: str = "seams"
    meaning: str = "borders of tiles are seen"
    unit: str = "levels of 255"
    tolerance: float = 0.5
    alarm: float | None = 1.0

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """The step at the borders of the most likely tiling, less that of their neighbours.

        None for frames of less than 32 pixels.
        """
        if min(reference.frames.shape[1:3]) < 32:
            return None
        right, wrong = (luminance(clip.frames) for clip in (reference, candidate))
        return max(_seam(right, wrong), _seam(right.swapaxes(1, 2), wrong.swapaxes(1, 2)))


_RUN = 8  # pixels of a border whose step has one sign
_MOST_FRAMES = 16  # looked at, for borders stay where they are
_MOVED = 0.1  # pixels by which the picture may be moved, so that its edges step too
_WIDE = 0.7  # of the steps two columns away
_UNSURE = 0.3  # of the scatter of steps, by how much their median may be off


def _seam(right: np.ndarray, wrong: np.ndarray) -> float:
    """The step across columns, of T H W."""
    own = np.diff(right, axis=2)
    steps = _runs(np.diff(wrong, axis=2) - own)
    came = np.median(steps, axis=-1)
    scatter = np.abs(steps - came[..., None]).mean(axis=-1)
    edge = np.pad(np.median(_runs(np.abs(own)), axis=-1), ((0, 0), (1, 1)))
    edge = np.max([edge[:, :-2], edge[:, 1:-1], edge[:, 2:]], axis=0)
    # What moved or is new steps over several columns, a border over one or, as a line, over two.
    far = np.abs(np.pad(came, ((0, 0), (2, 2))))
    beside = np.maximum(far[:, :-4], far[:, 4:])
    unsure = (_UNSURE * scatter) ** 2 + (_MOVED * edge) ** 2 + (_WIDE * beside) ** 2
    energy = np.maximum(came**2 - unsure, 0)
    # A border runs through the frame: it is as strong as in its weaker runs.
    profile = np.quantile(energy, 0.4, axis=0)
    padded = np.pad(profile, 3, mode="reflect")
    around = np.median([padded[k : k + len(profile)] for k in (0, 1, 2, 4, 5, 6)], axis=0)
    width = right.shape[2]
    best = 0.0
    for tile in range(8, width - 7):
        at = np.arange(tile - 1, width - 1, tile)
        best = max(best, float(np.mean(np.maximum(profile[at] - around[at], 0))))
    return float(np.sqrt(best))


def _runs(steps: np.ndarray) -> np.ndarray:
    """Steps T H W along runs of rows at any time: runs, W, steps."""
    every = -(-len(steps) // _MOST_FRAMES)
    n_runs, width = steps.shape[1] // _RUN, steps.shape[2]
    kept = steps[::every, : n_runs * _RUN].reshape(-1, n_runs, _RUN, width)
    return kept.transpose(1, 3, 0, 2).reshape(n_runs, width, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grain:
    """Fine texture in the places where the reference is smooth."""

    name: str = "grain"
    meaning: str = "smooth places have more or less grain, as when denoising ends early"
    unit: str = "levels of 255"
    tolerance: float = 2.0
    alarm: float | None = 10.0

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """Deviation from the local mean that came (less than 0: went), where it is least."""
        right, wrong = (_roughness(clip.frames) for clip in (reference, candidate))
        return float(np.sign(wrong - right) * np.sqrt(abs(wrong - right)))


def _roughness(frames: np.ndarray) -> float:
    """Mean square, in levels, at the smooth end of places of 8 x 8 pixels."""
    grey = block_means(luminance(frames), 2)
    fine = grey[:, 1:-1, 1:-1] - 0.25 * (
        grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    )
    power = block_means(fine**2, 4)
    return float(np.quantile(power, 0.25))


BLUR = Blur()
FLICKER = Flicker()
LOCAL_FLICKER = LocalFlicker()
SEAMS = Seams()
GRAIN = Grain()
