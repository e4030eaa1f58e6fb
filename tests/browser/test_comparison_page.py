"""comparison.html in a real browser: no scripts, no requests, readable at every width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hbxt_compress.render.comparison import write_comparison
from tests.shown_report import NASTY, compared


@pytest.mark.parametrize("width", [320, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_recipes_are_compared_without_scripts(
    look: Callable[..., Any], tmp_path: Path, width: int, scheme: str
) -> None:
    write_comparison(tmp_path / "page.html", compared())
    page = look(
        tmp_path / "page.html",
        viewport={"width": width, "height": 800},
        color_scheme=scheme,
        java_script_enabled=False,
    )
    assert page.locator("script").count() == 0
    assert page.locator("html").evaluate("e => e.scrollWidth") == width
    tree = page.locator("body").aria_snapshot()
    for line in ('- heading "Recipes" [level=2]', '- heading "w8a16" [level=3]', "- main"):
        assert line in tree, line
    assert page.get_by_role("img").get_attribute("aria-label").startswith("damage by psnr, dB")
    assert page.locator("svg.scatter > text", has_text=NASTY[:20]).count() == 1
    chart = page.locator("svg.scatter").bounding_box()
    for mark in page.locator("svg.scatter circle, svg.scatter path, svg.scatter text").all():
        box = mark.bounding_box()
        assert box["x"] >= chart["x"] - 1
        assert box["x"] + box["width"] <= chart["x"] + chart["width"] + 1
