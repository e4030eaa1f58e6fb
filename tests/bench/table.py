"""quality.json as a Markdown table and as a picture: bits a weight against velocity SQNR."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from markdown_table import markdown_table
from svg import COLOURS, axis, line, opening, text

__all__ = ["write_markdown", "write_svg"]

Row = Mapping[str, Any]
_COLUMNS = (
    ("tool", "tool"),
    ("method", "method"),
    ("bits_per_weight", "bits a weight"),
    ("velocity_sqnr_db", "velocity SQNR (dB)"),
    ("guided_velocity_sqnr_db", "guided (dB)"),
    ("psnr_db", "PSNR (dB)"),
    ("lpips", "LPIPS"),
    ("frechet", "Fréchet"),
    ("seconds", "time (s)"),
    ("peak_rss_bytes", "peak memory (MB)"),
)
_DIGITS = {"bits_per_weight": 3, "velocity_sqnr_db": 2, "guided_velocity_sqnr_db": 2, "psnr_db": 1,
           "lpips": 5, "frechet": 3, "seconds": 1, "peak_rss_bytes": 0}  # fmt: skip
_SMALL = 4.5  # bits; each tool's best method below is named
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 1000, 620, 70, 30, 190, 60


def write_markdown(path: Path, rows: Sequence[Row]) -> None:
    """Rows by bits a weight; a row that failed says why."""
    done = [row for row in rows if not row.get("error")]
    done.sort(key=lambda row: (row["bits_per_weight"], -row["velocity_sqnr_db"]))
    cells = ([_cell(row, key) for key, _ in _COLUMNS] for row in done)
    lines = markdown_table([title for _, title in _COLUMNS], cells)
    failed = [(r["tool"], r["method"], str(r["error"])) for r in rows if r.get("error")]
    if failed:
        lines += ["", *markdown_table(("tool", "method", "did not run because"), failed, n_words=3)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(row: Row, key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if key == "tool":
        return f"{value} {row['version']}"
    if key == "peak_rss_bytes":
        value = value / 1e6
    if key not in _DIGITS:
        return str(value)
    numbers = [f"{one:.{_DIGITS[key]}f}" for one in (value, *row.get(f"{key}_interval", ()))]
    return numbers[0] if len(numbers) == 1 else f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


def write_svg(path: Path, rows: Sequence[Row]) -> None:
    """One dot a method, one colour a tool, bits on a logarithmic axis."""
    points = [row for row in rows if not row.get("error")]
    tools = list(dict.fromkeys(row["tool"] for row in points))
    colour = {tool: COLOURS[i % len(COLOURS)] for i, tool in enumerate(tools)}
    bits = [math.log2(row["bits_per_weight"]) for row in points]
    sqnr = [row["velocity_sqnr_db"] for row in points]
    x_of = axis(min(bits), max(bits), _LEFT, _WIDTH - _RIGHT)
    y_of = axis(min(sqnr), max(sqnr), _HEIGHT - _BOTTOM, _TOP)
    parts = opening(_WIDTH, _HEIGHT)
    for tick in (4, 4.125, 4.25, 4.5, 5, 6, 7, 8, 9):
        if min(bits) - 0.02 <= math.log2(tick) <= max(bits) + 0.02:
            x = x_of(math.log2(tick))
            parts.append(line(x, _TOP, x, _HEIGHT - _BOTTOM))
            parts.append(text(x, _HEIGHT - _BOTTOM + 18, f"{tick:g}", "middle"))
    for db in range(math.ceil(min(sqnr)), math.floor(max(sqnr)) + 1):
        parts.append(line(_LEFT, y_of(db), _WIDTH - _RIGHT, y_of(db)))
        parts.append(text(_LEFT - 8, y_of(db) + 4, str(db), "end"))
    for row, x, y in zip(points, map(x_of, bits), map(y_of, sqnr), strict=True):
        about = escape(f"{row['tool']} {row['method']}: {row['velocity_sqnr_db']:.2f} dB")
        fill = colour[row["tool"]]
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" opacity="0.8">')
        parts.append(f"<title>{about}</title></circle>")
    for tool in tools:  # a picture in a page shows no titles
        own = [i for i, row in enumerate(points) if row["tool"] == tool]
        small = [i for i in own if points[i]["bits_per_weight"] < _SMALL] or own
        best = max(small, key=sqnr.__getitem__)
        where = x_of(bits[best]) + 9, y_of(sqnr[best]) + 4
        parts.append(text(*where, f"{tool} {points[best]['method']}", "start"))
    for i, tool in enumerate(tools):
        y = _TOP + 20 * i + 10
        parts.append(f'<circle cx="{_WIDTH - 170}" cy="{y}" r="5" fill="{colour[tool]}"/>')
        parts.append(text(_WIDTH - 158, y + 4, tool, "start"))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(text(middle, _HEIGHT - 15, "bits stored for each weight", "middle"))
    parts.append(text(_LEFT, _TOP - 12, "velocity SQNR, dB", "start"))
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")
