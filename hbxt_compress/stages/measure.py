"""Measures what compression did to clips: candidate against reference, same prompts and seeds.

Both sides must be the same experiment, else nothing is measured. Unhealthy clips fail before any
metric is computed: a black clip can have a fine PSNR.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from hbxt_compress.clips import Clip, ClipSet, health, write_mp4
from hbxt_compress.errors import UsageError, listing
from hbxt_compress.manifest import Manifest
from hbxt_compress.metrics import (
    METRICS,
    ClipMetric,
    NoReferenceMetric,
    PairMetric,
    SetMetric,
    Unavailable,
    WeightFiles,
)
from hbxt_compress.metrics.apply import between_sets, by_prompt, curves, paired, two_sided
from hbxt_compress.metrics.statistics import conclude, decide
from hbxt_compress.render.markdown import write_markdown
from hbxt_compress.render.page import write_page
from hbxt_compress.render.pictures import side_by_side
from hbxt_compress.report import SCHEMA, ClipRecord, Measurement, QualityReport, Verdict

__all__ = ["measure"]

log = logging.getLogger(__name__)


def measure(
    folder: Path,
    reference: ClipSet,
    candidate: ClipSet,
    *,
    manifest: Manifest,
    suite: Mapping[str, object],
    metrics: Sequence[str],
    limits: Mapping[str, float],
    original: ClipSet | None = None,
    files: WeightFiles | None = None,
    seed: int = 0,
) -> QualityReport:
    """The report on candidate clips; also report.json, .md, .html and clips/*.mp4 in `folder`.

    metrics and limits name entries of METRICS; a limit's metric is measured even if not listed.
    original: of a student, clips of the model that it was distilled from, prompt for prompt. What
    can be compared though it is another map from noise to clips is measured to these, too, under
    names that end in .to_original.

    Raises:
        UsageError: unknown metrics, or sides that differ in number, prompts, seeds, rate or shape.
    """
    names = list(dict.fromkeys([*metrics, *limits]))
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise UsageError(f"unknown metrics {', '.join(unknown)}; known: {', '.join(METRICS)}")
    for side in (reference, *([] if original is None else [original])):
        _refuse_mismatch(side.clips, candidate.clips)
    sides = _Sides(reference.clips, candidate.clips, seed)
    records = tuple(_record(i, *pair) for i, pair in enumerate(sides.pairs()))
    sick = [
        f"clip {i} {r.prompt!r}: {'; '.join(r.problems)}"
        for i, r in enumerate(records)
        if r.problems
    ]

    measured: dict[str, list[Measurement]] = {}
    for k, name in enumerate(names):
        began = time.monotonic()
        weights = files or WeightFiles.from_environment()
        measured[name] = _measured(name, sides, weights, len(sick))
        if original is not None and METRICS[name].family == "distribution":
            other = replace(sides, reference=original.clips)
            measured[name] += [
                replace(one, metric=_to_original(one.metric))
                for one in _measured(name, other, weights, len(sick))
            ]
        log.info("measure: %s, %d of %d, %.1f s", name, k + 1, len(names), time.monotonic() - began)
    verdicts = _verdicts(measured, limits, sick)
    values = tuple(one for found in measured.values() for one in found)
    report = QualityReport(
        schema=SCHEMA,
        recipe=manifest.recipe,
        source=manifest.source,
        suite=dict(suite) | {"measure_seed": seed},
        n_clips=len(records),
        components=manifest.components,
        bytes_before=sum(sizes["before"] for sizes in manifest.components.values()),
        bytes_after=sum(sizes["after"] for sizes in manifest.components.values()),
        measurements=values,
        curves={} if sick else curves(names, sides.pairs()),
        layers=tuple(asdict(layer) for layer in manifest.layers),
        verdicts=verdicts,
        conclusion=conclude(verdicts, limits, values, records),
        clips=records,
        made_with=manifest.made_with,
    )
    for record, pair in zip(records, sides.pairs(), strict=True):
        write_mp4(folder / record.video, side_by_side(*pair), pair[0].fps)
    write_markdown(folder, report)
    write_page(folder, report, sides.reference, sides.candidate)
    report.save(folder)
    return report


@dataclass(frozen=True, slots=True)
class _Sides:
    """Clips of both sides in suite order, and the seed of every resampling."""

    reference: tuple[Clip, ...]
    candidate: tuple[Clip, ...]
    seed: int

    def pairs(self) -> list[tuple[Clip, Clip]]:
        return list(zip(self.reference, self.candidate, strict=True))


def _to_original(metric: str) -> str:
    """The name of a metric to the original's clips; an extractor in brackets stays behind it."""
    name, bracket, extractor = metric.partition("[")
    return f"{name}.to_original{bracket}{extractor}"


def _refuse_mismatch(reference: Sequence[Clip], candidate: Sequence[Clip]) -> None:
    if len(reference) != len(candidate) or not reference:
        raise UsageError(
            f"{len(reference)} reference and {len(candidate)} candidate clips: sample both again"
        )
    problems = []
    for i, (a, b) in enumerate(zip(reference, candidate, strict=True)):
        problems += [
            f"clip {i}: {what} {one!r} and {other!r}"
            for what, one, other in (
                ("prompt", a.prompt, b.prompt),
                ("seed", a.seed, b.seed),
                ("frames per second", a.fps, b.fps),
                ("shape", a.frames.shape, b.frames.shape),
            )
            if one != other
        ]
        if a.frames.shape != reference[0].frames.shape:
            problems.append(
                f"clip {i}: shape {a.frames.shape}, clip 0 has {reference[0].frames.shape}"
            )
    if problems:
        raise UsageError(
            "reference and candidate are not the same experiment; sample both with one suite:\n"
            + listing(problems)
        )


def _record(index: int, reference: Clip, candidate: Clip) -> ClipRecord:
    problems = []
    for side, clip in (("reference", reference), ("candidate", candidate)):
        found = health(clip.frames)
        if clip.latents is not None and not np.isfinite(clip.latents).all():
            found.append("latents are not finite")
        problems += [f"{side} {problem}" for problem in found]
    return ClipRecord(
        prompt=reference.prompt,
        seed=reference.seed,
        reference_sha256=reference.sha256,
        candidate_sha256=candidate.sha256,
        video=f"clips/{index:04d}.mp4",
        problems=tuple(problems),
    )


def _measured(name: str, sides: _Sides, files: WeightFiles, n_sick: int) -> list[Measurement]:
    """The measurements of one metric, its own first; value None and a note where there is none."""
    metric = METRICS[name]
    empty = Measurement(
        metric=name, value=None, interval=None, n=0, unit=metric.unit, direction=metric.direction,
        family=metric.family,
    )  # fmt: skip
    if n_sick:
        return [replace(empty, note=f"not measured: {n_sick} unhealthy clips")]
    try:
        metric = metric.load(files)
        empty = replace(
            empty,
            metric=metric.name,
            extractor=metric.extractor,
            extractor_sha256=metric.extractor_sha256,
        )
        if isinstance(metric, PairMetric):
            return [paired(metric.compare, empty, sides.pairs(), sides.seed)]
        if isinstance(metric, SetMetric):
            return [between_sets(metric, empty, sides.reference, sides.candidate, sides.seed)]
        if isinstance(metric, NoReferenceMetric):
            return [two_sided(metric, empty, sides.pairs(), sides.seed)]
        assert isinstance(metric, ClipMetric)
        return by_prompt(metric, empty, sides.pairs(), sides.seed)
    except Unavailable as reason:
        return [replace(empty, note=str(reason))]


def _verdicts(
    measured: Mapping[str, Sequence[Measurement]], limits: Mapping[str, float], sick: Sequence[str]
) -> tuple[Verdict, ...]:
    if sick:
        reason = f"{len(sick)} unhealthy clips:\n{listing(sick)}"
        return (Verdict(metric="health", limit=0.0, outcome="fail", reason=reason),)
    verdicts = [
        decide(measured[name][0], limit, METRICS[name].least_n)
        for name, limit in limits.items()
        if measured[name][0].value is not None
    ]
    if limits and not verdicts:  # a promise that nothing can check is not a kept one
        verdicts = [
            Verdict(metric=name, limit=limit, outcome="undecided", reason=measured[name][0].note)
            for name, limit in limits.items()
        ]
    return tuple(verdicts)
