"""scale.json as a Markdown table and as a picture: time and memory against parameters, log-log."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from markdown_table import markdown_table
from svg import COLOURS, axis, line, opening, text

__all__ = ["write_markdown", "write_svg"]

Row = Mapping[str, Any]
_GB = 1e9
_COLUMNS = {
    "model": lambda row: row["model"],
    "recipe": lambda row: f"`{row['recipe']}`",
    "parameters": lambda row: f"{row['params'] / 1e6:,.0f} M",
    "time (s)": lambda row: f"{row['seconds']:.1f}",
    "processor (s)": lambda row: f"{row['cpu_seconds']:.1f}",
    "floor (s)": lambda row: f"{row['floor_seconds']:.1f}",
    "time / floor": lambda row: f"{row['seconds'] / row['floor_seconds']:.1f}",
    "peak memory (GB)": lambda row: f"{row['peak_rss_bytes'] / _GB:.2f}",
    "of it anonymous (GB)": lambda row: f"{row['peak_anonymous_bytes'] / _GB:.2f}",
    "read (GB)": lambda row: f"{row['bytes_read'] / _GB:.2f}",
    "written (GB)": lambda row: f"{row['bytes_written'] / _GB:.2f}",
    "artifact (GB)": lambda row: f"{row['artifact_bytes'] / _GB:.2f}",
    "predicted (s)": lambda row: f"{row['predicted']['seconds']:.1f}",
    "predicted (GB)": lambda row: f"{row['predicted']['peak_rss_bytes'] / _GB:.2f}",
}
_PANEL, _HEIGHT, _LEFT, _TOP, _BOTTOM, _KEY = 420, 420, 70, 40, 60, 230
_SERIES = 'fill="none" stroke-width="2"'


def write_markdown(path: Path, rows: Sequence[Row]) -> None:
    """A line for each run; one that failed says why instead."""
    done = [row for row in rows if "error" not in row]
    lines = markdown_table(
        list(_COLUMNS), ([_cell(m, row) for m in _COLUMNS.values()] for row in done)
    )
    failed = [(r["model"], f"`{r['recipe']}`", str(r["error"])) for r in rows if "error" in r]
    if failed:
        lines += [
            "",
            *markdown_table(("model", "recipe", "did not end because"), failed, n_words=3),
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(make: Callable[[Row], str], row: Row) -> str:
    """Empty where the row does not know."""
    try:
        return make(row)
    except (KeyError, TypeError):
        return ""


def write_svg(path: Path, rows: Sequence[Row]) -> None:
    """Two panels, a colour for each recipe: what was measured, and dashed what is the least.

    The least memory is no law but a mark: the parameters themselves in 16 bit. A run that failed is
    in neither panel. Without any row there is nothing to draw, and no file.
    """
    done = sorted((r for r in rows if "error" not in r), key=lambda r: r["params"])
    if not done:
        return
    width = 2 * (_LEFT + _PANEL) + _KEY
    recipes = list(dict.fromkeys(row["recipe"] for row in done))
    colour = {recipe: COLOURS[i % len(COLOURS)] for i, recipe in enumerate(recipes)}
    parts = opening(width, _HEIGHT)
    panels: tuple[tuple[str, Callable[[Row], float], Callable[[Row], float | None]], ...] = (
        ("time, s", lambda row: row["seconds"], lambda row: row["floor_seconds"]),
        ("peak memory, GB", _memory, lambda row: 2 * row["params"] / _GB),
    )
    for i, (title, measured, least) in enumerate(panels):
        left = _LEFT + i * (_LEFT + _PANEL)
        parts += _panel(left, title, done, colour, measured, least)
    for i, (name, look) in enumerate(
        [(one, f'stroke="{colour[one]}" stroke-width="2"') for one in recipes]
        + [("floor; parameters in 16 bit", 'stroke="#888" stroke-dasharray="5 4"')]
    ):
        x, y = width - _KEY + 25, _TOP + 20 * i + 10
        parts += [line(x, y, x + 24, y, look=look), text(x + 30, y + 4, name, "start")]
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _memory(row: Row) -> float:
    return float(row["peak_rss_bytes"] / _GB)


def _panel(
    left: float,
    title: str,
    rows: Sequence[Row],
    colour: Mapping[str, str],
    measured: Callable[[Row], float],
    least: Callable[[Row], float | None],
) -> list[str]:
    values = [v for row in rows for v in (measured(row), least(row)) if v]
    params = [math.log10(row["params"]) for row in rows]
    low, high = math.log10(min(values)), math.log10(max(values))
    x_of = axis(min(params), max(params), left, left + _PANEL)
    y_of = axis(low, high, _HEIGHT - _BOTTOM, _TOP)
    parts = [text(left, _TOP - 14, title, "start")]
    for value in _ticks(low, high):
        y = y_of(math.log10(value))
        parts += [line(left, y, left + _PANEL, y), text(left - 8, y + 4, f"{value:g}", "end")]
    for name, value in sorted({(row["model"], row["params"]) for row in rows}):
        x = x_of(math.log10(value))
        parts += [
            line(x, _TOP, x, _HEIGHT - _BOTTOM),
            text(x, _HEIGHT - _BOTTOM + 18, str(name), "middle"),
        ]
    parts.append(text(left + _PANEL / 2, _HEIGHT - 15, "parameters", "middle"))
    for recipe, stroke in colour.items():
        own = [row for row in rows if row["recipe"] == recipe]
        for values_of, look in ((measured, ""), (least, ' stroke-dasharray="5 4"')):
            known = [(row["params"], number) for row in own if (number := values_of(row))]
            points = [(x_of(math.log10(n)), y_of(math.log10(number))) for n, number in known]
            way = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline points="{way}" {_SERIES} stroke="{stroke}"{look}/>')
            for (x, y), (_, number) in zip(points, known, strict=True):
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{stroke}">')
                parts.append(f"<title>{escape(recipe)}: {number:.4g}</title></circle>")
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every decade between two logarithms."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    found = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    return [value for value in found if low - 0.02 <= math.log10(value) <= high + 0.02]
