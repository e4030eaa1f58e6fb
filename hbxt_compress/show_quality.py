"""What a person sees of `hbxt evaluate` and `hbxt compare`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from hbxt_compress import show
from hbxt_compress.render.table import (
    BYTES_HEAD,
    METRICS_HEAD,
    byte_rows,
    calibration,
    control_rows,
    left_out,
    metric_rows,
    size,
)

if TYPE_CHECKING:
    from hbxt_compress.bisection import Bisection
    from hbxt_compress.comparing import Comparison
    from hbxt_compress.report import QualityReport

__all__ = ["bisection", "comparison", "lines", "report"]


def report(found: QualityReport, folder: Path | None, json_wanted: bool) -> None:
    """Prints metrics with their intervals and verdicts, controls, sizes and the conclusion."""
    if json_wanted:
        return show.as_json(found.to_json())
    name = found.recipe.get("name", "?")
    title = f"quality of {name} against full precision, {found.n_clips} clips"
    table = show.table_of(*METRICS_HEAD, title=title)
    for *cells, outcome in metric_rows(found):
        table.add_row(*map(escape, cells), f"[{show.COLOURS.get(outcome, 'dim')}]{outcome}")
    tables = [table]
    if found.controls:
        head, rows = control_rows(found)
        tables.append(show.table_of(*head, title="to read it by"))
        for row in rows:
            tables[-1].add_row(*map(escape, row))
    tables.append(show.table_of(*BYTES_HEAD))
    for row in byte_rows(found):
        tables[-1].add_row(*row, style="bold" if row[0] == "all" else None)
    out = show.console()
    out.print(*tables, *map(escape, _notes(found)), escape(found.conclusion), sep="\n")
    if folder is not None:
        out.print(escape(f"report: {folder / 'report.html'}"), soft_wrap=True)
    return None


def _notes(found: QualityReport) -> Iterator[str]:
    if told := calibration(found):
        yield told
    yield from (f"{step}: {reason}" for step, reason in left_out(found))
    yield from (f"{one.metric}: {one.note}" for one in found.measurements if one.note)
    yield from (f"control {one.name}: {one.note}" for one in found.controls if one.note)
    if found.baseline is not None:
        about = f"baseline {found.baseline.path}, accepted {found.baseline.accepted}"
        yield f"{about}: {found.baseline.note or 'compared clip by clip'}"
    yield from (
        f"{v.metric}: {v.outcome} ({v.against}): {v.reason}"
        for v in found.verdicts
        if v.outcome != "pass" or v.against == "baseline"
    )
    yield from (
        f"{one.failure}: {one.outcome}: {one.text}"
        for one in found.findings
        if one.outcome != "pass"
    )


def comparison(found: Comparison, out: Path | None, json_wanted: bool) -> None:
    """Prints it, and writes the page where one was asked for."""
    if out is not None:
        from hbxt_compress.render.comparison import write_comparison

        write_comparison(out, found.to_json())
    if json_wanted:
        return show.as_json(found.to_json())
    reports = found.reports
    # A recipe is a column: a terminal is too narrow for a column a metric.
    rows = [
        ("bytes", *(size(one.bytes_after) for one in reports)),
        ("s a clip", *(f"{one.seconds:.3g}" if one.seconds else "-" for one in reports)),
        *((m, *(f"{one.values[m]:.4g}" for one in reports)) for m in reports[0].values),
        ("unbeaten", *("yes" if one.unbeaten else "" for one in reports)),
    ]
    columns = ("", *(f">{one.name}" for one in reports))
    show.rows(f"suite {found.suite}, {found.n_clips} clips", columns, rows, list(lines(found)))
    return None


def bisection(found: Bisection, json_wanted: bool) -> None:
    """Prints what each part gains in full precision, and where the error enters."""
    if json_wanted:
        return show.as_json(found.to_json())
    title = f"PSNR {found.psnr_db:.1f} dB over {found.n_clips} clips; with one part put back:"
    rows = [
        (part.name, f"{part.gain_db:+.1f} dB", ", ".join(part.layers))
        for part in (*found.components, *found.blocks)
    ]
    notes = [found.note] if found.note else []
    show.rows(title, ("part", ">gain", "its worst layers"), rows, [*notes, found.text])
    return None


def lines(found: Comparison) -> Iterator[str]:
    """A line a report: where it differs from the first for sure, then how to read the table."""
    first = found.reports[0].name
    for one in found.reports[1:]:
        told = [
            f"{d.metric} {d.word} by {abs(d.value):.3g} {d.unit}".rstrip()
            + f" ({d.interval[0]:.3g} .. {d.interval[1]:.3g})"
            for d in one.differences
            if d.word != "the same"
        ]
        same = [d.metric for d in one.differences if d.word == "the same"]
        told += [f"not told apart: {', '.join(same)}"] if same else []
        yield f"{one.name} against {first}: {'; '.join(told)}"
    yield (
        "Paired over clips, 95 % intervals, worse is above 0, errors in dB; told apart where "
        "p < 0.05 for all differences together (Holm). Unbeaten in bytes, seconds as sampled and "
        f"{found.quality}."
    )
