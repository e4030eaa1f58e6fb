"""Comparison: whether one set of clips is worse than another, by paired differences over clips.

Both were measured against the same reference, clip for clip. For each metric the damages of a pair
(see scales.py) are subtracted. A baseline nearer to the reference than the noise floor, which is
full precision against itself, counts as the floor: no one can be asked for more. The mean
difference is bootstrapped over clips. It fails where it is beyond the margin with certainty
(several metrics: Holm 1979, family-wise 1 %), passes where all of its 95 % interval is within, and
is undecided between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from hbxt_compress.metrics.scales import Scale

__all__ = [
    "FALSE_ALARMS",
    "LEAST_CLIPS",
    "RESAMPLES",
    "Change",
    "compare",
    "difference",
    "holm",
    "more_clips",
]

FALSE_ALARMS = 0.01
LEAST_CLIPS = 8
RESAMPLES = 9999
_TAILS = (2.5, 97.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """How much worse one side is, mean over clips in the scale's unit; below 0 it is better.

    p: the chance of such a difference if the true one were the margin, corrected for the number of
    metrics compared.
    """

    metric: str
    value: float
    interval: tuple[float, float]
    unit: str
    margin: float
    n: int
    p: float
    outcome: Literal["pass", "fail", "undecided"]
    n_needed: int | None = None

    @property
    def text(self) -> str:
        """The change in one phrase, with its interval."""
        low, high = self.interval
        how = "worse" if self.value > 0 else "better"
        unit = f" {self.unit}" if self.unit else ""
        return (
            f"{abs(self.value):.3g}{unit} {how} over {self.n} clips (95 % {low:.3g} .. {high:.3g}, "
            f"worse is above 0), may be {self.margin:g}{unit} worse"
        )


def compare(
    candidate: Mapping[str, Sequence[float]],
    baseline: Mapping[str, Sequence[float]],
    scales: Mapping[str, Scale],
    floor: Mapping[str, Sequence[float]],
    seed: int,
) -> list[Change]:
    """A Change per metric that both sides have for every clip, in the candidate's order.

    floor: what full precision scores against itself, clip by clip, where known; few clips will do.

    Raises:
        ValueError: fewer than 8 clips, or another number on both sides.
    """
    found, chances = list[Change](), list[float]()
    for metric, values in candidate.items():
        if metric not in baseline or metric not in scales:
            continue
        if len(values) != len(baseline[metric]) or len(values) < LEAST_CLIPS:
            raise ValueError(f"{metric}: {len(values)} and {len(baseline[metric])} clips")
        worse = _worse_by(values, baseline[metric], scales[metric], floor.get(metric))
        change, chance = _change(metric, worse, scales[metric], seed)
        found.append(change)
        chances.append(chance)
    return [_decided(one, p) for one, p in zip(found, holm(chances), strict=True)]


def difference(
    one: Sequence[float], other: Sequence[float], scale: Scale, seed: int
) -> tuple[float, tuple[float, float], float]:
    """By how much `one` is worse, mean over clips; its 95 % interval; p of a difference at all."""
    worse = _worse_by(one, other, scale, None)
    means = _means(worse, seed)
    low, high = np.percentile(means, _TAILS)
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return (
        float(worse.mean()),
        (float(low), float(high)),
        min(1.0, 2 * (1 + tail) / (RESAMPLES + 1)),
    )


def holm(chances: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in the order given (Holm 1979)."""
    order, corrected, most = np.argsort(chances), [0.0] * len(chances), 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1.0, (len(chances) - rank) * chances[i]))
        corrected[i] = most
    return corrected


def more_clips(n: int, half_width: float, distance: float) -> int | None:
    """About how many clips would bring an interval off a limit that far from its middle."""
    if distance == 0 or not math.isfinite(half_width / distance):
        return None
    return max(n + 1, math.ceil(n * (half_width / distance) ** 2))


def _worse_by(
    candidate: Sequence[float],
    baseline: Sequence[float],
    scale: Scale,
    floor: Sequence[float] | None,
) -> np.ndarray:
    worse, usual = (
        scale.damage(np.asarray(side, dtype=np.float64)) for side in (candidate, baseline)
    )
    if floor is not None and len(floor) > 1:
        least = scale.damage(np.asarray(floor, dtype=np.float64))
        # What is known of so few clips' mean is known to three standard errors.
        usual = np.maximum(usual, least.mean() + 3 * least.std(ddof=1) / math.sqrt(len(least)))
    return np.asarray(worse - usual)


def _change(metric: str, worse: np.ndarray, scale: Scale, seed: int) -> tuple[Change, float]:
    means = _means(worse, seed)
    low, high = np.percentile(means, _TAILS)
    chance = (1 + int((means <= scale.margin).sum())) / (RESAMPLES + 1)
    change = Change(
        metric=metric, value=float(worse.mean()), interval=(float(low), float(high)),
        unit=scale.unit, margin=scale.margin, n=len(worse), p=chance, outcome="undecided",
    )  # fmt: skip
    return change, chance


def _means(values: np.ndarray, seed: int) -> np.ndarray:
    """The means of bootstrap samples, some hundred at a time."""
    n, rng = len(values), np.random.default_rng(seed)
    chunks = [values[rng.integers(n, size=(303, n))].mean(axis=1) for _ in range(RESAMPLES // 303)]
    return np.concatenate(chunks)


def _decided(one: Change, p: float) -> Change:
    low, high = one.interval
    if p < FALSE_ALARMS:
        return replace(one, p=p, outcome="fail")
    if high <= one.margin:
        return replace(one, p=p, outcome="pass")
    needed = more_clips(one.n, (high - low) / 2, one.value - one.margin)
    return replace(one, p=p, n_needed=needed)
