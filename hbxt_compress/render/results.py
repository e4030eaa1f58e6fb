"""Several reports as one Markdown table, a row a recipe: what a README shows."""

from __future__ import annotations

from collections.abc import Sequence

from hbxt_compress.render.table import size
from hbxt_compress.report import Measurement, QualityReport

__all__ = ["results_table"]

_SHOWN = (
    "psnr", "ssim", "lpips_squeeze", "temporal_error", "latent_error", "prompt_following",
    "fd_content", "fd_temporal",
)  # fmt: skip
_NOTHING = 1e-9  # rounding of a distance that is exactly zero


def results_table(reports: Sequence[QualityReport]) -> str:
    """Markdown: bytes in all and by component, then each paired or judged metric with its interval.

    The reports must be of one suite; the line above the table names it, the clips and the versions.
    """
    first = reports[0]
    wanted = [
        one.metric
        for one in first.measurements
        if one.value is not None and one.metric.split("[")[0] in _SHOWN
    ]
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
        sizes = [
            size(report.components[c]["after"]) if c in report.components else "-"
            for c in components
        ]
        values = [_cell(by_name.get(name)) for name in wanted]
        rows.append(
            [f"`{report.recipe.get('name', '?')}`", size(report.bytes_after), *sizes, *values]
        )
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
    steps = first.suite.get("n_steps", "?")
    note = (
        f"Suite {first.suite.get('name', '?')}: {first.n_clips} clips, {steps} steps; {facts}.\n\n"
    )
    return note + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _title(one: Measurement) -> str:
    arrow = "↑" if one.direction == "higher" else "↓"
    name = one.metric.split("[")[0]
    return f"{name} {arrow}" + (f" ({one.unit})" if one.unit else "")


def _cell(one: Measurement | None) -> str:
    if one is None or one.value is None:
        return "-"
    value, *ends = (_short(x) for x in (one.value, *(one.interval or ())))
    return f"{value} [{', '.join(ends)}]" if ends else value


def _short(value: float) -> str:
    return "0" if abs(value) < _NOTHING else f"{value:.3g}"
