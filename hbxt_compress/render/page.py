"""report.html: one file that works offline, with the clips in it, worst first."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hbxt_compress.clips import Clip
from hbxt_compress.render.charts import bar_chart, line_chart
from hbxt_compress.render.pictures import Sheet, sheet
from hbxt_compress.render.table import (
    BYTES_HEAD,
    METRICS_HEAD,
    byte_rows,
    calibration,
    decibel,
    metric_rows,
    notes,
    number,
    power_db,
    size,
)
from hbxt_compress.report import QualityReport

__all__ = ["MOST_BYTES", "page", "worst_first", "write_page"]

log = logging.getLogger(__name__)

MOST_BYTES = 15_000_000
_MOST_PICTURE_BYTES = 12_000_000
_MOST_BARS = 40
_CHARTS = {
    "latent_error/step": ("denoising step", "relative error of the latents"),
    "psnr/frame": ("frame", "PSNR in dB"),
}


def worst_first(report: QualityReport) -> list[int]:
    """Clip numbers, unhealthy ones first, then by the first fidelity metric with a value per clip.

    LPIPS is asked before PSNR and the others, for it is nearest to what people see.
    """
    told = [
        m
        for m in report.measurements
        if m.family == "fidelity" and len(m.per_clip) == report.n_clips
    ]
    told.sort(key=lambda m: not m.metric.startswith("lpips"))
    badness = np.zeros(report.n_clips)
    if told:
        badness = np.array(told[0].per_clip) * (-1 if told[0].direction == "higher" else 1)
    return sorted(range(report.n_clips), key=lambda i: (not report.clips[i].problems, -badness[i]))


def page(report: QualityReport, reference: Sequence[Clip], candidate: Sequence[Clip]) -> str:
    """The report as one HTML text below 15 MB that asks for nothing outside itself."""
    environment = Environment(
        loader=PackageLoader("hbxt_compress.render"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    order = worst_first(report)
    shown = _sheets(order, reference, candidate)
    cards = [
        {
            "index": i,
            "record": report.clips[i],
            "scores": [
                f"{m.metric.split('[')[0]} {number(m.per_clip[i])}{f' {m.unit}' if m.unit else ''}"
                for m in report.measurements
                if len(m.per_clip) == report.n_clips and "." not in m.metric
            ],
            "sheets": pair,
        }
        for i, pair in shown.items()
    ]
    measured = sorted(report.layers, key=lambda layer: -_error(layer))
    text = environment.get_template("report.html.j2").render(
        report=report,
        metric_head=METRICS_HEAD,
        metric_rows=metric_rows(report),
        bytes_head=BYTES_HEAD,
        byte_rows=byte_rows(report),
        bytes_chart=_bytes_chart(report),
        curves=_curves(report),
        layers_chart=_layers_chart(measured),
        layers=measured,
        cards=cards,
        n_left_out=report.n_clips - len(cards),
        lossless=all(one.lossless for card in shown.values() for one in card),
        calibration=calibration(report),
        fps=reference[0].fps if reference else 8.0,
        notes=notes(report),
        number=number,
        size=size,
        power_db=power_db,
        decibel=decibel,
    )
    n_bytes = len(text.encode())
    if n_bytes > MOST_BYTES:
        log.warning("report.html has %s: open it with patience", size(n_bytes))
    return text


def write_page(
    folder: Path, report: QualityReport, reference: Sequence[Clip], candidate: Sequence[Clip]
) -> Path:
    """Writes report.html and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    path.write_text(page(report, reference, candidate), encoding="utf-8")
    return path


def _sheets(
    order: Sequence[int], reference: Sequence[Clip], candidate: Sequence[Clip]
) -> dict[int, tuple[Sheet, Sheet]]:
    """Pictures of as many clips as fit, worst first; lossless if then all of them fit."""
    found: dict[int, tuple[Sheet, Sheet]] = {}
    for lossless in (True, False):
        found, n_bytes = {}, 0
        for i in order:
            pair = tuple(
                sheet(side[i].frames, lossless=lossless) for side in (reference, candidate)
            )
            n_bytes += sum(len(one.uri) for one in pair)
            if n_bytes > _MOST_PICTURE_BYTES:
                break
            found[i] = (pair[0], pair[1])
        if len(found) == len(order):
            break
    return found


def _error(layer: Mapping[str, object]) -> float:
    error = layer.get("error")
    return float(error) if isinstance(error, int | float) else -1.0


def _layers_chart(layers: Sequence[Mapping[str, object]]) -> Markup | None:
    rows = [
        (str(layer["name"]), {"after": _error(layer)}, f"{_error(layer):.3g} {layer['format']}")
        for layer in layers[:_MOST_BARS]
        if _error(layer) >= 0
    ]
    return Markup(bar_chart(rows)) if rows else None  # chart text is escaped where it is made


def _bytes_chart(report: QualityReport) -> Markup:
    rows = [
        (
            name,
            {"before": each["before"], "after": each["after"]},
            f"{size(each['before'])} to {size(each['after'])}",
        )
        for name, each in report.components.items()
    ]
    return Markup(bar_chart(rows))


def _curves(report: QualityReport) -> list[tuple[str, Markup]]:
    found = []
    for name, values in report.curves.items():
        x_label, y_label = _CHARTS.get(name, (name.split("/")[-1], name.split("/")[0]))
        title = f"{y_label[0].upper()}{y_label[1:]} by {x_label}, mean over clips"
        found.append((title, Markup(line_chart(values, x_label=x_label, y_label=y_label))))
    return found
