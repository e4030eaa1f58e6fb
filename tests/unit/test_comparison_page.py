"""comparison.html: recipes, differences in words, who is unbeaten; nothing but text and SVG."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from hbxt_compress import show, show_quality
from hbxt_compress.comparing import Compared, Comparison, Difference, beats
from hbxt_compress.render.comparison import comparison_page, write_comparison
from hbxt_compress.render.scatter import Point, scatter
from tests.shown_report import NASTY, compared


def test_the_page_tells_recipes_differences_and_who_is_unbeaten(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "page.html"
    write_comparison(path, compared())
    text = path.read_text(encoding="utf-8")
    for part in (
        "4 recipes on suite standard",
        "<strong>w8a16, budget</strong>",
        '<td class="better">better</td><td class="number">-3.5 dB</td><td>-3.7 .. -3.3</td>',
        '<td class="worse">worse</td><td class="number">+4 dB</td>',
        '<td class="">the same</td>',
        "8.47 MB",
        "Differences against w4a16",
    ):
        assert part in text, part
    assert "<script" not in text
    assert "<img" not in text
    assert not re.search(r"https?://|@import|url\(", text)
    assert "default-src 'none'" in text
    assert NASTY not in text


def test_a_comparison_gives_the_page_what_it_asks_for() -> None:
    difference = Difference(metric="psnr", value=2.0, interval=(1.0, 3.0), unit="dB", p=0.01)
    one = Compared(
        name="a", bytes_after=10**6, seconds=1.0, damage=-40.0, outcome="pass",
        values={"psnr": 40.0}, differences=(), unbeaten=True,
    )  # fmt: skip
    other = Compared(
        name="b", bytes_after=2 * 10**6, seconds=2.0, damage=-38.0, outcome="fail",
        values={"psnr": 38.0}, differences=(difference,), unbeaten=False,
    )  # fmt: skip
    found = Comparison(suite="s", n_clips=8, quality="psnr", unit="dB", reports=(one, other))
    document = found.to_json()
    assert document["reports"][1]["differences"][0]["word"] == "worse"  # type: ignore[index]
    text = comparison_page(document)
    assert '<td class="worse">worse</td><td class="number">+2 dB</td>' in text
    assert "<strong>a</strong>" in text


def test_a_terminal_of_80_columns_has_room_for_every_recipe_and_metric(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = ("psnr", "ssim", "lpips_squeeze", "temporal_error", "latent_error", "fd_temporal")
    reports = tuple(
        Compared(
            name=name, bytes_after=10**6, seconds=1.0, damage=-40.0, outcome="pass",
            values=dict.fromkeys(metrics, 0.0001234), differences=(), unbeaten=True,
        )
        for name in ("w4a16", "w4a16-budget", "[bold]mine[/bold]")
    )  # fmt: skip
    monkeypatch.setattr(show, "_LEAST_WIDTH", 80)
    monkeypatch.setenv("COLUMNS", "80")
    found = Comparison(suite="s", n_clips=8, quality="psnr", unit="dB", reports=reports)
    show_quality.comparison(found, None, json_wanted=False)
    said = capsys.readouterr().out
    for part in (*metrics, *(one.name for one in reports), "1.00 MB", "0.0001234"):
        assert part in said, said


@pytest.mark.parametrize(
    ("one", "other", "beaten"),
    [
        ((1, 1.0, 1.0), (1, 1.0, 1.0), False),
        ((1, 1.05, 1.0), (2, 1.0, 1.0), True),  # so near, times are the same
        ((1, 1.05, 1.0), (1, 1.0, 1.0), False),
        ((1, 1.2, 1.0), (2, 1.0, 1.0), False),
        ((1, 1.0, 1.0), (1, 1.2, 1.0), True),
        ((1, 1.0, 2.0), (2, 1.0, 1.0), False),
        ((1, 0.0, 1.0), (1, 0.0, 2.0), True),  # no times are known
    ],
)
def test_who_beats_whom(
    one: tuple[float, float, float], other: tuple[float, float, float], beaten: bool
) -> None:
    assert beats(one, other) is beaten


@pytest.mark.parametrize(
    "places",
    [
        [(1e6, -40.0), (2e6, -30.0)],
        [(1e6, 0.0), (1e6, 0.0), (1e6, 0.0)],
        [(5e9, 1e-6), (1.0, 1e6)],
        [(8.47e6, -37.2), (8.36e6, -37.1), (8.4e6, -37.15)],
    ],
)
def test_marks_stay_inside_and_labels_apart(places: list[tuple[float, float]]) -> None:
    points = [Point(name=f"<r{i}>", x=x, y=y, unbeaten=i == 0) for i, (x, y) in enumerate(places)]
    root = ElementTree.fromstring(scatter(points, y_label="damage"))
    marks = [one for one in root.iter() if one.attrib.get("class") in ("unbeaten", "beaten")]
    assert len(marks) == len(places)
    labels = [one for one in root.findall("text") if one.attrib.get("class") == "name"]
    spots = [(float(one.attrib["x"]), float(one.attrib["y"])) for one in labels]
    for i, (x, y) in enumerate(spots):
        assert 0 <= x <= 480
        assert 0 <= y <= 300
        for a, b in spots[:i]:
            assert abs(a - x) > 40 or abs(b - y) >= 12
    dot = root.find("circle")
    assert dot is not None
    assert 0 <= float(dot.attrib["cx"]) <= 480
    assert 0 <= float(dot.attrib["cy"]) <= 300
