"""Colours of the pages: text is readable on what is behind it, in light and in dark."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from hbxt_compress.render.heatmap import LEVELS
from hbxt_compress.render.jinja import environment

_LEAST_TEXT, _LEAST_SHAPE = 4.5, 3.0  # WCAG 2.2, AA
_TEXT = ("ink", "soft", "pass", "fail", "undecided", "none", "after")
_SHAPES = ("before", "after", "noise", "damage", "seed", "edge")


def _schemes() -> dict[str, dict[str, str]]:
    css = environment().get_template("base.css.j2").render()
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    colours = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", each)) for each in (light, dark)]
    return {"light": colours[0], "dark": colours[0] | colours[1]}


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_what_the_standard_says() -> None:
    assert _contrast("#000000", "#ffffff") == pytest.approx(21)
    assert _contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_shapes_stand_out(scheme: str) -> None:
    colours = _schemes()[scheme]
    for behind in ("paper", "card"):
        for name in _TEXT:
            assert _contrast(colours[name], colours[behind]) >= _LEAST_TEXT, (name, behind)
        for name in _SHAPES:
            assert _contrast(colours[name], colours[behind]) >= _LEAST_SHAPE, (name, behind)
    for k in range(LEVELS):
        assert _contrast(colours[f"on-{k}"], colours[f"heat-{k}"]) >= _LEAST_TEXT, k
    assert _contrast(colours["after"], colours["band"]) >= _LEAST_SHAPE


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_levels_of_heat_are_told_by_brightness_alone(scheme: str) -> None:
    colours = _schemes()[scheme]
    shades = [_luminance(colours[f"heat-{k}"]) for k in range(LEVELS)]
    if scheme == "light":
        shades.reverse()
    assert all(b > 1.15 * a for a, b in pairwise(shades)), shades
    away = [_contrast(colours[f"heat-{k}"], colours["paper"]) for k in range(LEVELS)]
    assert away == sorted(away)  # the worst stands out most


def test_dark_sets_every_colour_and_motion_is_nobodys_but_the_players() -> None:
    css = environment().get_template("base.css.j2").render()
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    names = [re.findall(r"--([\w-]+):", each) for each in (light, dark)]
    assert names[0] == names[1]
    css += environment().get_template("report.css.j2").render()
    assert not re.search(r"transition|animation|scroll-behavior", css)
    assert not re.search(r"outline: *(none|0)", css)
