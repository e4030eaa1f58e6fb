"""Comparing: several recipes of one model on one page, and which of them nobody beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from hbxt_compress.errors import UsageError, listing
from hbxt_compress.metrics.comparison import LEAST_CLIPS, difference, holm
from hbxt_compress.report import QualityReport
from hbxt_compress.stages.against import scales_of

__all__ = ["SURE", "Compared", "Comparison", "Difference", "beats", "compare_reports"]

SURE = 0.05  # family-wise: of all differences on the page
_ALIKE = 1.1  # times so near to each other say nothing
_QUALITY = ("lpips_squeeze", "lpips_alex", "lpips_vgg", "psnr", "latent_error", "ssim")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How much worse than the first report's, mean over clips; below 0 better. p: corrected."""

    metric: str
    value: float
    interval: tuple[float, float]
    unit: str
    p: float

    @property
    def word(self) -> str:
        """better or worse, where that is sure; else the same."""
        if self.p >= SURE:
            return "the same"
        return "worse" if self.value > 0 else "better"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One report. damage: mean over clips on the scale of Comparison.quality, less is better.

    seconds: of a clip, as it was sampled; 0 where that is not known. unbeaten: no other is at least
    as good in bytes, seconds and quality and better in one of them; times within a tenth of each
    other are the same.
    """

    name: str
    bytes_after: int
    seconds: float
    damage: float
    outcome: str
    values: dict[str, float]
    differences: tuple[Difference, ...]
    unbeaten: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Reports of one suite. quality: the metric that stands for it where one number must."""

    suite: str
    n_clips: int
    quality: str
    unit: str
    reports: tuple[Compared, ...]

    def to_json(self) -> dict[str, object]:
        """Plain JSON values, each difference with its word."""
        reports = [
            asdict(one) | {"differences": [asdict(d) | {"word": d.word} for d in one.differences]}
            for one in self.reports
        ]
        return asdict(self) | {"reports": reports}


def compare_reports(reports: Sequence[QualityReport], seed: int = 0) -> Comparison:
    """Every report against the first one, clip for clip.

    Raises:
        UsageError: other prompts, seeds, steps or reference clips; fewer than 8 clips; no metric in
            common; the same clips twice under two names.
    """
    _refuse(reports)
    shared = [
        metric
        for metric in _clipwise(reports[0])
        if all(metric in _clipwise(one) for one in reports[1:])
    ]
    scales = scales_of(shared)
    quality = next((name for name in _QUALITY if name in scales), None)
    if quality is None:
        raise UsageError("these reports have no paired metric in common: evaluate them again")
    found = [
        [
            (m, *difference(_clipwise(one)[m], _clipwise(reports[0])[m], scales[m], seed))
            for m in scales
        ]
        for one in reports[1:]
    ]
    chances = iter(holm([p for rows in found for *_, p in rows]))
    differences: list[tuple[Difference, ...]] = [()]
    for rows in found:
        differences.append(
            tuple(
                Difference(metric=m, value=v, interval=ends, unit=scales[m].unit, p=next(chances))
                for m, v, ends, _ in rows
            )
        )
    damages = [
        float(scales[quality].damage(np.array(_clipwise(one)[quality])).mean()) for one in reports
    ]
    seconds = [one.seconds.get("candidate", 0.0) for one in reports]
    points = list(
        zip(
            (one.bytes_after for one in reports),
            seconds if all(seconds) else [0.0] * len(seconds),
            damages,
            strict=True,
        )
    )
    return Comparison(
        suite=str(reports[0].suite.get("name", "?")),
        n_clips=reports[0].n_clips,
        quality=quality,
        unit=scales[quality].unit,
        reports=tuple(
            Compared(
                name=str(one.recipe.get("name", "?")), bytes_after=one.bytes_after,
                seconds=seconds[i],
                damage=damages[i], outcome=one.outcome,
                values={m: float(np.mean(_clipwise(one)[m])) for m in scales},
                differences=differences[i],
                unbeaten=not any(beats(other, points[i]) for other in points),
            )
            for i, one in enumerate(reports)
        ),
    )  # fmt: skip


def _clipwise(report: QualityReport) -> dict[str, tuple[float, ...]]:
    return {one.metric: one.per_clip for one in report.measurements if one.per_clip}


def beats(one: tuple[float, float, float], other: tuple[float, float, float]) -> bool:
    """Whether one's bytes, seconds and damage are no worse, and one of them better."""
    (size, seconds, damage), (size_2, seconds_2, damage_2) = one, other
    if size > size_2 or damage > damage_2 or seconds > seconds_2 * _ALIKE:
        return False
    return size < size_2 or damage < damage_2 or seconds * _ALIKE < seconds_2


def _refuse(reports: Sequence[QualityReport]) -> None:
    first, problems = reports[0], []
    if first.n_clips < LEAST_CLIPS:
        problems.append(f"{first.n_clips} clips, it takes {LEAST_CLIPS}")
    for one in reports[1:]:
        name = one.recipe.get("name")
        if one.suite.get("experiment") != first.suite.get("experiment"):
            problems.append(
                f"{name}: other prompts, seeds or steps than {first.recipe.get('name')}"
            )
            continue
        if not len(first.clips) == len(one.clips) == first.n_clips == one.n_clips:
            problems.append(f"{name}: {len(one.clips)} of {one.n_clips} clips are described")
            continue
        pairs = list(zip(first.clips, one.clips, strict=True))
        other = sum(a.reference_sha256 != b.reference_sha256 for a, b in pairs)
        if other:
            problems.append(f"{name}: {other} of {len(pairs)} reference clips are other ones")
        elif all(a.candidate_sha256 == b.candidate_sha256 for a, b in pairs):
            problems.append(f"{name}: the very clips of {first.recipe.get('name')}")
    if problems:
        raise UsageError(
            "these reports cannot be compared; evaluate all on one machine with one suite:\n"
            + listing(problems)
        )
