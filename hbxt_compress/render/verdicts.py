"""What decided: promises, baseline and failures found, worst first, with their reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hbxt_compress.report import Finding, QualityReport, Verdict

__all__ = ["MARKS", "Decision", "baseline_lines", "decisions", "findings", "undecided_line"]

MARKS: Final = {"pass": "✓", "fail": "✗", "undecided": "?", "none": "–"}
_WORST_FIRST = ("fail", "undecided", "pass")
_AGAINST = {"promise": "promise", "baseline": "accepted baseline", "health": "health of the clips"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One verdict in words. clips: about how many would decide it, or nothing."""

    outcome: str
    against: str
    metric: str
    reason: str
    clips: str


def decisions(report: QualityReport) -> list[Decision]:
    """The verdicts, failed ones first."""
    found = [
        Decision(
            outcome=one.outcome,
            against=_AGAINST[one.against],
            metric=one.metric.split("[")[0],
            reason=one.reason,
            clips="" if one.n_needed is None else str(one.n_needed),
        )
        for one in report.verdicts
    ]
    return sorted(found, key=lambda one: _WORST_FIRST.index(one.outcome))


def findings(report: QualityReport) -> list[Finding]:
    """What the failure detectors say, failures first."""
    return sorted(report.findings, key=lambda one: _WORST_FIRST.index(one.outcome))


def undecided_line(report: QualityReport) -> str:
    """How many clips would decide what is undecided, in a sentence; nothing if all is decided."""
    told: list[Verdict | Finding] = [*report.verdicts, *report.findings]
    open_ = [one for one in told if one.outcome == "undecided"]
    needed = [one.n_needed for one in open_ if one.n_needed is not None]
    if not open_:
        return ""
    what = "1 point is" if len(open_) == 1 else f"{len(open_)} points are"
    if not needed:
        return f"{what} undecided, and it cannot be told how many clips would decide."
    some = "" if len(needed) == len(open_) else f" {len(needed)} of them"
    return f"{what} undecided; about {max(needed)} clips would decide{some}."


def baseline_lines(report: QualityReport) -> list[str]:
    """Which accepted measurement the clips were held against, and what was made otherwise."""
    one = report.baseline
    if one is None:
        return []
    lines = [f"Accepted baseline: {one.path}, of {one.accepted}."]
    if one.note:
        lines.append(f"Not compared: {one.note}.")
    names = sorted(one.made_with.keys() | report.made_with.keys())
    other = [
        f"{name} {one.made_with.get(name, 'none')}, now {report.made_with.get(name, 'none')}"
        for name in names
        if one.made_with.get(name) != report.made_with.get(name)
    ]
    if other:
        lines.append(f"Made with other versions, which may tell, too: {'; '.join(other)}.")
    return lines
