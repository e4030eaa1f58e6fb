"""What a good candidate may differ by from its reference, and nobody sees."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import numpy as np
from scenes import bytes_of

from hbxt_compress.clips import read_video, write_mp4

__all__ = ["HONEST", "eight_bit", "four_bit", "gaussian_noise", "h264", "plus_minus_one"]


def plus_minus_one(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return bytes_of(frames + rng.integers(-1, 2, frames.shape))


def gaussian_noise(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return bytes_of(frames + rng.normal(0, 2, frames.shape))


def eight_bit(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return bytes_of(frames + _smooth(frames.shape, rng, 0.75))


def four_bit(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """35 dB: places moved by 0.3 pixels, the rest a smooth error that drifts."""
    flow = _smooth((*frames.shape[:3], 2), rng, 0.3)
    moved = frames.astype(np.float32)
    for axis in (1, 2):
        moved = _moved(moved, flow[..., axis - 1], axis)
    left = 255**2 / 10**3.5 - np.mean((moved - frames) ** 2)
    if left > 0:
        moved += _smooth(frames.shape, rng, float(np.sqrt(left)))
    return bytes_of(moved)


def _moved(frames: np.ndarray, by: np.ndarray, axis: int) -> np.ndarray:
    """T H W 3 read `by` (T H W, less than 2) pixels further along an axis; cubic, Catmull-Rom."""
    low = np.floor(by)
    part = (by - low)[..., None]
    width = [(0, 0)] * 4
    width[axis] = (3, 4)
    padded = np.pad(frames, width, mode="edge")
    n = frames.shape[axis]
    taps = [
        ((2 - part) * part - 1) * part / 2,
        ((3 * part - 5) * part**2 + 2) / 2,
        ((4 - 3 * part) * part + 1) * part / 2,
        (part - 1) * part**2 / 2,
    ]
    found = np.zeros_like(frames)
    for first in (-2, -1, 0, 1):
        here = (low == first)[..., None]
        for k, tap in enumerate(taps):
            start = 3 + first + k - 1
            found += here * tap * np.take(padded, range(start, start + n), axis=axis)
    return found


def h264(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Written as H.264 at crf 12 and read again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(path, frames, 8.0)
        return read_video(path)


HONEST: Final[Mapping[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]]] = {
    "plus_minus_one": plus_minus_one,
    "gaussian_noise": gaussian_noise,
    "eight_bit": eight_bit,
    "four_bit": four_bit,
    "h264": h264,
}


def _smooth(shape: tuple[int, ...], rng: np.random.Generator, rms: float) -> np.ndarray:
    """A float32 field T H W C of this root mean square that changes over 6 pixels and 3 frames."""
    t, h, w, c = shape
    kernels = [_spread(n, step) for n, step in ((t, 3), (h, 6), (w, 6))]
    small = rng.normal(size=(c, *(kernel.shape[1] for kernel in kernels))).astype(np.float32)
    rows = kernels[1] @ small @ kernels[2].T
    big = np.moveaxis(np.tensordot(kernels[0], rows, axes=(1, 1)), 1, -1)
    return np.asarray(big * np.float32(rms / np.sqrt(np.mean(big**2))))


def _spread(n: int, step: int) -> np.ndarray:
    """Weights n x m of knots `step` apart, Gaussian."""
    away = np.arange(n)[:, None] - step * np.arange(-1, n // step + 2)
    return np.exp(-0.5 * (away / (0.6 * step)) ** 2).astype(np.float32)
