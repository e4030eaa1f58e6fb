"""Scatter: recipes by bytes and by damage; the nearer to the lower left corner the better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from hbxt_compress.render.axes import opening, round_ticks
from hbxt_compress.render.table import size

__all__ = ["Point", "scatter"]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 300, 56, 16, 14, 40
_LONGEST = 22  # letters of a label
_LINE = 13  # between labels that would lie on each other


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """x: bytes; y: damage; unbeaten points are filled and joined by a line."""

    name: str
    x: float
    y: float
    unbeaten: bool


def scatter(points: Sequence[Point], *, y_label: str) -> str:
    """An SVG with a labelled mark for every point; the names are escaped."""
    x_ticks = round_ticks(0.0, max(point.x for point in points) / 1e6)
    y_ticks = round_ticks(min(point.y for point in points), max(point.y for point in points))
    across, up = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(megabytes: float) -> float:
        return _LEFT + across * (megabytes - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    def y(value: float) -> float:
        return _TOP + up * (1 - (value - y_ticks[0]) / ((y_ticks[-1] - y_ticks[0]) or 1.0))

    told = "; ".join(f"{p.name}: {size(int(p.x))}, {p.y:.3g}" for p in points)
    parts = [opening(_WIDTH, _HEIGHT, f"{y_label} by bytes: {told}", "chart scatter")]
    for tick in x_ticks:
        at = f"{x(tick):.1f}"
        parts.append(
            f'<line class="grid" x1="{at}" x2="{at}" y1="{_TOP}" y2="{_TOP + up}"/>'
            f'<text x="{at}" y="{_TOP + up + 15}" text-anchor="middle">{tick:.4g}</text>'
        )
    for tick in y_ticks:
        at = f"{y(tick):.1f}"
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + across}" y1="{at}" y2="{at}"/>'
            f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
        )
    front = sorted((p.x, p.y) for p in points if p.unbeaten)
    if len(front) > 1:
        line = " ".join(f"{x(a / 1e6):.1f},{y(b):.1f}" for a, b in front)
        parts.append(f'<polyline class="front" points="{line}"/>')
    heights = _apart([(x(p.x / 1e6), y(p.y)) for p in points])
    for point, label_y in zip(points, heights, strict=True):
        at_x, at_y = x(point.x / 1e6), y(point.y)
        kind = "unbeaten" if point.unbeaten else "beaten"
        right = at_x < _LEFT + 0.66 * across
        anchor, label_x = ("start", at_x + 10) if right else ("end", at_x - 10)
        told = f"{point.name}: {size(int(point.x))}, {point.y:.3g}, {kind}"
        shape = (
            f'<circle class="{kind}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="5.5">'
            if point.unbeaten
            else f'<path class="{kind}" d="M-5-5 5 5M-5 5 5-5" '
            f'transform="translate({at_x:.1f} {at_y:.1f})">'
        )
        end = "</circle>" if point.unbeaten else "</path>"
        parts.append(f"{shape}<title>{escape(told)}</title>{end}")
        parts.append(
            f'<text class="name" x="{label_x:.1f}" y="{label_y + 4:.1f}" '
            f'text-anchor="{anchor}">{escape(_short(point.name))}</text>'
        )
    parts.append(
        f'<text x="{_LEFT + across / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">'
        "MB of weights (1 MB = 1,000,000 bytes)</text></svg>"
    )
    return "".join(parts)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def _apart(places: Sequence[tuple[float, float]]) -> list[float]:
    """Heights of the labels: those of their marks, moved down where two would overlap."""
    heights, taken = [0.0] * len(places), list[tuple[float, float]]()
    for i in sorted(range(len(places)), key=lambda i: places[i][1]):
        x, y = places[i]
        while near := [b for a, b in taken if abs(a - x) < 110 and abs(b - y) < _LINE]:
            y = max(near) + _LINE
        heights[i] = y
        taken.append((x, y))
    return heights
