"""Several reports as one Markdown table, a row a recipe: what a README shows."""

from __future__ import annotations

from collections.abc import Sequence

from hbxt_compress.render.table import number, size
from hbxt_compress.report import Measurement, QualityReport

__all__ = ["results_table"]


def results_table(reports: Sequence[QualityReport]) -> str:
    """Markdown: bytes in all and by component, then each paired or judged metric with its interval.

    The reports must be of one suite; the line above the table names it, the clips and the versions.
    """
    first = reports[0]
    wanted = [one.metric for one in first.measurements if one.value is not None]
    components = list(first.components)
    head = [
        "recipe",
        "total",
        *components,
        *(_title(one) for one in first.measurements if one.metric in wanted),
    ]
    rows = [head, ["---", *["--:"] * (len(head) - 1)]]
    for report in reports:
        by_name = {one.metric: one for one in report.measurements}
        sizes = [size(report.components[c]["after"]) for c in components]
        values = [_cell(by_name.get(name)) for name in wanted]
        rows.append([f"`{report.recipe['name']}`", size(report.bytes_after), *sizes, *values])
    before = [
        "16-bit source",
        size(first.bytes_before),
        *(size(first.components[c]["before"]) for c in components),
    ]
    rows.insert(2, before + [""] * len(wanted))
    facts = ", ".join(
        f"{name} {version}"
        for name, version in sorted(first.made_with.items())
        if name in ("torch", "diffusers")
    )
    steps = first.suite["n_steps"]
    note = f"Suite {first.suite['name']}: {first.n_clips} clips, {steps} steps; {facts}.\n\n"
    return note + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _title(one: Measurement) -> str:
    arrow = "↑" if one.direction == "higher" else "↓"
    name = one.metric.split("[")[0]
    return f"{name} {arrow}" + (f" ({one.unit})" if one.unit else "")


def _cell(one: Measurement | None) -> str:
    if one is None or one.value is None:
        return "-"
    spread = (
        "" if one.interval is None else f" [{number(one.interval[0])}, {number(one.interval[1])}]"
    )
    return number(one.value) + spread
