"""comparison.html: recipes of one model beside each other, offline, without scripts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from hbxt_compress.render.table import number, size

__all__ = ["comparison_page", "write_comparison"]


def comparison_page(found: Mapping[str, object]) -> str:
    """HTML of a comparison's JSON."""
    environment = Environment(
        loader=PackageLoader("hbxt_compress.render"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("comparison.html.j2")
    return page.render(found=found, number=number, size=size)


def write_comparison(path: Path, found: Mapping[str, object]) -> None:
    """Writes the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(comparison_page(found), encoding="utf-8")
