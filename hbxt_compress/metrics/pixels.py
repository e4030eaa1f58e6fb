"""Pair metrics computed from pixels alone: fidelity, and two-sided measures of motion.

Frames are uint8; nothing is resized. A pair metric takes a reference and a candidate clip of the
same shape and gives one number for the clip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from hbxt_compress.clips import Clip
from hbxt_compress.metrics.scales import AMPLITUDE, DECIBEL, SIMILARITY, Scale
from hbxt_compress.metrics.weights import Unavailable, WeightFiles

__all__ = [
    "FLICKER",
    "MOTION_RATIO",
    "PSNR",
    "PSNR_CAP_DB",
    "SSIM",
    "TEMPORAL_ERROR",
    "PlainMetric",
    "psnr",
    "ssim",
]

PSNR_CAP_DB = 100.0
_TAPS, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03


def psnr(a: np.ndarray, b: np.ndarray, peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio of two arrays in dB, at most 100 (identical arrays)."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    if error == 0:
        return PSNR_CAP_DB
    return float(min(PSNR_CAP_DB, 10 * np.log10(peak**2 / error)))


def ssim(a: np.ndarray, b: np.ndarray, peak: float = 255.0) -> float:
    """Mean structural similarity of two stacks of images N H W C, in [-1, 1].

    11x11 Gaussian window of sigma 1.5, K1 0.01, K2 0.03, valid windows only, float64, no
    downsampling, mean over windows, channels and images.
    """
    height, width = a.shape[1:3]
    if min(height, width) < _TAPS:
        raise Unavailable(
            f"frames of {height}x{width} pixels are too small, it needs {_TAPS}x{_TAPS}"
        )
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * peak) ** 2, (_K2 * peak) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def _blur(x: np.ndarray) -> np.ndarray:
    """x N H W C under the Gaussian window, valid windows only: N H-10 W-10 C."""
    offsets = np.arange(_TAPS) - _TAPS // 2
    window = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    window /= window.sum()
    n_rows, n_columns = x.shape[1] - _TAPS + 1, x.shape[2] - _TAPS + 1
    rows = sum(weight * x[:, k : k + n_rows] for k, weight in enumerate(window))
    return sum(weight * rows[:, :, k : k + n_columns] for k, weight in enumerate(window))


def _change(clip: Clip) -> np.ndarray:
    """Differences of consecutive frames in [-1, 1], T-1 H W 3."""
    return np.asarray(np.diff(clip.frames.astype(np.float64), axis=0) / 255)


def _temporal_error(reference: Clip, candidate: Clip) -> float:
    """Mean |dF_candidate - dF_reference|, dF = next frame - frame."""
    return float(np.abs(_change(candidate) - _change(reference)).mean())


def _motion_ratio(reference: Clip, candidate: Clip) -> float:
    """|log2| of the mean frame-to-frame change, candidate over reference: 1 is half or double.

    Two-sided, for a frozen clip wins every one-sided measure of smoothness. A floor of a tenth of
    an 8-bit step keeps still clips finite.
    """
    floor = 0.1 / 255
    moved = np.abs(_change(candidate)).mean() + floor
    return float(abs(np.log2(moved / (np.abs(_change(reference)).mean() + floor))))


def _flicker(reference: Clip, candidate: Clip) -> float:
    """|difference| of the mean absolute second difference in time, which smooth motion lacks."""
    first, second = (np.abs(np.diff(_change(c), axis=0)).mean() for c in (reference, candidate))
    return float(abs(second - first))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainMetric:
    """A pair metric that needs no weights; `compare` gives one number for a pair of clips."""

    name: str
    unit: str
    direction: Literal["lower", "higher"]
    compare: Callable[[Clip, Clip], float]
    family: Literal["fidelity", "distribution", "health"] = "fidelity"
    least_n: int = 8
    scale: Scale | None = None
    extractor: str | None = None
    extractor_sha256: str | None = None

    def load(self, files: WeightFiles) -> Self:
        """Itself: there is nothing to load."""
        return self


PSNR = PlainMetric(
    name="psnr",
    unit="dB",
    direction="higher",
    compare=lambda reference, candidate: psnr(reference.frames, candidate.frames),
    scale=DECIBEL,
)
SSIM = PlainMetric(
    name="ssim",
    unit="",
    direction="higher",
    compare=lambda reference, candidate: ssim(reference.frames, candidate.frames),
    scale=SIMILARITY,
)
TEMPORAL_ERROR = PlainMetric(
    name="temporal_error",
    unit="",
    direction="lower",
    compare=_temporal_error,
    scale=AMPLITUDE,
)
MOTION_RATIO = PlainMetric(
    name="motion_ratio", unit="octaves", direction="lower", compare=_motion_ratio, family="health"
)
FLICKER = PlainMetric(name="flicker", unit="", direction="lower", compare=_flicker, family="health")
