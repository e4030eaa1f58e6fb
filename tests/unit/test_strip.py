"""Strips: the candidate between noise and unrelated clips, worse to the right on every metric."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import pytest

from hbxt_compress.render.axes import log_ticks, round_ticks
from hbxt_compress.render.strip import strips
from hbxt_compress.report import SCHEMA, Control, ControlKind, Measurement, QualityReport


def _report(
    values: tuple[float, ...],
    controls: dict[str, tuple[ControlKind, tuple[float, ...]]],
    unit: str = "",
    direction: Literal["lower", "higher"] = "lower",
) -> QualityReport:
    mean = sum(values) / len(values)
    one = Measurement(
        metric="m", value=mean, interval=(min(values), max(values)), n=len(values), unit=unit,
        direction=direction, per_clip=values,
    )  # fmt: skip
    return QualityReport(
        schema=SCHEMA, recipe={"name": "mine<"}, source={}, suite={}, n_clips=len(values),
        components={}, bytes_before=0, bytes_after=0, measurements=(one,), curves={}, layers=(),
        verdicts=(), conclusion="", clips=(), made_with={}, artifact="", seconds={},
        controls=tuple(
            Control(name=name, kind=kind, text="", n=len(v), values={"m": v})
            for name, (kind, v) in controls.items()
        ),
        findings=(), baseline=None,
    )  # fmt: skip


def _marks(svg: str) -> dict[str, float]:
    """Kind of lane -> where its mean is drawn."""
    found = re.findall(r'<path class="mean (\w+)"[^>]*translate\(([\d.]+) ', svg)
    return {kind: float(x) for kind, x in found}


_ERRORS = {"ulp": ("noise", (0.001, 0.001)), "seed": ("seed", (0.1, 0.1))}


def test_an_error_lies_between_noise_and_unrelated_clips_by_its_logarithm() -> None:
    (one,) = strips(_report((0.01, 0.01), _ERRORS))  # type: ignore[arg-type]
    assert one.place == "The candidate is 50 % of the way from noise to an unrelated clip."
    at = _marks(one.svg)
    assert at["noise"] < at["candidate"] < at["seed"]
    assert at["candidate"] - at["noise"] == pytest.approx(at["seed"] - at["candidate"], abs=0.2)
    (twice,) = strips(_report((0.001 * 10**0.5,) * 2, _ERRORS))  # type: ignore[arg-type]
    assert "25 %" in twice.place


@pytest.mark.parametrize(
    ("unit", "direction", "noise", "own", "seed", "share"),
    [
        ("dB", "higher", 60.0, 35.0, 10.0, "50 %"),
        ("", "higher", 0.9999, 0.99, 0.0, "50 %"),
        ("", "lower", 1e-4, 1e-3, 1.0, "25 %"),
    ],
)
def test_worse_is_to_the_right_whatever_the_metric_calls_better(
    unit: str, direction: Literal["lower", "higher"], noise: float, own: float, seed: float,
    share: str,
) -> None:  # fmt: skip
    report = _report(
        (own,) * 2, {"a": ("noise", (noise,)), "b": ("seed", (seed,))}, unit, direction
    )
    (one,) = strips(report)
    at = _marks(one.svg)
    assert at["noise"] < at["candidate"] < at["seed"]
    assert share in one.place


@pytest.mark.parametrize(
    ("own", "controls", "said"),
    [
        (0.0, _ERRORS, "identical to the reference's"),
        (0.0005, _ERRORS, "no farther than noise alone"),
        (0.2, _ERRORS, "as far as an unrelated clip"),
        (0.01, {"ulp": ("noise", (0.0,)), "seed": ("seed", (0.1,))}, "Noise changes nothing here"),
        (0.01, {"ulp": ("noise", (0.3,)), "seed": ("seed", (0.1,))}, "tells nothing here"),
        (0.01, {"seed": ("seed", (0.1,))}, ""),
        (0.01, {}, ""),
    ],
)
def test_the_place_is_told_in_words(own: float, controls: object, said: str) -> None:
    (one,) = strips(_report((own, own), controls))  # type: ignore[arg-type]
    assert said in one.place
    assert bool(one.place) == bool(said)


@pytest.mark.parametrize(
    "values", [(0.0, 0.0), (0.3,), (1e-9, 1e9), (0.02, 0.021), (0.0, 1e-3), (5.0, 5.0)]
)
@pytest.mark.parametrize("direction", ["lower", "higher"])
def test_all_is_inside_the_chart(
    values: tuple[float, ...], direction: Literal["lower", "higher"]
) -> None:
    for unit in ("", "dB"):
        report = _report(values, {"x" * 40: ("damage", values)}, unit, direction)
        (one,) = strips(report)
        root = ElementTree.fromstring(one.svg)
        assert len(root.findall("circle")) == 2 * len(values)
        for dot in root.findall("circle"):
            assert 110 <= float(dot.attrib["cx"]) <= 340
        assert "mine&lt;" in one.svg


def test_controls_stand_in_one_order_and_empty_ones_are_left_out() -> None:
    controls = {"s": ("seed", (1.0,)), "w8": ("damage", (0.1,)), "n": ("noise", (0.01,))}
    report = _report((0.5,), controls)  # type: ignore[arg-type]
    gone = Control(name="gone", kind="noise", text="", n=0, values={}, note="no provider")
    (one,) = strips(replace(report, controls=(*report.controls, gone)))
    assert list(_marks(one.svg)) == ["candidate", "noise", "damage", "seed"]
    assert "gone" not in one.svg


def test_labels_of_ticks_do_not_lie_on_each_other() -> None:
    near = {"ulp": ("noise", (1 - 3e-9, 1 - 1e-8)), "s": ("seed", (0.3,))}
    (one,) = strips(_report((0.95, 0.99), near, "", "higher"))  # type: ignore[arg-type]
    root = ElementTree.fromstring(one.svg)
    ticks = [t for t in root.findall("text") if t.attrib.get("text-anchor") == "middle"]
    spans = [(float(t.attrib["x"]), 3.5 * len(t.text or "")) for t in ticks]
    assert len(spans) >= 2
    assert all(b - b_half >= a + a_half for (a, a_half), (b, b_half) in pairwise(spans))
    assert len({t.text for t in ticks}) == len(ticks)
    assert "1-1e-0" in one.svg


def test_only_fidelity_with_values_by_clip_has_a_strip() -> None:
    report = _report((0.5,), {})
    (one,) = report.measurements
    others = (replace(one, family="health"), replace(one, per_clip=()), replace(one, value=None))
    assert strips(replace(report, measurements=others)) == []


def test_log_ticks_are_few_round_and_inside() -> None:
    assert log_ticks(-3, 0) == pytest.approx([0.001, 0.01, 0.1, 1])
    assert log_ticks(-0.1, 1.05) == pytest.approx([1, 2, 5, 10])
    for low, high in ((-9.5, 9.5), (-0.01, 0.01), (2.31, 2.32), (-3.2, 1.4)):
        ticks = log_ticks(low, high)
        assert 2 <= len(ticks) <= 5
        assert all(10**low * 0.999 <= tick <= 10**high * 1.001 for tick in ticks)
    assert round_ticks(0, 10)[0] == 0
