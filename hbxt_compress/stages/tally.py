"""Tally: clips pass by pair by pair, and what remains of them is a Measurement for each metric.

Numbers and features are kept of a clip, never its frames, so memory does not grow with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from hbxt_compress.clips import Clip
from hbxt_compress.metrics import (
    METRICS,
    ClipMetric,
    Metric,
    NoReferenceMetric,
    PairMetric,
    SetMetric,
    Unavailable,
    WeightFiles,
)
from hbxt_compress.metrics.latents import latent_curve
from hbxt_compress.metrics.pixels import psnr
from hbxt_compress.metrics.statistics import (
    BOOTSTRAP,
    HALVES,
    bootstrap_interval,
    half_sampling_interval,
)
from hbxt_compress.report import Measurement

__all__ = ["Curves", "Tally"]

_LEAST_OF_A_SET: Final = 2
_AT_ONCE: Final = 8  # pairs whose clips wait for a metric that opens its networks for each call


class Tally:
    """Metrics by name, over pairs of a reference and a candidate clip that are added one by one."""

    def __init__(self, names: Sequence[str], files: WeightFiles) -> None:
        self._metrics, self._missing = dict[str, Metric](), dict[str, str]()
        for name in names:
            try:
                self._metrics[name] = METRICS[name].load(files)
            except Unavailable as reason:
                self._missing[name] = str(reason)
        self._names = tuple(names)
        self._values: dict[str, list[float]] = {name: [] for name in names}
        self._scores: dict[str, list[_Scores]] = {name: [] for name in names}
        self._features: dict[tuple[str, str], tuple[list[np.ndarray], list[np.ndarray]]] = {}
        self._waiting: dict[str, list[tuple[Clip, Clip]]] = {name: [] for name in names}
        self._sides: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        self._n = self._n_same = 0

    def add(self, reference: Clip, candidate: Clip) -> None:
        """Measures one pair; a metric that cannot is left out from here on, with its reason."""
        self._n += 1
        self._n_same += reference.sha256 == candidate.sha256
        seen = set[tuple[str, str]]()
        for name, metric in list(self._metrics.items()):
            try:
                if isinstance(metric, PairMetric):
                    self._values[name].append(metric.compare(reference, candidate))
                elif isinstance(metric, SetMetric):
                    if (eye := _eye(metric)) not in seen:
                        sides = self._features.setdefault(eye, ([], []))
                        for side, clip in zip(sides, (reference, candidate), strict=True):
                            side.append(metric.features([clip]))
                        seen.add(eye)
                elif isinstance(metric, NoReferenceMetric):
                    self._waiting[name].append((reference, candidate))
                    if len(self._waiting[name]) == _AT_ONCE:
                        self._score(name, metric)
                else:
                    assert isinstance(metric, ClipMetric)
                    self._scores[name].append((metric.score(reference), metric.score(candidate)))
            except Unavailable as reason:
                self._missing[name] = str(reason)
                del self._metrics[name]

    def values(self) -> dict[str, tuple[float, ...]]:
        """Of each pair metric its value for each pair, in the order in which they came."""
        return {
            name: tuple(self._values[name])
            for name, metric in self._metrics.items()
            if isinstance(metric, PairMetric)
        }

    def measurements(self, seed: int, note: str = "") -> dict[str, list[Measurement]]:
        """The measurements of each metric, its own first; None and a note where there is none.

        note: why nothing is to be told of any of them.
        """
        found = {}
        for name in self._names:
            empty = _empty(name, self._metrics.get(name, METRICS[name]))
            if reason := note or self._missing.get(name):
                found[name] = [replace(empty, note=reason)]
                continue
            try:
                found[name] = self._measured(name, empty, seed)
            except Unavailable as reason_:
                found[name] = [replace(empty, note=str(reason_))]
        return found

    def _measured(self, name: str, empty: Measurement, seed: int) -> list[Measurement]:
        metric = self._metrics[name]
        if isinstance(metric, PairMetric):
            same = f"{self._n_same} of {self._n} clips are identical" if self._n_same else ""
            note = "identical clips" if self._n_same == self._n else same
            return [_mean(empty, self._values[name], seed, note)]
        if isinstance(metric, SetMetric):
            return [self._distance(metric, empty, seed)]
        if isinstance(metric, NoReferenceMetric):
            self._score(name, metric)
            return [_two_sided(self._sides[name], empty, seed)]
        return _by_prompt(self._scores[name], empty, seed)

    def _score(self, name: str, metric: NoReferenceMetric) -> None:
        """Scores the pairs that wait, all clips in one call."""
        waiting, self._waiting[name] = self._waiting[name], []
        if waiting:
            scores = metric.scores([clip for side in zip(*waiting, strict=True) for clip in side])
            n = len(waiting)
            self._sides[name] += list(zip(scores[:n], scores[n:], strict=True))

    def _distance(self, metric: SetMetric, empty: Measurement, seed: int) -> Measurement:
        if self._n < _LEAST_OF_A_SET:
            raise Unavailable(f"a distance between sets needs 2 clips or more, there is {self._n}")
        a, b = (np.concatenate(side) for side in self._features[_eye(metric)])
        return replace(
            empty,
            value=metric.distance(a, b),
            interval=half_sampling_interval(metric.distance, a, b, seed),
            n=self._n,
            interval_by=HALVES,
            note=f"{self._n} clips: compare it only at equal n" if self._n < metric.least_n else "",
        )


_Scores = tuple[Mapping[str, float] | None, Mapping[str, float] | None]


class Curves:
    """Means over clips of errors along a clip: latent_error/step and psnr/frame, if asked for."""

    def __init__(self, names: Sequence[str]) -> None:
        self._wanted = [name for name in ("latent_error", "psnr") if name in names]
        self._rows: dict[str, list[np.ndarray]] = {}

    def add(self, reference: Clip, candidate: Clip) -> None:
        """Adds a pair; clips without latents have no curve of them."""
        latents = all(clip.latents is not None for clip in (reference, candidate))
        if "latent_error" in self._wanted and latents:
            curve = latent_curve(reference, candidate)
            self._rows.setdefault("latent_error/step", []).append(curve)
        if "psnr" in self._wanted:
            rows = np.array(list(map(psnr, reference.frames, candidate.frames)))
            self._rows.setdefault("psnr/frame", []).append(rows)

    def means(self) -> dict[str, tuple[float, ...]]:
        """Curve -> its values."""
        return {name: tuple(map(float, np.mean(rows, axis=0))) for name, rows in self._rows.items()}

    def last(self) -> dict[str, tuple[float, ...]]:
        """Curve -> the values of the pair that was added last."""
        return {name: tuple(map(float, rows[-1])) for name, rows in self._rows.items()}


def _eye(metric: SetMetric) -> tuple[str, str]:
    return metric.extractor_sha256 or metric.name, metric.eye


def _empty(name: str, metric: Metric) -> Measurement:
    return Measurement(
        metric=metric.name if metric.extractor else name,
        value=None,
        interval=None,
        n=0,
        unit=metric.unit,
        direction=metric.direction,
        family=metric.family,
        extractor=metric.extractor,
        extractor_sha256=metric.extractor_sha256,
    )


def _two_sided(sides: Sequence[tuple[float, float]], empty: Measurement, seed: int) -> Measurement:
    """The mean |difference| of both sides' scores; reference is its side's own mean.

    Clip by clip, for differences in both directions must not cancel.
    """
    a, b = np.array(sides).T
    one = _mean(empty, np.abs(b - a).tolist(), seed, f"the candidate itself scores {b.mean():.4g}")
    return one if one.value is None else replace(one, reference=float(a.mean()))


def _by_prompt(scores: Sequence[_Scores], empty: Measurement, seed: int) -> list[Measurement]:
    """One measurement per score of a metric: the candidate's mean, beside the reference's.

    Raises:
        Unavailable: no prompt can be judged.
    """
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
