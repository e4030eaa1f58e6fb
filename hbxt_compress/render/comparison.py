"""comparison.html: recipes of one model beside each other, offline, without scripts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from hbxt_compress.render.jinja import environment
from hbxt_compress.render.scatter import Point, scatter

__all__ = ["comparison_page", "write_comparison"]


def comparison_page(found: Mapping[str, Any]) -> str:
    """HTML of a comparison's JSON, as Comparison.to_json() gives it."""
    points = [
        Point(name=one["name"], x=one["bytes_after"], y=one["damage"], unbeaten=one["unbeaten"])
        for one in found["reports"]
    ]
    damage = f"damage by {found['quality']}, {found['unit']}".removesuffix(", ")
    template = environment().get_template("comparison.html.j2")
    chart = Markup(scatter(points, y_label=damage))  # escaped where it is made
    return template.render(found=found, damage=damage, chart=chart)


def write_comparison(path: Path, found: Mapping[str, Any]) -> None:
    """Writes the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(comparison_page(found), encoding="utf-8")
