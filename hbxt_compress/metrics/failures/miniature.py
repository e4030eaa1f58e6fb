"""Clips made small, and squared distances between the frames of two: what motion is told from.

Legend: T frames, N values of a small frame. A mean over blocks keeps what moves and averages out
grain; with all distances at hand any order or speed is tried without another look at the frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

__all__ = ["Timeline", "block_means", "luminance", "miniature"]

_SIDE = 32  # pixels of a miniature's shorter side, at least
_LUMA = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)


def luminance(frames: np.ndarray) -> np.ndarray:
    """Rec. 709 luma of uint8 frames T H W 3: float32 T H W, 0..255."""
    return np.asarray(frames @ _LUMA)


def block_means(frames: np.ndarray, step: int) -> np.ndarray:
    """Means over blocks of step x step pixels of T H W ...; float32, what does not fill one is cut.

    A step longer than a side takes that side whole.
    """
    down, across = min(step, frames.shape[1]), min(step, frames.shape[2])
    n_rows, n_columns = frames.shape[1] // down, frames.shape[2] // across
    kept = frames[:, : n_rows * down, : n_columns * across]
    wide = np.uint16 if frames.dtype == np.uint8 and down <= 257 else np.float32
    rows: np.ndarray = kept[:, ::down].astype(wide)
    for k in range(1, down):
        rows = rows + kept[:, k::down]
    blocks: np.ndarray = rows[:, :, ::across].astype(np.float32)
    for k in range(1, across):
        blocks = blocks + rows[:, :, k::across]
    return np.asarray(blocks / np.float32(down * across))


def miniature(frames: np.ndarray) -> np.ndarray:
    """uint8 T H W 3 as float32 T N: block means, 32 to 63 on the shorter side, 0..255."""
    small = block_means(frames, max(1, min(frames.shape[1:3]) // _SIDE))
    return small.reshape(len(small), -1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Timeline:
    """Mean squared differences of small frames, levels squared, float64 T T.

    across[t, u]: the candidate's frame t against the reference's u. reference[t, u] and
    candidate[t, u]: within one side.
    """

    across: np.ndarray
    reference: np.ndarray
    candidate: np.ndarray

    @classmethod
    def of(cls, reference: np.ndarray, candidate: np.ndarray) -> Self:
        """The timeline of two clips' frames, uint8 T H W 3 of one shape."""
        a, b = (miniature(side).astype(np.float64) for side in (reference, candidate))
        middle = a.mean(axis=0)  # small numbers lose nothing where squares are subtracted
        a, b = a - middle, b - middle
        return cls(across=_between(b, a), reference=_between(a, a), candidate=_between(b, b))

    def __len__(self) -> int:
        return len(self.across)

    def at(self, times: np.ndarray) -> np.ndarray:
        """Differences to the reference blended at other times: float64 of times' shape S T.

        times[s, t] in 0..T-1 is what the candidate's frame t may show.
        """
        t = np.arange(len(self))
        low = np.minimum(times.astype(int), len(self) - 2)
        part = times - low
        ends = (1 - part) * self.across[t, low] + part * self.across[t, low + 1]
        return ends - part * (1 - part) * self.reference[low, low + 1]

    @property
    def steps(self) -> np.ndarray:
        """Squared change from each of the reference's frames to the next, float64 T-1."""
        return self.reference.diagonal(1)


def _between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squares = [np.einsum("tn,tn->t", one, one) for one in (a, b)]
    return np.maximum(squares[0][:, None] + squares[1] - 2 * (a @ b.T), 0) / a.shape[1]
