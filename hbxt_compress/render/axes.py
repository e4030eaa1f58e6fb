"""Axes: round ticks, and the tag that opens a chart. Shared by all charts of the pages."""

from __future__ import annotations

import math
from html import escape

__all__ = ["log_ticks", "opening", "round_ticks"]

_MOST = 4  # ticks beside each other on a narrow page


def opening(width: int, height: int, label: str, kind: str = "chart") -> str:
    """The opening tag of a chart that a screen reader reads as one picture named `label`."""
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}">'
    )


def round_ticks(low: float, high: float) -> list[float]:
    """About five round numbers that cover low..high."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [k * step for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Up to 4 round numbers within 10^low..10^high; the ends where no round one lies within."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    for mantissas in ((1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**k for k in decades for m in mantissas]
        found = [one for one in found if low <= math.log10(one) <= high]
        if len(found) <= _MOST:
            break
    else:
        found = found[:: math.ceil(len(found) / _MOST)]
    return found if len(found) > 1 else [10**low, 10**high]
