"""Charts as inline SVG text that takes its colours from the page's CSS, so dark mode just works."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from hbxt_compress.render.axes import opening, round_ticks

__all__ = ["bar_chart", "line_chart", "spark"]

_WIDTH, _HEIGHT = 400, 200  # narrow, so that text is still read where the page is 320 px wide
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 10, 34
_SPARK = (240, 76, 54, 6, 6, 16)  # width, height and margins: left, right, top, bottom


def line_chart(
    values: Sequence[float],
    *,
    x_label: str,
    y_label: str,
    band: tuple[Sequence[float], Sequence[float]] | None = None,
    first: int = 1,
) -> str:
    """A line through values at first, first + 1, ..., its y axis from the data (or 0 if near).

    band: lower and upper values, as many, drawn as an area behind the line.
    """
    low = min(values) if band is None else min(*values, *band[0])
    high = max(values) if band is None else max(*values, *band[1])
    if low >= 0 and low < 0.5 * high:
        low = 0.0
    ticks = round_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    span = (high - low) or 1.0
    inner_w, inner_h = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(i: int) -> float:
        return _LEFT + inner_w * (i / (len(values) - 1) if len(values) > 1 else 0.5)

    def y(value: float) -> float:
        return _TOP + inner_h * (1 - (value - low) / span)

    parts = [opening(_WIDTH, _HEIGHT, f"{y_label} by {x_label}, {_range(values)}")]
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
        parts.append(
            f'<text x="{x(i):.1f}" y="{_HEIGHT - 20}" text-anchor="middle">{i + first}</text>'
        )
    if band is not None:
        edge = [f"{x(i):.1f},{y(value):.1f}" for i, value in enumerate(band[0])]
        edge += [f"{x(i):.1f},{y(value):.1f}" for i, value in enumerate(band[1])][::-1]
        parts.append(f'<polygon class="band" points="{" ".join(edge)}"/>')
    points = " ".join(f"{x(i):.1f},{y(value):.1f}" for i, value in enumerate(values))
    parts.append(f'<polyline class="line" points="{points}"/>')
    for i, value in enumerate(values):
        label = f"{escape(x_label)} {i + first}: {value:.4g}"
        parts.append(
            f'<circle class="dot" cx="{x(i):.1f}" cy="{y(value):.1f}" r="2.5">'
            f"<title>{label}</title></circle>"
        )
    middle = _LEFT + inner_w / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">'
        f"{escape(x_label)}</text></svg>"
    )
    return "".join(parts)


def spark(values: Sequence[float], *, label: str, x_label: str, cursor: bool = False) -> str:
    """A small line of one clip, labelled at both ends of both axes.

    cursor: with a line at the first value that a script may move; data-span is how far to the
    last one, data-values what to tell at each.
    """
    width, height, left, right, top, bottom = _SPARK
    inner_w, inner_h = width - left - right, height - top - bottom
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    most = max(1, len(values) - 1)
    points = [
        f"{left + inner_w * i / most:.1f},{top + inner_h * (1 - (value - low) / span):.1f}"
        for i, value in enumerate(values)
    ]
    tag = opening(width, height, f"{label}, {_range(values)}", "spark")
    if cursor:
        told = " ".join(f"{value:.4g}" for value in values)
        tag = f'{tag[:-1]} data-span="{inner_w}" data-values="{told}">'
    parts = [
        tag,
        f'<line class="grid" x1="{left}" x2="{width - right}" y1="{top}" y2="{top}"/>',
        f'<line class="grid" x1="{left}" x2="{width - right}" '
        f'y1="{top + inner_h}" y2="{top + inner_h}"/>',
        f'<text x="{left - 4}" y="{top + 6}" text-anchor="end">{high:.3g}</text>',
        f'<text x="{left - 4}" y="{top + inner_h + 3}" text-anchor="end">{low:.3g}</text>',
        f'<text x="{left}" y="{height - 3}">1</text>',
        f'<text x="{left + inner_w / 2}" y="{height - 3}" text-anchor="middle">'
        f"{escape(x_label)}</text>",
        f'<text x="{width - right}" y="{height - 3}" text-anchor="end">{len(values)}</text>',
        f'<polyline class="line" points="{" ".join(points)}"/>',
    ]
    if len(values) == 1:
        parts.append(f'<circle class="dot" cx="{left}" cy="{top + inner_h}" r="2.5"/>')
    if cursor:
        parts.append(
            f'<line class="cursor" x1="{left}" x2="{left}" y1="{top}" y2="{top + inner_h}"/>'
        )
    return "".join(parts) + "</svg>"


def bar_chart(rows: Sequence[tuple[str, Mapping[str, float], str]]) -> str:
    """Horizontal bars, each under its name; a row is (name, value by series class, text).

    The class names one of the page's colours; all bars share one scale from 0.
    """
    most = max((value for _, series, _ in rows for value in series.values()), default=0) or 1.0
    thick, gap, line = 11, 10, 15
    y, parts = 0.0, []
    for name, series, text in rows:
        shown = name if len(name) <= 40 else f"{name[:18]}...{name[-19:]}"
        y += line
        parts.append(f'<text class="name" x="0" y="{y - 4:.1f}">{escape(shown)}</text>')
        parts.append(f'<text x="{_WIDTH}" y="{y - 4:.1f}" text-anchor="end">{escape(text)}</text>')
        for kind, value in series.items():
            width = max(1.0, _WIDTH * value / most)
            parts.append(
                f'<rect class="{escape(kind)}" x="0" y="{y:.1f}" '
                f'width="{width:.1f}" height="{thick - 1}">'
                f"<title>{escape(name)}: {escape(text)}</title></rect>"
            )
            y += thick
        y += gap
    label = "; ".join(f"{name} {text}" for name, _, text in rows[:20]) or "no bars"
    return opening(_WIDTH, max(1, math.ceil(y)), label) + "".join(parts) + "</svg>"


def _range(values: Sequence[float]) -> str:
    return f"from {values[0]:.4g} to {values[-1]:.4g}"
