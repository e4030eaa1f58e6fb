"""The rows of a report's tables as plain text, for the terminal, Markdown and HTML alike."""

from __future__ import annotations

import math
from collections.abc import Mapping

from hbxt_compress.report import Measurement, QualityReport

__all__ = [
    "BYTES_HEAD",
    "METRICS_HEAD",
    "byte_rows",
    "calibration",
    "control_rows",
    "decibel",
    "interval",
    "left_out",
    "metric_rows",
    "notes",
    "number",
    "power_db",
    "size",
]

METRICS_HEAD = (
    "metric",
    "value",
    "95 % interval",
    "worst clip",
    "clips",
    "better",
    "limit",
    "verdict",
)
BYTES_HEAD = ("component", "before", "after", "smaller")


def number(value: float | None) -> str:
    """Four significant digits; a dash for None."""
    return "-" if value is None else f"{value:.4g}"


def decibel(value: float | None) -> str:
    """`4.2 dB`; a dash for None."""
    return "-" if value is None else f"{value:.1f} dB"


def power_db(ratio: float | None) -> str:
    """A power ratio in decibels; a dash for None, `exact` for 0."""
    if ratio is None:
        return "-"
    return decibel(10 * math.log10(ratio)) if ratio > 0 else "exact"


def size(n_bytes: int) -> str:
    """1.23 GB, in powers of 1000."""
    value = float(n_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{n_bytes} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def interval(one: Measurement) -> str:
    """low .. high, or nothing."""
    return "" if one.interval is None else f"{one.interval[0]:.4g} .. {one.interval[1]:.4g}"


def metric_rows(report: QualityReport) -> list[tuple[str, ...]]:
    """A row per measurement, as METRICS_HEAD names them; the unit stands with the value."""
    verdicts = {v.metric: v for v in report.verdicts if v.against == "promise"}
    rows: list[tuple[str, ...]] = []
    for one in report.measurements:
        verdict = verdicts.get(one.metric)
        value = f"{number(one.value)} {one.unit}".strip() if one.value is not None else "-"
        if one.reference is not None:
            value += f" (reference {number(one.reference)})"
        rows.append(
            (
                one.metric,
                value,
                interval(one),
                number(one.worst) if one.worst is not None else "",
                str(one.n or ""),
                one.direction,
                f"{verdict.limit:g}" if verdict else "",
                verdict.outcome if verdict else "",
            )
        )
    return rows


def control_rows(report: QualityReport) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows: the candidate's and each control's mean in every paired metric."""
    metrics = [m for m in report.measurements if m.per_clip and m.family == "fidelity"]
    head = ("what", "clips", *(m.metric for m in metrics))
    own = (str(report.recipe.get("name", "?")), str(report.n_clips))
    rows = [(*own, *(number(m.value) for m in metrics))]
    for one in report.controls:
        values = [one.values.get(m.metric) for m in metrics]
        means = (number(sum(v) / len(v) if v else None) for v in values)
        rows.append((f"{one.name} ({one.kind})", str(one.n or "-"), *means))
    return head, rows


def byte_rows(report: QualityReport) -> list[tuple[str, ...]]:
    """A row per component and one for all, as BYTES_HEAD names them."""
    sizes = {name: (each["before"], each["after"]) for name, each in report.components.items()}
    sizes["all"] = (report.bytes_before, report.bytes_after)
    return [
        (name, size(before), size(after), f"{before / after:.2f}x" if after else "-")
        for name, (before, after) in sizes.items()
    ]


def calibration(report: QualityReport) -> str:
    """What calibration showed the model, in a sentence; nothing where the manifest has none."""
    shown = report.recipe.get("calibration")
    if not isinstance(shown, Mapping):
        return ""
    return f"Calibrated on {shown.get('text', '?')} (set {shown.get('name', '?')})."


def notes(report: QualityReport) -> list[tuple[str, str]]:
    """(metrics, note) for every note of the measurements; metrics that share one stand together.

    First what the recipe asks for and this model did not get.
    """
    found: dict[str, list[str]] = {}
    for one in report.measurements:
        if one.note:
            found.setdefault(one.note, []).append(one.metric.split("[")[0])
    return [*left_out(report), *((", ".join(names), note) for note, names in found.items())]


def left_out(report: QualityReport) -> list[tuple[str, str]]:
    """(step, why not) for each step of the recipe that was not taken, as the manifest has them."""
    steps = report.recipe.get("left_out", [])
    assert isinstance(steps, list)
    return [(one["step"], f"left out: {one['reason']}") for one in steps]
