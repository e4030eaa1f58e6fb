"""From a metric and clips to a Measurement: value, interval over clips, worst clip and notes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hbxt_compress.clips import Clip
from hbxt_compress.metrics.latents import latent_curve
from hbxt_compress.metrics.pixels import psnr
from hbxt_compress.metrics.statistics import (
    BOOTSTRAP,
    HALVES,
    bootstrap_interval,
    half_sampling_interval,
)
from hbxt_compress.metrics.weights import Unavailable
from hbxt_compress.report import Measurement

if TYPE_CHECKING:
    from hbxt_compress.metrics import ClipMetric, NoReferenceMetric, SetMetric

__all__ = ["between_sets", "by_prompt", "curves", "paired", "two_sided"]

Pairs = Sequence[tuple[Clip, Clip]]


def paired(
    compare: Callable[[Clip, Clip], float], empty: Measurement, pairs: Pairs, seed: int
) -> Measurement:
    """`empty` with the mean over (reference, candidate) pairs, and a note on identical clips."""
    values = [compare(*pair) for pair in pairs]
    same = sum(a.sha256 == b.sha256 for a, b in pairs)
    note = f"{same} of {len(values)} clips are identical" if same else ""
    return _mean(empty, values, seed, "identical clips" if same == len(values) else note)


def by_prompt(metric: ClipMetric, empty: Measurement, pairs: Pairs, seed: int) -> list[Measurement]:
    """One measurement per score of the metric: the candidate's mean, beside the reference's.

    Raises:
        Unavailable: no prompt can be judged.
    """
    scores = [(metric.score(a), metric.score(b)) for a, b in pairs]
    judged = [(a, b) for a, b in scores if a is not None and b is not None]
    if not judged:
        raise Unavailable("no prompt is about one object in the judge's words")
    left_out = len(scores) - len(judged)
    note = f"{left_out} of {len(scores)} prompts are not in the judge's words" if left_out else ""
    found = []
    for name in judged[0][1]:
        one = _mean(replace(empty, metric=name), [b[name] for _, b in judged], seed, note)
        one = replace(one, reference=float(np.mean([a[name] for a, _ in judged])))
        # per_clip is in the order of all clips, or empty.
        found.append(replace(one, per_clip=()) if left_out else one)
    return found


def two_sided(
    metric: NoReferenceMetric, empty: Measurement, pairs: Pairs, seed: int
) -> Measurement:
    """`empty` with the mean |difference| of both sides' scores; reference is its side's own mean.

    Clip by clip, for differences in both directions must not cancel.
    """
    found = np.array(metric.scores([clip for side in zip(*pairs, strict=True) for clip in side]))
    a, b = found[: len(pairs)], found[len(pairs) :]
    one = _mean(empty, np.abs(b - a).tolist(), seed, f"the candidate itself scores {b.mean():.4g}")
    return one if one.value is None else replace(one, reference=float(a.mean()))


def between_sets(
    metric: SetMetric,
    empty: Measurement,
    reference: Sequence[Clip],
    candidate: Sequence[Clip],
    seed: int,
) -> Measurement:
    """`empty` with the distance between both sets of clips; Unavailable below 2 clips."""
    n = len(reference)
    if n < 2:
        raise Unavailable(f"a distance between sets needs 2 clips or more, there is {n}")
    a, b = metric.features(reference), metric.features(candidate)
    return replace(
        empty,
        value=metric.distance(a, b),
        interval=half_sampling_interval(metric.distance, a, b, seed),
        n=n,
        interval_by=HALVES,
        note=f"{n} clips: compare it only at equal n" if n < metric.least_n else "",
    )


def curves(names: Sequence[str], pairs: Pairs) -> dict[str, tuple[float, ...]]:
    """Means over clips: latent_error/step and psnr/frame, of those metrics that are in `names`."""
    found: dict[str, list[np.ndarray]] = {}
    if "latent_error" in names and all(c.latents is not None for pair in pairs for c in pair):
        found["latent_error/step"] = [latent_curve(*pair) for pair in pairs]
    if "psnr" in names:
        found["psnr/frame"] = [np.array(list(map(psnr, a.frames, b.frames))) for a, b in pairs]
    return {name: tuple(map(float, np.mean(rows, axis=0))) for name, rows in found.items()}


def _mean(empty: Measurement, values: Sequence[float], seed: int, note: str) -> Measurement:
    if not np.isfinite(values).all():
        return replace(empty, note="the values are not finite: look at the clips")
    return replace(
        empty,
        value=float(np.mean(values)),
        interval=bootstrap_interval(values, seed),
        n=len(values),
        worst=min(values) if empty.direction == "higher" else max(values),
        per_clip=tuple(values),
        interval_by=BOOTSTRAP,
        note=note,
    )
