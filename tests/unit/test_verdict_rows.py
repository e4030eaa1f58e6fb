"""What decided, in rows and sentences: worst first, with the clips that would decide the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hbxt_compress.render.table import metric_rows
from hbxt_compress.render.verdicts import baseline_lines, decisions, findings, undecided_line
from hbxt_compress.report import SCHEMA, Baseline, Finding, Measurement, QualityReport, Verdict


def _verdict(outcome: str, n_needed: int | None = None, against: str = "promise") -> Verdict:
    return Verdict(
        metric="psnr[x@1]", limit=30.0, outcome=outcome, reason="why",  # type: ignore[arg-type]
        against=against, n_needed=n_needed,  # type: ignore[arg-type]
    )  # fmt: skip


def _finding(outcome: str, n_needed: int | None = None) -> Finding:
    return Finding(
        failure="frozen_frames", outcome=outcome, value=0.1, interval=None,  # type: ignore[arg-type]
        tolerance=0.2, unit="", n=8, clips=(1,), n_needed=n_needed, text="t",
    )  # fmt: skip


def _report(*verdicts: Verdict, found: tuple[Finding, ...] = ()) -> QualityReport:
    return QualityReport(
        schema=SCHEMA, recipe={"name": "r"}, source={}, suite={}, n_clips=8, components={},
        bytes_before=0, bytes_after=0, measurements=(), curves={}, layers=(), verdicts=verdicts,
        conclusion="", clips=(), made_with={"numpy": "2", "onnx": "1"}, artifact="", seconds={},
        controls=(), findings=found, baseline=None,
    )  # fmt: skip


def test_failures_come_first_and_say_against_what() -> None:
    report = _report(
        _verdict("pass"), _verdict("undecided", 24), _verdict("fail", None, "baseline")
    )
    rows = decisions(report)
    assert [(one.outcome, one.against, one.clips) for one in rows] == [
        ("fail", "accepted baseline", ""), ("undecided", "promise", "24"), ("pass", "promise", ""),
    ]  # fmt: skip
    assert rows[0].metric == "psnr"
    shown = findings(_report(found=(_finding("pass"), _finding("fail"))))
    assert [one.outcome for one in shown] == ["fail", "pass"]


@pytest.mark.parametrize(
    ("verdicts", "found", "said"),
    [
        ((_verdict("pass"),), (), ""),
        ((_verdict("undecided", 24),), (), "1 point is undecided; about 24 clips would decide."),
        (
            (_verdict("undecided", 24), _verdict("undecided")), (_finding("undecided", 90),),
            "3 points are undecided; about 90 clips would decide 2 of them.",
        ),
        ((_verdict("undecided"),), (), "cannot be told how many"),
    ],
)  # fmt: skip
def test_how_many_clips_would_decide(
    verdicts: tuple[Verdict, ...], found: tuple[Finding, ...], said: str
) -> None:
    line = undecided_line(_report(*verdicts, found=found))
    assert said in line
    assert bool(line) == bool(said)


def test_a_baseline_says_where_it_lies_and_what_was_made_otherwise() -> None:
    one = Baseline(
        path="b.json", accepted="2026-01-31", artifact="", note="too few clips",
        made_with={"numpy": "1", "onnx": "1", "gone": "3"},
    )  # fmt: skip
    lines = baseline_lines(replace(_report(), baseline=one))
    assert lines[0] == "Accepted baseline: b.json, of 2026-01-31."
    assert lines[1] == "Not compared: too few clips."
    assert "gone 3, now none; numpy 1, now 2" in lines[2]
    assert "onnx" not in lines[2]
    assert baseline_lines(_report()) == []


def test_a_metrics_row_has_the_promises_limit_not_the_baselines() -> None:
    measured = Measurement(
        metric="psnr[x@1]", value=31.0, interval=None, n=8, unit="dB", direction="higher"
    )
    worse = replace(_verdict("fail", None, "baseline"), limit=1.0)
    report = replace(_report(_verdict("pass"), worse), measurements=(measured,))
    assert metric_rows(report)[0][-2:] == ("30", "pass")
    assert metric_rows(replace(report, verdicts=(worse,)))[0][-2:] == ("", "")
