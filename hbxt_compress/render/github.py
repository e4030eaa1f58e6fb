"""For GitHub: a short summary for a pull request, and annotations of what failed."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from hbxt_compress.render.markdown import controls, escaped
from hbxt_compress.render.table import size
from hbxt_compress.report import QualityReport

__all__ = ["commands", "summary", "tell_github", "write_summary"]

_MARKS = {"pass": "✅", "fail": "❌", "undecided": "⚠️"}


def summary(report: QualityReport) -> str:
    """Markdown of one screen: the verdict, what decided, noise and damage to read it by."""
    name = f"`{escaped(str(report.recipe.get('name', '?')))}`"
    lines = [
        f"### {_MARKS.get(report.outcome, '➖')} {name} on suite "
        f"`{escaped(str(report.suite.get('name', '?')))}`",
        "",
        escaped(report.conclusion),
        "",
        f"{report.n_clips} clips; {size(report.bytes_before)} became {size(report.bytes_after)}.",
        "",
    ]
    told: list[tuple[str, str, str, str]] = [
        (v.against, v.metric.split("[")[0], v.outcome, v.reason) for v in report.verdicts
    ]
    told += [
        ("failure", f.failure, f.outcome, f.text) for f in report.findings if f.outcome != "pass"
    ]
    if told:
        lines += ["| | | | why |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {_MARKS[outcome]} | {against} | {escaped(what)} | {escaped(reason)} |"
            for against, what, outcome, reason in told
        ]
        lines.append("")
    for part in controls(report):
        lines += [part, ""]
    return "\n".join(lines)


def write_summary(folder: Path, report: QualityReport) -> Path:
    """Writes summary.md and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "summary.md"
    path.write_text(summary(report), encoding="utf-8")
    return path


def commands(report: QualityReport) -> list[str]:
    """Workflow commands: an error for each failure, a warning for what is undecided."""
    told = [(v.outcome, f"{v.against}: {v.metric}", v.reason) for v in report.verdicts]
    told += [(f.outcome, f.failure, f.text) for f in report.findings]
    kinds = {"fail": "error", "undecided": "warning"}
    name = report.recipe.get("name", "?")
    return [
        f"::{kinds[outcome]} title={_property(f'quality of {name}, {title}')}::{_data(text)}"
        for outcome, title, text in told
        if outcome in kinds
    ]


def tell_github(
    report: QualityReport, where: str = "", environment: Mapping[str, str] | None = None
) -> None:
    """Inside a GitHub workflow: prints annotations, adds to the step's summary. Else nothing.

    where: the error enters, in a sentence.
    """
    given = os.environ if environment is None else environment
    if given.get("GITHUB_ACTIONS") != "true":
        return
    more = [f"::error title=where the error enters::{_data(where.strip())}"] if where else []
    for line in [*commands(report), *more]:
        sys.stdout.write(line + "\n")
    if path := given.get("GITHUB_STEP_SUMMARY"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(summary(report) + (f"{escaped(where.strip())}\n" if where else "") + "\n")


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
