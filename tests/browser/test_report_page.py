"""report.html in a real browser: players, keys, read-outs, widths, colours, no scripts."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

expect = pytest.importorskip("playwright.sync_api", reason="needs playwright").expect

Look = Callable[..., Any]
Shown = tuple[Path, Any, Any]
_OPEN = 5

PIXELS = """clip => [...clip.querySelectorAll("canvas")].map(c =>
    [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data])"""
FOCUSED = """() => { const e = document.activeElement, r = e.getBoundingClientRect();
    const name = e.getAttribute("aria-label") || e.textContent.slice(0, 30);
    return [e.id || e.tagName + ":" + name, getComputedStyle(e).outlineStyle,
        r.bottom > 0 && r.top < innerHeight]; }"""
NAMELESS = """() => [...document.querySelectorAll(`button, input, select, a, summary, output,
    section, figure, nav, canvas, [role=region], [role=group], [role=grid], [role=img]`)]
  .filter(e => !e.closest("[aria-hidden=true]") && !e.getAttribute("aria-label")
    && !document.getElementById(e.getAttribute("aria-labelledby") || "-")
    && !e.labels?.length && !e.textContent.trim()).map(e => e.outerHTML.slice(0, 120))"""
HEADINGS = """() => [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")]
    .map(h => +h.tagName[1])"""
TWICE = """() => { const ids = [...document.querySelectorAll("[id]")].map(e => e.id);
    return ids.filter((id, i) => ids.indexOf(id) !== i); }"""
SMALL = """() => [...document.querySelectorAll("button, select, input, summary")]
    .filter(e => e.getBoundingClientRect().height < 24).map(e => e.outerHTML)"""


def _drawn(k: int, clip: Any) -> list[np.ndarray]:
    """The three canvases of a clip, H W 3, once they show the k-th frame."""
    clip.scroll_into_view_if_needed()
    expect(clip).to_have_attribute("data-drawn", str(k))
    canvas = clip.locator("canvas").first
    w, h = int(canvas.get_attribute("width")), int(canvas.get_attribute("height"))
    return [np.array(one).reshape(h, w, 4)[..., :3] for one in clip.evaluate(PIXELS)]


def _index(clip: Any) -> int:
    return int(clip.get_attribute("id").removeprefix("clip-"))


def test_canvases_show_the_very_frames_and_their_amplified_difference(
    look: Look, shown: Shown
) -> None:
    path, reference, candidate = shown
    page = look(path)
    clip = page.locator(".clip").nth(1)
    page.locator("#frame").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.locator("#frame").input_value() == "3"
    assert page.locator("#frame").get_attribute("aria-valuetext") == "frame 4 of 17"
    assert page.locator("#told").text_content() == "frame 4 of 17"
    a, b, apart = _drawn(3, clip)
    assert (a == reference[_index(clip)].frames[3]).all()
    assert (b == candidate[_index(clip)].frames[3]).all()
    assert apart.any()
    assert (apart == np.minimum(255, 4 * np.abs(a - b))).all()
    page.locator("#gain").select_option("16")
    _, _, louder = _drawn(3, clip)
    assert (louder == np.minimum(255, 16 * np.abs(a - b))).all()
    page.keyboard.press("End")
    page.locator("#frame").press("End")
    last = _drawn(16, clip)[0]
    assert (last == reference[_index(clip)].frames[16]).all()


def test_one_scrubber_moves_every_clip_and_its_curve(look: Look, shown: Shown) -> None:
    page = look(shown[0])
    clips = page.locator(".clip")
    page.locator("#frame").fill("8")
    for i in range(_OPEN):
        _drawn(8, clips.nth(i))
        told = clips.nth(i).locator(".now").first.text_content()
        values = clips.nth(i).locator("svg[data-values]").get_attribute("data-values").split()
        assert told == f"· frame 9: {values[8]}"
        moved = clips.nth(i).locator(".cursor").get_attribute("transform")
        span = float(clips.nth(i).locator("svg[data-values]").get_attribute("data-span"))
        assert moved == f"translate({span / 2:g} 0)"


def test_play_pause_and_keys(look: Look, shown: Shown) -> None:
    page = look(shown[0])
    play, told = page.locator("#play"), page.locator("#told")
    play.click()
    assert play.text_content() == "Pause"
    assert told.get_attribute("aria-live") == "off"
    expect(page.locator("#frame")).not_to_have_value("0")
    play.click()
    assert play.text_content() == "Play"
    assert told.get_attribute("aria-live") == "polite"
    stopped = page.locator("#frame").input_value()
    page.wait_for_timeout(400)
    assert page.locator("#frame").input_value() == stopped
    page.locator("#frame").fill("0")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#frame").input_value() == "16"
    page.keyboard.press("ArrowRight")
    assert page.locator("#frame").input_value() == "0"
    page.keyboard.press(" ")
    assert play.text_content() == "Pause"
    page.keyboard.press(" ")
    assert play.text_content() == "Play"


def test_who_asks_for_less_motion_sees_a_clip_once(look: Look, shown: Shown) -> None:
    page = look(shown[0], reduced_motion="reduce")
    assert page.locator("#play").text_content() == "Play"
    page.locator("#frame").fill("14")
    page.locator("#play").click()
    expect(page.locator("#play")).to_have_text("Play")
    assert page.locator("#frame").input_value() == "16"
    page.locator("#play").click()
    assert page.locator("#play").text_content() == "Pause"
    assert int(page.locator("#frame").input_value()) < 16


def test_worst_clips_are_open_and_more_are_read_when_asked_for(look: Look, shown: Shown) -> None:
    page = look(shown[0])
    assert page.locator(".clip:visible").count() == _OPEN
    hidden = page.locator("#more .clip").first
    assert hidden.get_attribute("data-drawn") is None
    page.locator("#more > summary").click()
    assert page.locator(".clip:visible").count() == len(shown[1])
    pictures = _drawn(0, hidden)
    assert (pictures[0] == shown[1][_index(hidden)].frames[0]).all()


def test_a_finding_leads_to_its_clip_even_a_folded_one(look: Look, shown: Shown) -> None:
    page = look(shown[0])
    named = page.locator("#more .clip").first.get_attribute("id")
    page.evaluate("id => { location.hash = id; }", named)
    expect(page.locator("#more")).to_have_attribute("open", "")
    targets = page.locator('section[aria-labelledby="decided"] a').all()
    assert targets
    for link in targets:
        assert page.locator(link.get_attribute("href")).count() == 1


def test_failures_that_were_not_found_are_folded_away(look: Look, shown: Shown) -> None:
    page = look(shown[0])
    decided = page.locator('section[aria-labelledby="decided"]')
    expect(decided.get_by_text("frozen frames", exact=True)).to_be_visible()
    passed = decided.get_by_text("colour shift", exact=True)
    expect(passed).to_be_hidden()
    page.locator("#not-found > summary").click()
    expect(passed).to_be_visible()


def test_the_heat_map_is_read_by_keyboard(look: Look, shown: Shown) -> None:
    page = look(shown[0])
    grid = page.locator("table.heat").first
    assert grid.get_attribute("role") == "grid"
    assert grid.locator('td[tabindex="0"]').count() == 1
    grid.locator('td[tabindex="0"]').focus()
    told = page.locator("#layer")
    assert "transformer/blocks.0.attn1.to_k: error -" in told.text_content()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    said = told.text_content()
    assert said.startswith("transformer/blocks.1.attn1.to_out.0: error -")
    assert "int4-g64" in said
    assert "on held-out prompts" in said
    page.keyboard.press("End")
    assert "blocks.1.ffn.net.2" in told.text_content()
    page.keyboard.press("ArrowRight")  # the edge holds
    assert "blocks.1.ffn.net.2" in told.text_content()
    page.keyboard.press("Home")
    assert "blocks.1.attn1.to_k" in told.text_content()
    assert grid.locator('td[tabindex="0"]').count() == 1
    assert page.locator("#frame").input_value() == "0"  # arrows moved no clip
    page.locator("table.heat").nth(1).locator("td").first.click()
    assert "transformer/patch_embedding: kept as it is" in told.text_content()


def test_tab_reaches_every_control_and_focus_is_seen(look: Look, shown: Shown) -> None:
    page = look(shown[0])
    reached = []
    for _ in range(80):
        page.keyboard.press("Tab")
        told = page.evaluate(FOCUSED)
        if told[0].startswith("BODY"):
            break
        reached.append(told)
    names = [name for name, _, _ in reached]
    assert names[0] == "A:Skip to the report"
    assert [n for n in names if n in ("play", "frame", "gain")] == ["play", "frame", "gain"]
    assert all(outline != "none" for _, outline, _ in reached), reached
    assert all(inside for _, _, inside in reached), reached
    for wanted in ("SUMMARY:2 more clips", "SUMMARY:Recipe, source, suite and vers"):
        assert wanted in names
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_everything_has_a_name_and_a_place(look: Look, shown: Shown) -> None:
    page = look(shown[0])
    assert page.evaluate(NAMELESS) == []
    levels = page.evaluate(HEADINGS)
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in pairwise(levels)), levels
    assert page.evaluate(TWICE) == []
    for landmark in ("header", "main", "nav"):
        assert page.locator(f"body > {landmark}, body > header > {landmark}").count() == 1
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("img:not([alt])").count() == 0
    assert page.locator("th:not([scope])").count() == 0
    tree = page.locator("body").aria_snapshot()
    for line in (
        '- link "Skip to the report"',
        "- main",
        '- slider "frame of every clip"',
        '- combobox "difference times"',
        '- button "Play"',
        '- heading "Clips, worst first" [level=2]',
        '- grid "error in dB, transformer blocks"',
    ):
        assert line in tree, line


@pytest.mark.parametrize("width", [320, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_width_scrolls_sideways_and_no_scheme_is_blank(
    look: Look, shown: Shown, width: int, scheme: str
) -> None:
    page = look(shown[0], viewport={"width": width, "height": 800}, color_scheme=scheme)
    for details in page.locator("details").all():
        details.evaluate("e => { e.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    image = Image.open(io.BytesIO(page.screenshot())).convert("L")
    grey = np.asarray(image)
    assert (grey.mean() > 128) == (scheme == "light")
    assert grey.std() > 10
    assert page.evaluate(SMALL) == []


def test_without_scripts_all_but_the_player_is_there(look: Look, shown: Shown) -> None:
    page = look(shown[0], java_script_enabled=False)
    posters = page.locator("img.poster")
    assert posters.count() == len(shown[1])
    assert page.locator("img.poster:visible").count() == _OPEN
    box = posters.first.bounding_box()
    assert box["width"] > 200
    assert box["height"] > 50
    for hidden in ("#player", "#layer", "canvas >> nth=0"):
        assert not page.locator(hidden).is_visible()
    assert page.locator("noscript > p").is_visible()
    assert page.locator("table.heat td").first.is_visible()
    assert page.locator("svg.strip").count() == 4
    assert page.locator("svg.spark >> visible=true").count() == 2 * _OPEN
    page.locator("#more > summary").click()
    assert page.locator("img.poster:visible").count() == len(shown[1])


def test_hostile_prompts_run_nothing(look: Look, shown: Shown) -> None:
    page = look(shown[0], refuses="Content Security Policy")
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 1
    assert page.get_by_role("heading", name='onerror="alert(1)"').count() == 1
    page.evaluate(  # what got in all the same may not run: the policy knows one script by its hash
        """() => { const s = document.createElement("script"); s.textContent = "window.got = 1";
        document.body.append(s); }"""
    )
    assert page.evaluate("window.got") is None
