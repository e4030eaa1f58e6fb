"""Failures of values: nothing there, all one colour, other levels, channels or signs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from types import MappingProxyType
from typing import Self

import numpy as np

from hbxt_compress.clips import Clip
from hbxt_compress.metrics.failures.miniature import block_means, luminance

__all__ = [
    "BLACK",
    "BLUE_SHIFT",
    "CONSTANT",
    "CONTRAST",
    "GREEN_SHIFT",
    "INVERTED",
    "NON_FINITE",
    "RED_SHIFT",
    "SATURATION",
    "SWAPPED_CHANNELS",
    "UINT8_WRAP",
    "Black",
    "ColourShift",
    "Constant",
    "Contrast",
    "NonFinite",
    "Remapped",
    "Saturation",
    "Uint8Wrap",
]

_WRAP = 180  # levels between light and what an overflow leaves: what is nearer was no overflow
_SAME = 8.0  # levels squared that a map changes
_LEAST = 3.0  # levels of contrast or colour, of which a share can be told
_BLOCK = 4  # pixels; means over blocks are what noise leaves alone
# Levels of 255: the mean of a frame that is called black and of one that surely is not, and the
# same of the spread of its blocks, for one colour.
_DARK, _LIT = 6.0, 12.0
_FLAT, _DRAWN = 6.5, 12.0


@dataclass(frozen=True, slots=True)
class _Blocks:
    """What the blocks of each frame are like, float64 T: their mean and spread, in levels."""

    mean: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, clip: Clip) -> Self:
        small = block_means(clip.frames, _BLOCK)
        return cls(small.mean(axis=(1, 2, 3)), small.std(axis=(1, 2)).max(axis=-1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Black:
    """Frames without light where the reference has some."""

    name: str = "black"
    meaning: str = "frames are black"
    unit: str = "% of frames"
    tolerance: float = 2.0
    alarm: float | None = 5.0

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """Percent of the reference's lit frames, 0..100; None where none is."""
        right, wrong = _Blocks.of(reference), _Blocks.of(candidate)
        lit = (right.mean >= _LIT) | (right.spread >= _DRAWN)
        black = (wrong.mean <= _DARK) & (wrong.spread <= _FLAT)
        return float(100 * black[lit].mean()) if lit.any() else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """Frames of one flat colour, black included, where the reference shows something."""

    name: str = "constant"
    meaning: str = "frames show one flat colour"
    unit: str = "% of frames"
    tolerance: float = 2.0
    alarm: float | None = 5.0

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """Percent of the reference's frames that show something, 0..100; None where none does."""
        right, wrong = _Blocks.of(reference).spread, _Blocks.of(candidate).spread
        drawn = right >= _DRAWN
        return float(100 * (wrong[drawn] <= _FLAT).mean()) if drawn.any() else None


@dataclass(frozen=True, slots=True, kw_only=True)
class NonFinite:
    """Latents that are NaN or infinite; frames are 8 bit and cannot be."""

    name: str = "non_finite"
    meaning: str = "latents are not finite numbers"
    unit: str = "% of values"
    tolerance: float = 0.0
    alarm: float | None = 0.0

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """Percent of latents, the candidate's less the reference's; None without latents."""
        if candidate.latents is None:
            return None
        right = candidate.latents[:0] if reference.latents is None else reference.latents
        wrong, own = (1 - np.isfinite(one).mean() if one.size else 0.0
                      for one in (candidate.latents, right))  # fmt: skip
        return float(100 * (wrong - own))


@dataclass(frozen=True, slots=True, kw_only=True)
class ColourShift:
    """The mean level of one channel, where the reference is far enough from both ends to move."""

    name: str
    channel: int
    meaning: str
    unit: str = "levels of 255"
    tolerance: float = 2.0
    alarm: float | None = 20.0

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """How many levels brighter; None where 99 % of the reference is near 0 or 255."""
        right, wrong = (clip.frames[..., self.channel] for clip in (reference, candidate))
        free = (right >= 6) & (right <= 249)
        n_free = np.count_nonzero(free)
        if n_free < 0.01 * right.size:
            return None
        both = (np.sum(side, where=free, dtype=np.int64) for side in (wrong, right))
        return float((next(both) - next(both)) / n_free)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """The spread of brightness over a frame."""

    name: str = "contrast"
    meaning: str = "contrast differs from the reference's"
    unit: str = "%"
    tolerance: float = 5.0
    alarm: float | None = 50.0

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """100 * (standard deviation / reference's - 1); None for a reference of one brightness."""
        right, wrong = (
            float(np.mean(luminance(block_means(clip.frames, _BLOCK)).std(axis=(1, 2))))
            for clip in (reference, candidate)
        )
        return 100 * (wrong / right - 1) if right >= _LEAST else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Saturation:
    """How far colours are from grey."""

    name: str = "saturation"
    meaning: str = "colours are paler or stronger than the reference's"
    unit: str = "%"
    tolerance: float = 8.0
    alarm: float | None = 60.0

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """100 * (distance from grey / reference's - 1); None for a grey reference."""
        right, wrong = (self._colour(clip) for clip in (reference, candidate))
        return 100 * (wrong / right - 1) if right >= _LEAST else None

    def _colour(self, clip: Clip) -> float:
        small = block_means(clip.frames, _BLOCK)
        away = small - small.mean(axis=-1, keepdims=True)
        return float(np.sqrt(np.mean(away**2)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Remapped:
    """How far values went from their own channels' to those of one of some maps.

    maps: name -> (order of the channels, sign); sign -1 is 255 - value.
    """

    name: str
    meaning: str
    maps: Mapping[str, tuple[tuple[int, int, int], int]]
    unit: str = "% of the way"
    tolerance: float = 15.0
    alarm: float | None = 60.0

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """Percent; 0 where the reference itself is nearer, 100 the map and no other error.

        None where every map leaves the reference nearly as it is.
        """
        right, wrong = (block_means(clip.frames, _BLOCK) for clip in (reference, candidate))
        error = float(np.mean((wrong - right) ** 2))
        told, nearest, signal = False, error, 0.0
        for order, sign in self.maps.values():
            mapped = right[..., order] if sign > 0 else 255 - right[..., order]
            size = float(np.mean((mapped - right) ** 2))
            left = float(np.mean((wrong - mapped) ** 2))
            told |= size > _SAME
            if size > _SAME and left < nearest:
                nearest, signal = left, 50 * ((error - left) / size + 1)
        return signal if told else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Uint8Wrap:
    """Small dark spots in bright places, or the reverse, where 256 off is near the reference."""

    name: str = "uint8_wrap"
    meaning: str = "values overflowed from white to black or back"
    unit: str = "% of values"
    tolerance: float = 0.005
    alarm: float | None = 0.008

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """Percent of values, 0..100."""
        dark = _overflowed(reference.frames, candidate.frames)
        bright = _overflowed(~reference.frames, ~candidate.frames)
        return float(100 * np.mean(dark | bright))


def _overflowed(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Bool T H W 3: dark spots that lie in light, where the reference is light."""
    spots = (right > _WRAP) & (wrong < right - _WRAP)
    return np.asarray(spots & (_closed(wrong) > _WRAP)) if spots.any() else spots


def _closed(frames: np.ndarray) -> np.ndarray:
    """Frames T H W 3 with narrow dark spots filled: of less than 7 pixels, or a tenth of a side."""
    reach = max(3, min(frames.shape[1:3]) // 20)
    return ~_widest(~_widest(frames, reach), reach)


def _widest(frames: np.ndarray, reach: int) -> np.ndarray:
    """The greatest value within `reach` pixels of each, along rows and columns."""
    for axis in (1, 2):
        width = [(0, 0)] * 4
        width[axis] = (reach, reach)
        found = np.moveaxis(np.pad(frames, width, mode="edge"), axis, 0)
        n_seen = 1  # pixels in a row that each value has seen
        while n_seen < 2 * reach + 1:
            by = min(n_seen, 2 * reach + 1 - n_seen)
            found = np.maximum(found[:-by], found[by:])
            n_seen += by
        frames = np.moveaxis(found, 0, axis)
    return frames


BLACK = Black()
CONSTANT = Constant()
NON_FINITE = NonFinite()
RED_SHIFT = ColourShift(name="red_shift", channel=0, meaning="red is brighter or darker")
GREEN_SHIFT = ColourShift(name="green_shift", channel=1, meaning="green is brighter or darker")
BLUE_SHIFT = ColourShift(name="blue_shift", channel=2, meaning="blue is brighter or darker")
CONTRAST = Contrast()
SATURATION = Saturation()
_ORDERS = {f"{'RGB'[r]}{'RGB'[g]}{'RGB'[b]}": ((r, g, b), 1) for r, g, b in permutations(range(3))}
SWAPPED_CHANNELS = Remapped(
    name="swapped_channels",
    meaning="colour channels are swapped",
    maps=MappingProxyType({name: one for name, one in _ORDERS.items() if name != "RGB"}),
)
INVERTED = Remapped(
    name="inverted",
    meaning="colours are inverted",
    maps=MappingProxyType({"255 - RGB": ((0, 1, 2), -1)}),
)
UINT8_WRAP = Uint8Wrap()
