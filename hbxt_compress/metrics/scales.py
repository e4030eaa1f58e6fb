"""Scales: a metric's value as damage, so that differences of it mean the same everywhere.

Errors are compared in decibels: that 0.002 became 0.004 says as much as that 0.02 became 0.04, and
clips that part ways do not drown the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

__all__ = ["AMPLITUDE", "DECIBEL", "JOD", "POINTS", "POWER", "SHARE", "SIMILARITY", "Scale"]

_LEAST = 1e-10  # power that counts as none: 100 dB, which is where PSNR ends, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """damage: of a metric's values, more is worse. margin: by how much a mean may grow unnoticed.

    unit: of both.
    """

    damage: Callable[[np.ndarray], np.ndarray]
    margin: float
    unit: str


def _db(power: np.ndarray) -> np.ndarray:
    return 10 * np.log10(np.maximum(power, _LEAST))


DECIBEL: Final = Scale(damage=lambda x: -x, margin=1.0, unit="dB")
"""values that are decibels already, higher is better: PSNR"""
POWER: Final = Scale(damage=_db, margin=1.0, unit="dB")
"""squared distances, as LPIPS is one"""
AMPLITUDE: Final = Scale(damage=lambda x: _db(np.square(x)), margin=1.0, unit="dB")
"""absolute distances"""
SIMILARITY: Final = Scale(damage=lambda x: _db(1 - x), margin=1.0, unit="dB")
"""1 for identical, falling with the squared distance: SSIM"""
POINTS: Final = Scale(damage=lambda x: -x, margin=2.0, unit="points")
"""scores of 0..100, higher is better: VMAF"""
JOD: Final = Scale(damage=lambda x: -x, margin=0.25, unit="JOD")
"""just-objectionable differences, 10 for none; at 1 three of four people prefer the better one"""
SHARE: Final = Scale(damage=lambda x: -x, margin=0.03, unit="")
"""shares of what is right, 0..1"""
