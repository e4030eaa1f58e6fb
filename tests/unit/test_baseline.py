"""Accepted baselines: written from a report, read back, compared with, refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbxt_compress import library
from hbxt_compress.baseline import Accepted, accept_report, experiment_of, find_baseline
from hbxt_compress.errors import UsageError
from hbxt_compress.report import SCHEMA, Control, Measurement, QualityReport, Verdict
from hbxt_compress.stages.against import against_baseline

_N = 12


def report_of(psnr: np.ndarray, **changed: Any) -> QualityReport:
    """A report with one paired metric."""
    one = Measurement(
        metric="psnr", value=float(psnr.mean()), interval=(float(psnr.min()), float(psnr.max())),
        n=len(psnr), unit="dB", direction="higher", per_clip=tuple(map(float, psnr)),
    )  # fmt: skip
    suite = {"name": "tiny", "n_steps": 6, "experiment": experiment_of([["a", 1]], 6)}
    return replace(
        QualityReport(
            schema=SCHEMA, recipe={"name": "w4a16"}, source={"files": {"a": "1"}}, suite=suite,
            n_clips=len(psnr), components={}, bytes_before=20, bytes_after=10, measurements=(one,),
            curves={}, layers=(), verdicts=(), conclusion="", clips=(), made_with={"torch": "2"},
            artifact="f" * 64, seconds={}, controls=(), findings=(), baseline=None,
        ),
        **changed,
    )  # fmt: skip


def _told(report: QualityReport) -> tuple[Any, Any, int]:
    return report.suite, report.source, report.n_clips


def _values(seed: int = 0, less: float = 0.0) -> np.ndarray:
    return 40 + np.random.default_rng(seed).normal(size=_N) - less


def test_what_is_accepted_comes_back_and_reads_like_code(tmp_path: Path) -> None:
    path = accept_report(
        report_of(_values()), why="good", out=tmp_path / "a" / "b.json", force=False
    )
    accepted = Accepted.load(path)
    assert accepted.per_clip["psnr"] == pytest.approx(_values(), rel=1e-5)
    assert (accepted.recipe, accepted.suite, accepted.why) == ("w4a16", "tiny", "good")
    assert accepted.file_name == "w4a16@tiny.json"
    lines = path.read_text().splitlines()
    assert sum('"psnr"' in line for line in lines) == 2  # a metric a line
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


def test_the_default_place_is_the_librarys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "folder", lambda shelf: tmp_path / shelf)
    path = accept_report(report_of(_values()), why="good", out=None, force=False)
    assert path == tmp_path / "eval/baselines/w4a16@tiny.json"
    found = find_baseline(None, "w4a16", "tiny")
    assert found is not None
    assert found[0] == "eval/baselines/w4a16@tiny.json"
    assert find_baseline(None, "w4a16", "standard") is None
    assert find_baseline("none", "w4a16", "tiny") is None
    with pytest.raises(UsageError, match="no readable baseline"):
        find_baseline(str(tmp_path / "absent.json"), "w4a16", "tiny")


def test_a_failing_report_is_accepted_by_force_only(tmp_path: Path) -> None:
    verdict = Verdict(metric="psnr", limit=60.0, outcome="fail", reason="40, must be at least 60")
    bad = report_of(_values(), verdicts=(verdict,), conclusion="FAIL: broken")
    with pytest.raises(UsageError, match="FAIL: broken"):
        accept_report(bad, why="", out=tmp_path / "b.json", force=False)
    assert accept_report(bad, why="known", out=tmp_path / "b.json", force=True).is_file()
    nothing = report_of(_values(), measurements=())
    with pytest.raises(UsageError, match="nothing measured"):
        accept_report(nothing, why="", out=tmp_path / "b.json", force=True)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema": 7}, "schema 7"),
        ({"n_clips": "x"}, "n_clips: not a count"),
        ({"why": 3}, "why: not a text"),
        ({"made_with": ["a"]}, "made_with: not versions"),
        ({"per_clip": {"psnr": [1.0]}}, "per_clip.psnr: not numbers"),
        ({"values": {"psnr": ["a"]}}, "values.psnr: not numbers"),
        ({"more": 1}, "more: unknown"),
    ],
)
def test_what_is_no_baseline_is_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    path = accept_report(report_of(_values()), why="good", out=tmp_path / "b.json", force=False)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError, match=told):
        Accepted.load(path)
    path.write_text("{")
    with pytest.raises(UsageError, match="no readable baseline"):
        Accepted.load(path)
    path.write_text("[1]")
    with pytest.raises(UsageError, match="expected a JSON object"):
        Accepted.load(path)


@pytest.mark.parametrize(("less", "outcome"), [(0.0, "pass"), (4.0, "fail"), (-4.0, "pass")])
def test_a_candidate_is_held_against_it(less: float, outcome: str) -> None:
    accepted = Accepted.of(report_of(_values()), "2026-01-02", "good")
    candidate = report_of(_values(less=less))
    about, verdicts = against_baseline(
        ("b.json", accepted), candidate.measurements, (), _told(candidate), 0
    )
    assert (about.path, about.accepted, about.note) == ("b.json", "2026-01-02", "")
    assert [(v.metric, v.outcome, v.against) for v in verdicts] == [("psnr", outcome, "baseline")]


def test_noise_is_no_regression() -> None:
    perfect = Accepted.of(report_of(np.full(_N, 100.0)), "2026-01-02", "full precision")
    candidate = report_of(_values(1) + 50)
    noise = Control(
        name="ulp", kind="noise", text="", n=8, values={"psnr": tuple(_values(2)[:8] + 50)}
    )
    for controls, outcome in (((), "fail"), ((noise,), "pass")):
        told = _told(candidate)
        _, (verdict,) = against_baseline(("b", perfect), candidate.measurements, controls, told, 0)
        assert verdict.outcome == outcome


@pytest.mark.parametrize(
    ("changed", "note"),
    [
        ({"source": {"files": {"a": "2"}}}, "another model"),
        ({"suite": {"name": "tiny", "experiment": "x"}}, "other prompts"),
    ],
)
def test_what_is_another_experiment_is_not_compared(changed: dict[str, Any], note: str) -> None:
    accepted = Accepted.of(report_of(_values()), "2026-01-02", "good")
    candidate = report_of(_values(), **changed)
    about, verdicts = against_baseline(
        ("b", accepted), candidate.measurements, (), _told(candidate), 0
    )
    assert note in about.note
    assert verdicts == ()
