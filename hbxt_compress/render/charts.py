"""Charts as inline SVG text that takes its colours from the page's CSS, so dark mode just works."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["bar_chart", "line_chart"]

_WIDTH, _HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 36


def line_chart(values: Sequence[float], *, x_label: str, y_label: str) -> str:
    """A line through values at 1, 2, ..., its y axis from the data (or 0, where that is near)."""
    low, high = min(values), max(values)
    if low >= 0 and low < 0.5 * high:
        low = 0.0
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    span = (high - low) or 1.0
    inner_w, inner_h = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(i: int) -> float:
        return _LEFT + inner_w * (i / (len(values) - 1) if len(values) > 1 else 0.5)

    def y(value: float) -> float:
        return _TOP + inner_h * (1 - (value - low) / span)

    parts = [_open(_WIDTH, _HEIGHT, f"{y_label} by {x_label}, {_range(values)}")]
    for tick in ticks:
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" '
            f'y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        )
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
        )
    every = max(1, math.ceil(len(values) / 12))
    for i in range(0, len(values), every):
        parts.append(f'<text x="{x(i):.1f}" y="{_HEIGHT - 20}" text-anchor="middle">{i + 1}</text>')
    points = " ".join(f"{x(i):.1f},{y(value):.1f}" for i, value in enumerate(values))
    parts.append(f'<polyline class="line" points="{points}"/>')
    for i, value in enumerate(values):
        label = f"{escape(x_label)} {i + 1}: {value:.4g}"
        parts.append(
            f'<circle class="dot" cx="{x(i):.1f}" cy="{y(value):.1f}" r="3">'
            f"<title>{label}</title></circle>"
        )
    middle = _LEFT + inner_w / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">'
        f"{escape(x_label)}</text></svg>"
    )
    return "".join(parts)


def bar_chart(rows: Sequence[tuple[str, Mapping[str, float], str]]) -> str:
    """Horizontal bars; a row is (name, value by series class, text after the bars).

    The class names one of the page's colours; all bars share one scale from 0.
    """
    most = max((value for _, series, _ in rows for value in series.values()), default=0) or 1.0
    name_w, text_w, thick, gap = 250, 150, 11, 7
    inner = _WIDTH + 160 - name_w - text_w
    y, parts = 4.0, []
    for name, series, text in rows:
        tall = thick * len(series)
        middle = y + tall / 2 + 4
        shown = name if len(name) <= 40 else f"{name[:18]}...{name[-19:]}"
        parts.append(
            f'<text x="{name_w - 8}" y="{middle:.1f}" text-anchor="end">{escape(shown)}</text>'
        )
        for kind, value in series.items():
            width = max(1.0, inner * value / most)
            parts.append(
                f'<rect class="{escape(kind)}" x="{name_w}" y="{y:.1f}" '
                f'width="{width:.1f}" height="{thick - 1}">'
                f"<title>{escape(name)}: {escape(text)}</title></rect>"
            )
            y += thick
        parts.append(f'<text x="{name_w + inner + 8}" y="{middle:.1f}">{escape(text)}</text>')
        y += gap
    return (
        _open(_WIDTH + 160, math.ceil(y), f"bars of {len(rows)} rows") + "".join(parts) + "</svg>"
    )


def _open(width: int, height: int, label: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'


def _range(values: Sequence[float]) -> str:
    return f"from {values[0]:.4g} to {values[-1]:.4g}"


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that cover low..high."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [k * step for k in range(first, last + 1)]
