"""report.html: one file that works offline, with the clips in it, worst first."""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from hbxt_compress.clips import Clip
from hbxt_compress.render.cards import N_OPEN, SPARKS, cards, worst_first
from hbxt_compress.render.charts import bar_chart, line_chart
from hbxt_compress.render.heatmap import heat_map
from hbxt_compress.render.jinja import environment
from hbxt_compress.render.strip import KINDS, strips
from hbxt_compress.render.table import (
    BYTES_HEAD,
    METRICS_HEAD,
    byte_rows,
    calibration,
    metric_rows,
    notes,
    size,
)
from hbxt_compress.render.verdicts import (
    MARKS,
    baseline_lines,
    decisions,
    findings,
    undecided_line,
)
from hbxt_compress.report import QualityReport

__all__ = ["MOST_BYTES", "page", "write_page"]

log = logging.getLogger(__name__)

MOST_BYTES = 15_000_000
_MOST_PICTURE_BYTES = 12_000_000
_BAND = (10, 90)


def page(report: QualityReport, reference: Sequence[Clip], candidate: Sequence[Clip]) -> str:
    """The report as one HTML text below 15 MB that asks for nothing outside itself."""
    made = environment()
    shown = cards(report, reference, candidate, _MOST_PICTURE_BYTES)
    script = made.get_template("report.js.j2").render()
    text = made.get_template("report.html.j2").render(
        report=report,
        script=Markup(script),
        script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        marks=MARKS,
        decisions=decisions(report),
        findings=findings(report),
        undecided=undecided_line(report),
        baseline=baseline_lines(report),
        metric_head=METRICS_HEAD,
        metric_rows=metric_rows(report),
        strips=[(one, Markup(one.svg)) for one in strips(report)],
        kinds=KINDS,
        beside=_beside(report),
        bytes_head=BYTES_HEAD,
        byte_rows=byte_rows(report),
        bytes_chart=_bytes_chart(report),
        curves=_curves(report),
        heat=heat_map(report.layers),
        layers=sorted(report.layers, key=lambda layer: -_error(layer)),
        open_cards=shown[:N_OPEN],
        more_cards=shown[N_OPEN:],
        scores=_scores(report),
        n_left_out=report.n_clips - len(shown),
        lossless=all(one.lossless for card in shown for one in card.sheets),
        calibration=calibration(report),
        player=_player(reference, shown[0].sheets[0].shown) if shown else None,
        notes=notes(report),
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


def _player(reference: Sequence[Clip], shown: Sequence[int]) -> dict[str, object]:
    """Which frames there are, and how long each stays; all clips of a suite have one shape."""
    first = reference[0]
    n_frames = len(first.frames)
    wait_ms = 1000 * n_frames / (first.fps * len(shown))
    return {"shown": " ".join(map(str, shown)), "n_frames": n_frames, "wait_ms": round(wait_ms, 1)}


def _error(layer: Mapping[str, object]) -> float:
    error = layer.get("error")
    return float(error) if isinstance(error, int | float) else -1.0


def _scores(report: QualityReport) -> dict[str, object]:
    """All values of single clips, worst clips first."""
    told = [m for m in report.measurements if len(m.per_clip) == report.n_clips]
    rows = [(i, [m.per_clip[i] for m in told]) for i in worst_first(report)] if told else []
    return {"names": [m.metric.split("[")[0] for m in told], "rows": rows}


def _beside(report: QualityReport) -> list[tuple[str, str, int, list[float | None]]]:
    """(name, kind, clips, mean of each strip's metric): the candidate, then the controls.

    A control of fewer clips than the suite has is read beside the candidate's on the same ones.
    """
    measured = [
        m
        for m in report.measurements
        if m.family == "fidelity" and m.per_clip and m.value is not None
    ]
    if not measured:
        return []
    name = str(report.recipe.get("name", "candidate"))

    def mean(values: Sequence[float]) -> float | None:
        return float(np.mean(values)) if values else None

    def own(n: int) -> tuple[str, str, int, list[float | None]]:
        return name, KINDS["candidate"], n, [mean(m.per_clip[:n]) for m in measured]

    fewer = sorted({one.n for one in report.controls if 0 < one.n < report.n_clips})
    rows = [own(report.n_clips), *(own(n) for n in fewer)]
    for one in report.controls:
        values = [mean(one.values.get(m.metric, ())) for m in measured]
        rows.append((one.name, KINDS[one.kind], one.n, values))
    return rows


def _bytes_chart(report: QualityReport) -> Markup:
    rows = [
        (
            name,
            {"before": each["before"], "after": each["after"]},
            f"{size(each['before'])} to {size(each['after'])}",
        )
        for name, each in report.components.items()
    ]
    return Markup(bar_chart(rows))  # chart text is escaped where it is made


def _curves(report: QualityReport) -> list[tuple[str, Markup]]:
    found = []
    for name, values in report.curves.items():
        y_label, x_label, _ = SPARKS.get(name, (name.split("/")[0], name.split("/")[-1], False))
        rows = [c.curves[name] for c in report.clips if len(c.curves.get(name, ())) == len(values)]
        band, told = None, ""
        if len(rows) > 1:
            low, high = np.percentile(np.array(rows), _BAND, axis=0)
            band, told = (low.tolist(), high.tolist()), "; band: 10 to 90 % of clips"
        title = f"{y_label[0].upper()}{y_label[1:]} by {x_label}, mean over clips{told}"
        chart = line_chart(values, x_label=x_label, y_label=y_label, band=band)
        found.append((title, Markup(chart)))
    return found
