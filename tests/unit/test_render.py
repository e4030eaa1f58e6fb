"""Pages and charts: self-contained, escaped, worst clips first, small enough."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from hbxt_compress.clips import Clip
from hbxt_compress.render import page as page_module
from hbxt_compress.render.cards import N_OPEN, cards, worst_first
from hbxt_compress.render.charts import bar_chart, line_chart
from hbxt_compress.render.markdown import markdown
from hbxt_compress.render.page import page
from hbxt_compress.render.pictures import DIFFERENCE_GAIN, poster, sheet, side_by_side
from hbxt_compress.render.table import byte_rows, metric_rows, notes, size
from hbxt_compress.report import SCHEMA, ClipRecord, Control, Measurement, QualityReport, Verdict

_NO_FIGURES = {
    "activations": "keep",
    "how": "rtn",
    "held_out": None,
    "g1_db": 3.0,
    "g2_db": 0.5,
    "limit_db": 4.25,
}
_NASTY = '</script><img src=x onerror="alert(1)"> | `*x*`'


def _clips(n: int, seed: int, shape: tuple[int, ...] = (5, 16, 20, 3)) -> list[Clip]:
    rng = np.random.default_rng(seed)
    return [
        Clip(frames=rng.integers(0, 256, shape, dtype=np.uint8), prompt=_NASTY, seed=i, fps=8.0)
        for i in range(n)
    ]


def _report(n: int = 3, problems: int | None = None) -> QualityReport:
    values = tuple(float(30 + i) for i in range(n))
    return QualityReport(
        schema=SCHEMA,
        recipe={"name": _NASTY},
        source={"model": "m"},
        suite={"name": "tiny", "measure_seed": 0},
        n_clips=n,
        components={"transformer": {"before": 3_000_000, "after": 800_000}},
        bytes_before=3_000_000,
        bytes_after=800_000,
        measurements=(
            Measurement(
                metric="psnr", value=31.0, interval=(30.0, 32.0), n=n, unit="dB",
                direction="higher",
                worst=30.0, per_clip=values, interval_by="bootstrap",
            ),
            Measurement(
                metric="lpips_squeeze", value=0.1, interval=None, n=n, unit="", direction="lower",
                per_clip=values, extractor="squeeze", extractor_sha256="ab" * 32,
            ),
            Measurement(
                metric="fvd_i3d", value=None, interval=None, n=0, unit="", direction="lower",
                family="distribution", note=_NASTY,
            ),
        ),
        curves={"latent_error/step": (0.1, 0.2, 0.4), "psnr/frame": (30.0,)},
        layers=(
            {"name": f"transformer/{_NASTY}", "format": "int4", "reason": _NASTY, "error": 0.1,
             **_NO_FIGURES,
             "bytes_before": 100, "bytes_after": 30, "shape": [1]},
            {"name": "transformer/b", "format": "keep", "reason": "why", "error": None,
             **_NO_FIGURES,
             "bytes_before": 100, "bytes_after": 100, "shape": [1]},
        ),
        verdicts=(Verdict(metric="psnr", limit=30.0, outcome="pass", reason="31 is at least 30"),),
        conclusion=f"PASS {_NASTY}",
        clips=tuple(
            ClipRecord(
                prompt=_NASTY, seed=i, reference_sha256="a", candidate_sha256="b",
                problems=("candidate all black",) if i == problems else (),
            )
            for i in range(n)
        ),
        made_with={"numpy": "2"},
        artifact="",
        seconds={},
        controls=(),
        findings=(),
        baseline=None,
    )  # fmt: skip


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_asks_for_nothing_outside_itself() -> None:
    text = page(_report(), _clips(3, 0), _clips(3, 1))
    tags = _Tags()
    tags.feed(text)
    for tag, attributes in tags.found:
        for name in ("src", "href", "action", "poster"):
            if attributes.get(name) and not str(attributes[name]).startswith("#"):
                assert str(attributes[name]).startswith("data:image/"), (tag, attributes)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "default-src 'none'" in text


def test_hostile_text_stays_text() -> None:
    text = page(_report(), _clips(3, 0), _clips(3, 1))
    tags = _Tags()
    tags.feed(text)
    assert all("onerror" not in attributes for _, attributes in tags.found)
    assert [tag for tag, _ in tags.found].count("script") == 1
    for line in markdown(_report()).splitlines():
        assert "<img" not in line.replace("\\<", "")


def test_the_page_shows_clips_numbers_and_verdict() -> None:
    text = page(_report(), _clips(3, 0), _clips(3, 1))
    assert text.count("<figure") == 3
    assert text.count("<canvas") == 9
    for part in (
        "30 .. 32",
        "ab" * 32,
        "3.00 MB",
        "800.00 kB",
        'class="verdict pass"',
        "31 is at least 30",
    ):
        assert part in text


def test_worst_clips_come_first_and_unhealthy_ones_before_them() -> None:
    assert worst_first(_report()) == [2, 1, 0]  # by LPIPS, where higher is worse
    assert worst_first(_report(problems=0)) == [0, 2, 1]
    text = page(_report(problems=0), _clips(3, 0), _clips(3, 1))
    assert text.index("candidate all black") < text.index("(clip 2, seed 2)")


def test_a_page_too_heavy_leaves_out_the_best_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = page(_report(), _clips(3, 0), _clips(3, 1))
    monkeypatch.setattr(page_module, "_MOST_PICTURE_BYTES", 30_000)
    text = page(_report(), _clips(3, 0), _clips(3, 1))
    assert "Frames are compressed" in text
    assert text.count("<figure") == 3
    monkeypatch.setattr(page_module, "_MOST_PICTURE_BYTES", 8_000)
    text = page(_report(), _clips(3, 0), _clips(3, 1))
    shown = text.count("<figure")
    assert 0 < shown < 3
    assert f"{3 - shown} better clips are left out" in text
    assert "(clip 2, seed 2)" in text
    assert len(text) < len(whole)


def test_where_not_all_fit_the_clips_shown_at_once_stay_lossless() -> None:
    few = [cards(_report(8), _clips(8, 0), _clips(8, 1), most) for most in (10**6, 100_000, 20_000)]
    kept = [[card.sheets[0].lossless for card in found] for found in few]
    assert kept == [[True] * 8, [True] * N_OPEN + [False] * 3, [False] * len(few[2])]
    assert few[0][0].index == 7
    assert few[2]


def test_long_clips_show_which_frames_they_show() -> None:
    shape = (70, 16, 20, 3)
    text = page(_report(), _clips(3, 0, shape), _clips(3, 1, shape))
    found = re.search(r'data-shown="([\d ]+)" data-frames="70" data-wait="([\d.]+)"', text)
    assert found is not None
    shown = list(map(int, found[1].split()))
    assert (len(shown), shown[0], shown[-1]) == (33, 0, 69)
    assert shown == sorted(set(shown))
    assert float(found[2]) * 33 == pytest.approx(1000 * 70 / 8, rel=0.001)  # as fast as it is


def test_controls_are_read_beside_the_same_clips() -> None:
    noise = Control(name="ulp", kind="noise", text="moved", n=2, values={"psnr": (60.0, 62.0)})
    gone = Control(name="gpu", kind="noise", text="t", n=0, values={}, note="no provider")
    text = page(replace(_report(), controls=(noise, gone)), _clips(3, 0), _clips(3, 1))
    rows = re.findall(r'<tr[^>]*><th scope="row">(.*?)</th><td>(.*?)</td>(.*?)</tr>', text)
    told = {name: (kind, re.findall(r">([^<>]+)</td>", rest)) for name, kind, rest in rows}
    own = next(value for name, value in told.items() if "first 2 clips" in name)
    assert own == ("candidate", ["2", "30.5", "30.5"])
    assert told["ulp"] == ("noise", ["2", "61", "-"])
    assert "gpu (noise): t; not measured, no provider" in text
    assert "No controls were measured" not in text
    assert "No controls were measured" in page(_report(), _clips(3, 0), _clips(3, 1))


def test_the_policy_lets_only_the_pages_own_script_run() -> None:
    text = page(_report(), _clips(3, 0), _clips(3, 1))
    script = text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in text
    assert not re.search(r"\son\w+=", text.replace("onerror=", ""))


def test_bands_and_sparks_hold_what_the_clips_have() -> None:
    records = tuple(
        replace(clip, curves={"psnr/frame": (30.0 + i, 31.0 + i, 32.0 + i)})
        for i, clip in enumerate(_report().clips)
    )
    report = replace(_report(), clips=records, curves={"psnr/frame": (31.0, 32.0, 33.0)})
    text = page(report, _clips(3, 0), _clips(3, 1))
    assert text.count('class="band"') == 1
    assert "band: 10 to 90 % of clips" in text
    assert 'data-values="32 33 34"' in text
    lone = replace(report, clips=tuple(replace(clip, curves={}) for clip in records))
    assert 'class="band"' not in page(lone, _clips(3, 0), _clips(3, 1))


def test_seconds_are_called_what_they_are() -> None:
    report = replace(_report(), seconds={"candidate": 6.2, "reference": 7.91})
    text = page(report, _clips(3, 0), _clips(3, 1))
    assert "candidate 6.2 s, reference 7.91 s" in text
    assert "were not timed in turn" in text
    assert "timed in turn" not in page(_report(), _clips(3, 0), _clips(3, 1))


def test_a_poster_has_both_sides_and_their_difference() -> None:
    a, b = _clips(1, 0)[0].frames[0], _clips(1, 1)[0].frames[0]
    image = Image.open(io.BytesIO(base64.b64decode(poster(a, b).split(",", 1)[1])))
    assert image.size == (60, 16)
    large = np.zeros((480, 832, 3), dtype=np.uint8)
    image = Image.open(io.BytesIO(base64.b64decode(poster(large, large).split(",", 1)[1])))
    assert image.size == (3 * 256, round(480 * 256 / 832))


def test_a_page_without_layers_curves_or_values_still_stands() -> None:
    from dataclasses import replace

    bare = replace(_report(), measurements=(), curves={}, layers=(), verdicts=(), components={})
    text = page(bare, _clips(3, 0), _clips(3, 1))
    assert "All 0 layers" in text
    assert "Where it goes wrong" not in text


def test_a_lossless_sheet_holds_every_frame_exactly(rng: np.random.Generator) -> None:
    frames = rng.integers(0, 256, (7, 10, 14, 3), dtype=np.uint8)
    made = sheet(frames, lossless=True)
    image = Image.open(io.BytesIO(base64.b64decode(made.uri.split(",", 1)[1])))
    pixels = np.asarray(image.convert("RGB"))
    for t in range(7):
        row, column = divmod(t, made.n_columns)
        y, x = row * made.height, column * made.width
        assert (pixels[y : y + 10, x : x + 14] == frames[t]).all()


def test_a_sheet_of_a_large_clip_is_made_small() -> None:
    made = sheet(np.zeros((81, 480, 832, 3), dtype=np.uint8), lossless=True)
    assert (made.n_frames, made.width, made.lossless) == (33, 256, False)
    assert made.height == round(480 * 256 / 832)


def test_video_panels_show_reference_candidate_and_difference() -> None:
    a, b = _clips(1, 0, (2, 15, 17, 3))[0], _clips(1, 1, (2, 15, 17, 3))[0]
    frames = list(side_by_side(a, b))
    assert len(frames) == 2
    height, width = frames[0].shape[:2]
    assert height % 2 == width % 2 == 0
    times = height // 15
    small = frames[0][: 15 * times : times, : 51 * times : times]
    assert (small[:, :17] == a.frames[0]).all()
    assert (small[:, 17:34] == b.frames[0]).all()
    apart = np.abs(a.frames[0].astype(int) - b.frames[0]) * DIFFERENCE_GAIN
    assert (small[:, 34:] == apart.clip(0, 255)).all()


@pytest.mark.parametrize(
    "values",
    [[0.1, 0.2, 0.4], [5.0], [0.0, 0.0], [-1.0, 1.0], [1e-12, 1e12], [99.97, 99.98, 100.0]],
)
def test_line_charts_stay_inside_their_frame(values: list[float]) -> None:
    root = ElementTree.fromstring(line_chart(values, x_label="step", y_label="<error>"))
    assert len(root.findall("circle")) == len(values)
    for dot in root.findall("circle"):
        assert 0 <= float(dot.attrib["cx"]) <= 640
        assert 0 <= float(dot.attrib["cy"]) <= 240


def test_bars_are_proportional_and_escaped() -> None:
    chart = bar_chart(
        [("a<b", {"before": 4.0, "after": 1.0}, "4 to 1"), ("c", {"after": 2.0}, "2")]
    )
    root = ElementTree.fromstring(chart)
    widths = [float(bar.attrib["width"]) for bar in root.findall("rect")]
    assert widths[0] == pytest.approx(4 * widths[1], rel=0.01)
    assert widths[2] == pytest.approx(2 * widths[1], rel=0.01)
    assert ElementTree.fromstring(bar_chart([("zero", {"after": 0.0}, "0")])) is not None


def test_markdown_is_one_table_row_per_metric() -> None:
    text = markdown(_report())
    rows = [line for line in text.splitlines() if line.startswith(("| psnr", "| fvd"))]
    assert len(rows) == 2
    assert rows[0].count("|") == 9
    assert "31 dB" in rows[0]
    assert "30 .. 32" in rows[0]


def test_rows_sizes_and_shared_notes() -> None:
    report = _report()
    assert metric_rows(report)[0][-2:] == ("30", "pass")
    assert metric_rows(report)[2][1] == "-"
    assert byte_rows(report)[-1] == ("all", "3.00 MB", "800.00 kB", "3.75x")
    assert notes(report) == [("fvd_i3d", _NASTY)]
    assert [size(n) for n in (0, 999, 1500, 24_000_000, 10**12)] == [
        "0 B", "999 B", "1.50 kB", "24.00 MB", "1000.00 GB",
    ]  # fmt: skip


def test_a_report_says_what_of_its_recipe_was_left_out() -> None:
    step = {"step": "refine recover", "reason": "5.0 B parameters, over its limit of 1.0 B"}
    report = replace(_report(), recipe={"name": "r", "left_out": [step]})
    told = f"left out: {step['reason']}"
    assert notes(report)[0] == ("refine recover", told)
    assert told in markdown(report)
    assert told in page(report, _clips(3, 1), _clips(3, 2))
