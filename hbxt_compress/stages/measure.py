"""Measures what compression did to clips: candidate against reference, same prompts and seeds.

Both sides must be the same experiment, else nothing is measured. Unhealthy clips fail before any
metric is computed: a black clip can have a fine PSNR. Clips are read pair by pair, so memory does
not grow with their number.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from hbxt_compress.baseline import Accepted
from hbxt_compress.clips import Clip, ClipSet, health, write_mp4
from hbxt_compress.errors import UsageError, listing
from hbxt_compress.manifest import Manifest
from hbxt_compress.metrics import METRICS, WeightFiles
from hbxt_compress.metrics.failures import FAILURES, find
from hbxt_compress.metrics.statistics import conclude, decide
from hbxt_compress.render.github import write_summary
from hbxt_compress.render.junit import write_junit
from hbxt_compress.render.markdown import write_markdown
from hbxt_compress.render.page import write_page
from hbxt_compress.render.pictures import side_by_side
from hbxt_compress.report import (
    SCHEMA,
    ClipRecord,
    Control,
    ControlKind,
    Measurement,
    QualityReport,
    Verdict,
)
from hbxt_compress.stages.against import against_baseline
from hbxt_compress.stages.tally import Curves, Tally

__all__ = ["About", "ControlClips", "measure"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlClips:
    """Clips of a control, in the order of the suite's first; None and a note: there are none."""

    name: str
    kind: ControlKind
    text: str
    clips: ClipSet | None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What is known of a candidate besides its clips."""

    manifest: Manifest
    artifact: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)


def measure(
    folder: Path,
    reference: ClipSet,
    candidate: ClipSet,
    *,
    about: About,
    suite: Mapping[str, object],
    metrics: Sequence[str],
    limits: Mapping[str, float],
    original: ClipSet | None = None,
    controls: Sequence[ControlClips] = (),
    baseline: tuple[str, Accepted] | None = None,
    files: WeightFiles | None = None,
    seed: int = 0,
) -> QualityReport:
    """The report on candidate clips; also report.json, .md, .html, summary.md, junit.xml, clips/.

    metrics and limits name entries of METRICS; a limit's metric is measured even if not listed.
    original: of a student, clips of the model that it was distilled from, prompt for prompt. What
    can be compared though it is another map from noise to clips is measured to these, too, under
    names that end in .to_original. baseline: where it lies, and what it says.

    Raises:
        UsageError: unknown metrics, or sides that differ in number, prompts, seeds, rate or shape.
    """
    names = list(dict.fromkeys([*metrics, *limits]))
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise UsageError(f"unknown metrics {', '.join(unknown)}; known: {', '.join(METRICS)}")
    for side in (reference, *([] if original is None else [original])):
        _refuse_mismatch(side.clips, candidate.clips)
    weights = files or WeightFiles.from_environment()
    records, tally, curves, signals = _pairs(folder, reference, candidate, names, weights)
    sick = [
        f"clip {i} {r.prompt!r}: {'; '.join(r.problems)}"
        for i, r in enumerate(records)
        if r.problems
    ]
    why_not = f"not measured: {len(sick)} unhealthy clips" if sick else ""
    measured = tally.measurements(seed, why_not)
    if original is not None:
        _to_original(measured, original, candidate, weights, seed, why_not)
    beside = [] if sick else [_control(one, reference, names, weights) for one in controls]
    values = tuple(one for found in measured.values() for one in found)
    verdicts, compared = _verdicts(measured, limits, sick), None
    if baseline is not None and not sick:
        told = (suite, about.manifest.source, len(records))
        compared, more = against_baseline(baseline, values, beside, told, seed)
        verdicts += more
    findings = () if sick else tuple(find(signals, seed))
    unmeasured = [name for name in limits if measured[name][0].value is None]
    report = QualityReport(
        schema=SCHEMA,
        recipe=about.manifest.recipe,
        source=about.manifest.source,
        suite=dict(suite) | {"measure_seed": seed},
        n_clips=len(records),
        components=about.manifest.components,
        bytes_before=sum(sizes["before"] for sizes in about.manifest.components.values()),
        bytes_after=sum(sizes["after"] for sizes in about.manifest.components.values()),
        measurements=values,
        curves={} if sick else curves.means(),
        layers=tuple(asdict(layer) for layer in about.manifest.layers),
        verdicts=verdicts,
        conclusion=conclude(verdicts, findings, records, unmeasured),
        clips=records,
        made_with=about.manifest.made_with,
        artifact=about.artifact,
        seconds=dict(about.seconds),
        controls=tuple(beside),
        findings=findings,
        baseline=compared,
    )
    write_markdown(folder, report)
    write_junit(folder, report)
    write_summary(folder, report)
    write_page(folder, report, reference.clips, candidate.clips)
    report.save(folder)
    return report


def _pairs(
    folder: Path, reference: ClipSet, candidate: ClipSet, names: Sequence[str], files: WeightFiles
) -> tuple[tuple[ClipRecord, ...], Tally, Curves, dict[str, list[float | None]]]:
    """All that is taken from pairs of clips while each is in memory; last, signals of failures."""
    tally, curves, records = Tally(names, files), Curves(names), list[ClipRecord]()
    found: dict[str, list[float | None]] = {name: [] for name in FAILURES}
    n = len(candidate.clips)
    for i, pair in enumerate(zip(reference.clips, candidate.clips, strict=True)):
        log.info("measure: clip %d", i, extra={"progress": (i, n, "measure")})
        record = _record(i, *pair)
        if not any(one.problems for one in (*records, record)):
            tally.add(*pair)
            curves.add(*pair)
            for name, detector in FAILURES.items():
                found[name].append(detector.signal(*pair))
            record = replace(record, curves=curves.last())
        write_mp4(folder / record.video, side_by_side(*pair), pair[0].fps)
        records.append(record)
    log.info("measure: done", extra={"progress": (n, n, "measure")})
    return tuple(records), tally, curves, found


def _to_original(
    measured: dict[str, list[Measurement]], original: ClipSet, candidate: ClipSet,
    files: WeightFiles, seed: int, why_not: str,
) -> None:  # fmt: skip
    """Adds what can be told between a student and the model that it was distilled from."""
    names = [name for name in measured if METRICS[name].family == "distribution"]
    tally = Tally(names, files)
    if not why_not:
        for pair in zip(original.clips, candidate.clips, strict=True):
            tally.add(*pair)
    for name, found in tally.measurements(seed, why_not).items():
        measured[name] += [replace(one, metric=_renamed(one.metric)) for one in found]


def _renamed(metric: str) -> str:
    """The name of a metric to the original's clips; an extractor in brackets stays behind it."""
    name, bracket, extractor = metric.partition("[")
    return f"{name}.to_original{bracket}{extractor}"


def _control(
    one: ControlClips, reference: ClipSet, names: Sequence[str], files: WeightFiles
) -> Control:
    """The paired metrics of a control's clips to the reference's first ones."""
    empty = Control(name=one.name, kind=one.kind, text=one.text, n=0, values={}, note=one.note)
    if one.clips is None:
        return empty
    tally = Tally([name for name in names if METRICS[name].family == "fidelity"], files)
    for pair in zip(reference.clips[: len(one.clips.clips)], one.clips.clips, strict=True):
        tally.add(*pair)
    return replace(empty, n=len(one.clips.clips), values=tally.values())


def _refuse_mismatch(reference: Sequence[Clip], candidate: Sequence[Clip]) -> None:
    if len(reference) != len(candidate) or not reference:
        raise UsageError(
            f"{len(reference)} reference and {len(candidate)} candidate clips: sample both again"
        )
    problems, first = [], None
    for i, (a, b) in enumerate(zip(reference, candidate, strict=True)):
        first = first or a.frames.shape
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
        if a.frames.shape != first:
            problems.append(f"clip {i}: shape {a.frames.shape}, clip 0 has {first}")
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


def _verdicts(
    measured: Mapping[str, Sequence[Measurement]], limits: Mapping[str, float], sick: Sequence[str]
) -> tuple[Verdict, ...]:
    if sick:
        reason = f"{len(sick)} unhealthy clips:\n{listing(sick)}"
        return (
            Verdict(metric="health", limit=0.0, outcome="fail", reason=reason, against="health"),
        )
    told = {name: measured[name][0] for name in limits if measured[name][0].value is not None}
    verdicts = [
        decide(one, limits[name], METRICS[name].least_n, len(told)) for name, one in told.items()
    ]
    if limits and not verdicts:  # a promise that nothing can check is not a kept one
        verdicts = [
            Verdict(metric=name, limit=limit, outcome="undecided", reason=measured[name][0].note)
            for name, limit in limits.items()
        ]
    return tuple(verdicts)
