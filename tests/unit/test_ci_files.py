"""What CI reads of a report: JUnit XML, a summary, annotations; and the workflow to copy."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as Xml

import numpy as np
import pytest
import yaml

from hbxt_compress.cli import hbxt
from hbxt_compress.render.github import commands, summary, tell_github
from hbxt_compress.render.junit import junit
from hbxt_compress.report import Control, Finding, Measurement, QualityReport, Verdict
from tests.unit.test_baseline import report_of

_ROOT = Path(__file__).parents[2]
_NASTY = 'a|b <c> & "d"\x07 ::error::, 100 %\nnext'


@pytest.fixture
def report() -> QualityReport:
    found = Finding(
        failure="slow_motion", outcome="undecided", value=-0.06, interval=(-0.13, 0.01),
        tolerance=0.04, unit="%", n=12, clips=(), n_needed=40, text="perhaps slower: 40 would tell",
    )  # fmt: skip
    verdicts = (
        Verdict(metric="psnr", limit=30.0, outcome="pass", reason="fine"),
        Verdict(metric="ssim", limit=1.0, outcome="fail", reason=_NASTY, against="baseline"),
    )
    missing = Measurement(
        metric="fvd_i3d", value=None, interval=None, n=0, unit="", direction="lower", note="no file"
    )
    one = report_of(40 + np.arange(12.0))
    noise = Control(name="ulp", kind="noise", text="", n=2, values={"psnr": (90.0, 92.0)})
    none = Control(name="provider", kind="noise", text="", n=0, values={}, note="only the CPU")
    return replace(
        one, verdicts=verdicts, findings=(found,), conclusion=_NASTY,
        measurements=(*one.measurements, missing), controls=(noise, none),
    )  # fmt: skip


def test_junit_counts_and_survives_any_text(report: QualityReport) -> None:
    suite = Xml.fromstring(junit(report).partition("\n")[2])[0]
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "4", "failures": "1", "errors": "1", "skipped": "1"}
    failure = suite.find(".//failure")
    assert failure is not None
    assert failure.text == _NASTY.replace("\x07", "?")
    assert {case.get("name") for case in suite} == {
        "promise.psnr", "baseline.ssim", "failure.slow_motion", "metric.fvd_i3d",
    }  # fmt: skip


def test_annotations_are_one_line_each(report: QualityReport) -> None:
    error, warning = commands(report)
    assert error.startswith("::error title=quality of w4a16%2C baseline%3A ssim::")
    assert "100 %25%0Anext" in error
    assert warning.startswith("::warning title=quality of w4a16%2C slow_motion::perhaps")
    assert not any("\n" in line for line in (error, warning))


def test_the_summary_is_a_screen_with_what_to_read_it_by(report: QualityReport) -> None:
    text = summary(report)
    assert "❌" in text.splitlines()[0]
    assert "| ulp (noise) | 2 | 91 |" in text
    assert "provider: only the CPU" in text
    assert "slow\\_motion" in text
    assert "\\<c>" in text  # escaped, so no tag
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in tables}) <= 2
    assert len(text.splitlines()) < 40


def test_github_is_told_only_inside_a_workflow(
    report: QualityReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tell_github(report, "", {})
    assert capsys.readouterr().out == ""
    step = tmp_path / "summary.md"
    step.write_text("before\n")
    given = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(step)}
    tell_github(report, "in transformer/blocks.3", given)
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["::error", "::warning", "::error"]
    assert "transformer/blocks.3" in out[-1]
    assert step.read_text().startswith("before\n### ❌")


def test_the_workflow_runs_commands_that_there_are() -> None:
    workflow = yaml.safe_load((_ROOT / ".github/workflows/quality.yml").read_text())
    (job,) = workflow["jobs"].values()
    runs = [step["run"] for step in job["steps"] if "run" in step]
    used = [line.split()[1] for line in runs if line.startswith(".venv/bin/hbxt")]
    assert used == ["quantize", "evaluate"]
    for line in runs:
        for option in re.findall(r"--([a-z-]+)", line):
            command = hbxt.commands[line.split()[1]]
            assert f"--{option}" in {name for one in command.params for name in one.opts}
    for name in job["strategy"]["matrix"]["recipe"]:
        assert (_ROOT / "recipes" / f"{name}.yaml").is_file()


def test_the_workflow_never_takes_results_of_other_code() -> None:
    """Keys of results hold what they are made of and a stage's VERSION, not the code between."""
    workflow = yaml.safe_load((_ROOT / ".github/workflows/quality.yml").read_text())
    (job,) = workflow["jobs"].values()
    (cache,) = (step["with"] for step in job["steps"] if "cache" in step.get("uses", ""))
    assert "hashFiles('hbxt_compress/**'" in cache["key"]
    assert "restore-keys" not in cache
