"""QualityReport round trips, and refuses what is not one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from hbxt_compress.errors import UsageError
from hbxt_compress.metrics.statistics import decide
from hbxt_compress.report import (
    SCHEMA,
    Baseline,
    ClipRecord,
    Control,
    Finding,
    Measurement,
    QualityReport,
    Verdict,
)


def _report() -> QualityReport:
    return QualityReport(
        schema=SCHEMA,
        recipe={"name": "w4a16", "digest": "0" * 64, "document": {"rules": [1, None, 0.5]}},
        source={"model": "builtin/tiny-wan"},
        suite={"name": "tiny"},
        n_clips=2,
        components={"transformer": {"before": 400, "after": 100}},
        bytes_before=400,
        bytes_after=100,
        measurements=(
            Measurement(
                metric="psnr",
                value=31.25,
                interval=(30.5, 1 / 3),
                n=2,
                unit="dB",
                direction="higher",
                worst=30.5,
                per_clip=(32.0, 30.5),
            ),
            Measurement(
                metric="fvd_i3d",
                value=None,
                interval=None,
                n=0,
                unit="",
                direction="lower",
                note="no",
            ),
        ),
        curves={"latent_error/step": (0.1, 0.25)},
        layers=({"name": "transformer/a", "format": "int4", "error": None},),
        verdicts=(Verdict(metric="psnr", limit=30, outcome="undecided", reason="few"),),
        conclusion="UNDECIDED",
        clips=(ClipRecord(prompt='a "b" <c>', seed=7, reference_sha256="1", candidate_sha256="2"),),
        made_with={"numpy": "2"},
        artifact="a" * 64,
        seconds={"candidate": 1.5},
        controls=(
            Control(name="ulp", kind="noise", text="an ulp", n=2, values={"psnr": (90.0, 91.5)}),
        ),
        findings=(
            Finding(
                failure="slow_motion",
                outcome="undecided",
                value=-0.05,
                interval=(-0.12, 0.01),
                tolerance=0.04,
                unit="%",
                n=8,
                clips=(1,),
                n_needed=40,
                text="perhaps slower",
            ),
        ),
        baseline=Baseline(path="b.json", accepted="2026-11-01", artifact="b", made_with={}),
    )


def test_a_report_comes_back_as_it_was(tmp_path: Path) -> None:
    report = _report()
    path = report.save(tmp_path / "new")
    assert path.name == "report.json"
    assert QualityReport.load(path.parent) == report
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_a_number_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    bad = Measurement(
        metric="psnr", value=float("inf"), interval=None, n=1, unit="", direction="lower"
    )
    document = _report().to_json()
    report = QualityReport.from_json(document)
    object.__setattr__(report, "measurements", (bad,))
    with pytest.raises(ValueError, match="JSON"):
        report.save(tmp_path)
    assert not (tmp_path / "report.json").exists()


def _without(document: dict[str, Any]) -> None:
    del document["n_clips"]


def _unknown(document: dict[str, Any]) -> None:
    document["measurements"][0]["interval_95"] = 1


def _text_for_number(document: dict[str, Any]) -> None:
    document["measurements"][0]["value"] = "31.25"


def _true_for_number(document: dict[str, Any]) -> None:
    document["n_clips"] = True


def _half_interval(document: dict[str, Any]) -> None:
    document["measurements"][0]["interval"] = [1.0]


def _odd_outcome(document: dict[str, Any]) -> None:
    document["verdicts"][0]["outcome"] = "maybe"


def _list_for_mapping(document: dict[str, Any]) -> None:
    document["curves"] = []


def _nan(document: dict[str, Any]) -> None:
    document["bytes_before"] = float("nan")


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (_without, "report.n_clips: missing"),
        (_unknown, r"report.measurements\[0\].interval_95: unknown"),
        (_text_for_number, r"report.measurements\[0\].value: '31.25' is not float"),
        (_true_for_number, "report.n_clips: True is not int"),
        (_half_interval, r"report.measurements\[0\].interval"),
        (_odd_outcome, r"report.verdicts\[0\].outcome: 'maybe'"),
        (_list_for_mapping, "report.curves"),
        (_nan, "report.bytes_before"),
    ],
)
def test_bad_json_is_refused_with_the_place(damage: Any, where: str) -> None:
    document = copy.deepcopy(_report().to_json())
    damage(document)
    with pytest.raises(UsageError, match=where):
        QualityReport.from_json(document)


def test_all_problems_are_named_at_once() -> None:
    document = copy.deepcopy(_report().to_json())
    _text_for_number(document)
    _odd_outcome(document)
    with pytest.raises(UsageError, match="2 problems"):
        QualityReport.from_json(document)


@pytest.mark.parametrize("document", [None, [], "report", 3])
def test_what_is_no_object_is_refused(document: object) -> None:
    with pytest.raises(UsageError, match="not a quality report"):
        QualityReport.from_json(document)


def test_another_schema_and_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"schema 99, this version reads {SCHEMA}"):
        QualityReport.from_json(_report().to_json() | {"schema": 99})
    with pytest.raises(UsageError, match="no readable report"):
        QualityReport.load(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(_report().to_json())[:-20])
    with pytest.raises(UsageError, match="no readable report"):
        QualityReport.load(tmp_path)


@pytest.mark.parametrize(
    ("direction", "value", "interval", "n", "outcome"),
    [
        ("higher", 31.0, (29.0, 33.0), 8, "undecided"),  # the interval is astride the limit
        ("higher", 29.9, (29.0, 33.0), 7, "undecided"),
        ("higher", 31.0, (30.5, 33.0), 8, "pass"),  # all of it keeps the limit
        ("higher", 31.0, (30.5, 33.0), 7, "pass"),
        ("higher", 28.0, (27.0, 29.0), 7, "fail"),
        ("higher", 99.0, None, 1, "undecided"),
        ("lower", 29.0, (28.0, 29.5), 7, "pass"),
        ("lower", 31.0, (30.5, 33.0), 7, "fail"),
        ("lower", 30.0, (30.0, 30.0), 8, "pass"),  # the limit itself is kept
        ("lower", 30.0, None, 8, "undecided"),
    ],
)
def test_the_verdict_rule(
    direction: Any, value: float, interval: tuple[float, float] | None, n: int, outcome: str
) -> None:
    one = Measurement(metric="m", value=value, interval=interval, n=n, unit="", direction=direction)
    verdict = decide(one, 30.0, least_n=8)
    assert verdict.outcome == outcome
    assert str(n) in verdict.reason


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = _report().save(tmp_path)
    for text, problem in (
        ("[" * 50_000, "nested too deeply"),
        (path.read_text().replace('"n": ', '"n": 1, "n": ', 1), "'n' stands there twice"),
        (path.read_text().replace('"after"', '"afer"', 1), r"components\.\w+\.after: missing"),
        ("[]", "not a quality report"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=problem) as refused:
            QualityReport.load(tmp_path)
        assert str(path) in str(refused.value)
        _report().save(tmp_path)
