"""How sure a number is: intervals over clips, and verdicts that may be "undecided".

The unit of resampling is the clip (one prompt and seed), never the frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np

from hbxt_compress.metrics.comparison import LEAST_CLIPS, more_clips
from hbxt_compress.report import ClipRecord, Finding, Measurement, Verdict

__all__ = [
    "BOOTSTRAP",
    "HALVES",
    "bootstrap_interval",
    "conclude",
    "decide",
    "half_sampling_interval",
]

BOOTSTRAP = "bootstrap over clips, 2000 resamples"
HALVES = "500 random halves of the clips, without replacement"
_TAILS = (2.5, 97.5)


def bootstrap_interval(
    values: Sequence[float], seed: int, n: int = 2000
) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the mean of per-clip values; None below 2 clips."""
    if len(values) < 2:
        return None
    data = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(data), size=(n, len(data)))
    low, high = np.percentile(data[picks].mean(axis=1), _TAILS)
    return float(low), float(high)


def half_sampling_interval(
    distance: Callable[[np.ndarray, np.ndarray], float],
    reference: np.ndarray,
    candidate: np.ndarray,
    seed: int,
    n: int = 500,
) -> tuple[float, float] | None:
    """95 % interval of a distance between two sets of features (N, D); None below 8 clips.

    A bootstrap would repeat clips, which shrinks the rank of a covariance and so biases a Frechet
    distance. The same random half of both sides is taken instead: its spread estimates that of the
    whole (Var = (1/m - 1/N) s^2 with m = N/2), and is set around the value, so that the bias of
    a smaller set drops out.
    """
    n_clips = len(reference)
    if n_clips < 8:
        return None
    rng = np.random.default_rng(seed)
    found = np.empty(n)
    for i in range(n):
        half = rng.permutation(n_clips)[: n_clips // 2]
        found[i] = distance(reference[half], candidate[half])
    value = distance(reference, candidate)
    low, high = value + np.percentile(found - found.mean(), _TAILS)
    return float(low), float(high)


def decide(measured: Measurement, limit: float, least_n: int, n_limits: int = 1) -> Verdict:
    """The verdict on a measured value: its interval over clips decides, and nothing else.

    n_limits: how many are decided on together; with each the interval is wider (Bonferroni), so
    that all of them are told right in 95 % of cases. least_n: below it a reader is warned.
    """
    if measured.value is None:
        raise ValueError(f"{measured.metric} has no value to decide by")
    least = measured.direction == "higher"
    sign = "at least" if least else "at most"

    def kept(value: float) -> bool:
        return value >= limit if least else value <= limit

    def verdict(
        outcome: Literal["pass", "fail", "undecided"], reason: str, needed: int | None = None
    ) -> Verdict:
        return Verdict(
            metric=measured.metric, limit=limit, outcome=outcome, reason=reason, n_needed=needed
        )

    asked = f"must be {sign} {limit:g}"
    few = f", of which it takes {least_n}" if measured.n < least_n else ""
    counted = f"{measured.n} clips{few}"
    if measured.interval is None:
        needed = max(least_n, LEAST_CLIPS)
        told = f"{measured.value:.4g}, {asked}: no interval over {counted}"
        return verdict("undecided", told, needed)
    low, high = _widened(measured, n_limits)
    if kept(low) == kept(high):
        outcome: Literal["pass", "fail"] = "pass" if kept(low) else "fail"
        beyond = "" if outcome == "pass" else " not"
        told = (
            f"{measured.value:.4g}, {asked}: all of {low:.4g} .. {high:.4g} is{beyond} ({counted})"
        )
        return verdict(outcome, told)
    needed_ = more_clips(measured.n, (high - low) / 2, measured.value - limit)
    told = f"{measured.value:.4g}, {asked}, which lies within {low:.4g} .. {high:.4g} ({counted})"
    if needed_ is not None:
        told += f"; about {needed_} would decide it"
    return verdict("undecided", told, needed_)


def _widened(measured: Measurement, n_limits: int) -> tuple[float, float]:
    """The 95 % interval at the level that n_limits of them need, by the normal's quantiles."""
    assert measured.interval is not None
    assert measured.value is not None
    normal, value = NormalDist(), measured.value
    by = normal.inv_cdf(1 - 0.025 / n_limits) / normal.inv_cdf(0.975)
    low, high = measured.interval
    return value - by * (value - low), value + by * (high - value)


def conclude(
    verdicts: Sequence[Verdict],
    findings: Sequence[Finding],
    clips: Sequence[ClipRecord],
    unmeasured: Sequence[str],
) -> str:
    """All verdicts in one or two sentences: what they rest on, and what could not be counted.

    unmeasured: metrics that something is promised of, but that could not be measured.
    """
    sick = sum(1 for clip in clips if clip.problems)
    if sick:
        return f"FAIL: {sick} of {len(clips)} clips are unhealthy, so nothing else was measured."
    same = sum(clip.reference_sha256 == clip.candidate_sha256 for clip in clips)
    tail = f" {same} of {len(clips)} clips are identical to the reference's." if same else ""
    if unmeasured:
        names = " and ".join(unmeasured)
        rests = not {v.metric for v in verdicts if v.against == "promise"} <= set(unmeasured)
        so = "so the verdict does not rest on it" if rests else "and nothing else was promised"
        tail = f" {names} could not be measured, {so}.{tail}"
    parts = {
        outcome: _parts(outcome, verdicts, findings) for outcome in ("fail", "undecided", "pass")
    }
    if parts["fail"]:
        head = f"FAIL: {'; '.join(parts['fail'])}"
        head += f"; {'; '.join(parts['pass'])}" if parts["pass"] else ""
    elif parts["undecided"]:
        head = f"UNDECIDED: {'; '.join(parts['undecided'])}"
    elif parts["pass"]:
        head = f"PASS: {'; '.join(parts['pass'])}"
    else:
        return f"No verdict: the recipe promises nothing, and no baseline was compared with.{tail}"
    return f"{head}.{tail}"


_TITLES = {
    ("fail", "promise"): "broken promises on",
    ("fail", "baseline"): "worse than the accepted baseline on",
    ("undecided", "promise"): "undecided promises on",
    ("undecided", "baseline"): "perhaps worse than the accepted baseline on",
    ("pass", "promise"): "promises kept on",
    ("pass", "baseline"): "no worse than the accepted baseline on",
}


def _parts(outcome: str, verdicts: Sequence[Verdict], findings: Sequence[Finding]) -> list[str]:
    found = []
    if outcome != "pass" and (shown := [one for one in findings if one.outcome == outcome]):
        perhaps = "perhaps " if outcome == "undecided" else ""
        found.append(perhaps + ", ".join(one.failure.replace("_", " ") for one in shown))
    for against in ("promise", "baseline"):
        told = [v for v in verdicts if (v.outcome, v.against) == (outcome, against)]
        if told:
            names = ", ".join(v.metric.split("[")[0] for v in told)
            found.append(f"{_TITLES[outcome, against]} {names}")
            clips = [v.n_needed for v in told if v.n_needed is not None]
            if clips:
                found[-1] += f" (about {max(clips)} clips would decide)"
    return found
