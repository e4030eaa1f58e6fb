"""Cards: all that the page shows of each clip, worst clips first, as many as fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from hbxt_compress.clips import Clip
from hbxt_compress.render.charts import spark
from hbxt_compress.render.pictures import Sheet, poster, sheet
from hbxt_compress.render.table import number
from hbxt_compress.report import ClipRecord, QualityReport

__all__ = ["N_OPEN", "SPARKS", "Card", "cards", "worst_first"]

N_OPEN = 5  # clips that are shown at once; the others wait until they are asked for


# curve -> its y axis, what its x axis counts, whether the player's cursor runs along it
SPARKS = {
    "psnr/frame": ("PSNR in dB", "frame", True),
    "latent_error/step": ("relative latent error", "denoising step", False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One clip. poster: WebP of one frame, a data URI; at: the frame it shows, from 0."""

    index: int
    record: ClipRecord
    scores: tuple[tuple[str, str], ...]
    sheets: tuple[Sheet, Sheet]
    poster: str
    at: int
    sparks: tuple[tuple[str, Markup], ...]


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


def cards(
    report: QualityReport, reference: Sequence[Clip], candidate: Sequence[Clip], most_bytes: int
) -> list[Card]:
    """Cards of as many clips as fit into most_bytes of pictures, worst first.

    Lossless are all, or only those that are shown at once, or none: whatever lets all of them fit.
    """
    found: list[Card] = []
    for n_lossless in (report.n_clips, N_OPEN, 0):
        found, n_bytes = [], 0
        for place, i in enumerate(worst_first(report)):
            lossless = place < n_lossless
            card = _card(report, i, (reference[i], candidate[i]), lossless=lossless)
            n_bytes += len(card.poster) + sum(len(one.uri) for one in card.sheets)
            if n_bytes > most_bytes:
                break
            found.append(card)
        if len(found) == report.n_clips:
            break
    return found


def _card(report: QualityReport, i: int, pair: tuple[Clip, Clip], *, lossless: bool) -> Card:
    record = report.clips[i]
    a, b = (sheet(clip.frames, lossless=lossless) for clip in pair)
    frames = record.curves.get("psnr/frame", ())
    at = int(np.argmin(frames)) if frames else len(pair[0].frames) // 2
    return Card(
        index=i,
        record=record,
        scores=tuple(
            (m.metric.split("[")[0], f"{number(m.per_clip[i])} {m.unit}".strip())
            for m in report.measurements
            if len(m.per_clip) == report.n_clips and "." not in m.metric
        ),
        sheets=(a, b),
        poster=poster(pair[0].frames[at], pair[1].frames[at]),
        at=at,
        sparks=_sparks(record.curves),
    )


def _sparks(curves: Mapping[str, Sequence[float]]) -> tuple[tuple[str, Markup], ...]:
    return tuple(
        (title, Markup(spark(curves[name], label=title, x_label=x, cursor=cursor)))
        for name, (title, x, cursor) in SPARKS.items()
        if curves.get(name)
    )
