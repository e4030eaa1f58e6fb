"""The lines, words, axes and colours that the bench's pictures are drawn with."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

__all__ = ["COLOURS", "axis", "line", "opening", "text"]

COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf")


def opening(width: float, height: float) -> list[str]:
    """The first lines of a picture on white."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]


def axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Maps values to pixels: low near start, high near end, with a small margin."""
    margin = 0.04 * (high - low) or 1.0
    low, high = low - margin, high + margin
    return lambda value: start + (value - low) / (high - low) * (end - start)


def line(x1: float, y1: float, x2: float, y2: float, *, look: str = 'stroke="#ddd"') -> str:
    """look: SVG attributes; a thin grey grid line if not given."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {look}/>'


def text(x: float, y: float, words: str, anchor: str) -> str:
    """anchor: start, middle or end, as SVG says."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
