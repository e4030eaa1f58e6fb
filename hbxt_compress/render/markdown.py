"""report.md: one screen that says what was lost, for what gain, and what the verdict is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hbxt_compress.render.table import (
    BYTES_HEAD,
    METRICS_HEAD,
    byte_rows,
    calibration,
    control_rows,
    metric_rows,
    notes,
)
from hbxt_compress.report import QualityReport

__all__ = ["controls", "escaped", "markdown", "markdown_table", "write_markdown"]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with the head in its first row; cells are escaped."""
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(escaped(cell) for cell in row) + " |" for row in cells)


def escaped(text: str) -> str:
    """Text that Markdown, in a table too, shows as it is."""
    for mark in "\\|`*_[]<":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def controls(report: QualityReport) -> list[str]:
    """Paragraphs: the candidate's means beside what noise and known damage do.

    None where the suite has no controls.
    """
    if not report.controls:
        return []
    notes = [f"{escaped(one.name)}: {escaped(one.note)}" for one in report.controls if one.note]
    return [markdown_table(*control_rows(report)), *notes]


def markdown(report: QualityReport) -> str:
    """The report as Markdown text."""
    name = escaped(str(report.recipe.get("name", "?")))
    suite = escaped(str(report.suite.get("name", "?")))
    parts = [
        f"# Quality of `{name}` on suite `{suite}`",
        f"**{escaped(report.conclusion)}**",
        f"{report.n_clips} clips by the compressed model against {report.n_clips} by the "
        "full-precision model: same prompts, seeds and noise, both through the same runtime. "
        f"{escaped(calibration(report))}".rstrip(),
        markdown_table(METRICS_HEAD, metric_rows(report)),
        *controls(report),
        markdown_table(BYTES_HEAD, byte_rows(report)),
    ]
    reasons = [f"- {escaped(v.metric)}: {v.outcome}, {escaped(v.reason)}" for v in report.verdicts]
    told = [f"- {escaped(name)}: {escaped(note)}" for name, note in notes(report)]
    eyes = dict.fromkeys(
        f"- {escaped(m.extractor)}: sha256 `{m.extractor_sha256}`"
        for m in report.measurements
        if m.extractor
    )
    by = sorted({m.interval_by for m in report.measurements if m.interval_by})
    if by:
        told.append(
            f"- Intervals: {escaped('; '.join(by))} (seed {report.suite.get('measure_seed', 0)})."
        )
    for title, lines in (("Verdicts", reasons), ("Notes", told), ("Extractors", list(eyes))):
        if lines:
            parts += [f"## {title}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def write_markdown(folder: Path, report: QualityReport) -> Path:
    """Writes report.md and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.md"
    path.write_text(markdown(report), encoding="utf-8")
    return path
