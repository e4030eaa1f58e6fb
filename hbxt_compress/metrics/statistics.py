"""How sure a number is: intervals over clips, and verdicts that may be "undecided".

The unit of resampling is the clip (one prompt and seed), never the frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from hbxt_compress.report import ClipRecord, Measurement, Verdict

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


def decide(measured: Measurement, limit: float, least_n: int) -> Verdict:
    """The verdict on a measured value: by value from least_n clips on, else by interval alone."""
    if measured.value is None:
        raise ValueError(f"{measured.metric} has no value to decide by")
    least = measured.direction == "higher"
    sign = "at least" if least else "at most"

    def kept(value: float) -> bool:
        return value >= limit if least else value <= limit

    def verdict(outcome: Literal["pass", "fail", "undecided"], reason: str) -> Verdict:
        return Verdict(metric=measured.metric, limit=limit, outcome=outcome, reason=reason)

    if measured.n >= least_n:
        reason = f"{measured.value:.4g} over {measured.n} clips, must be {sign} {limit:g}"
        return verdict("pass" if kept(measured.value) else "fail", reason)
    few = f"{measured.n} clips of the {least_n} from which the value decides"
    if measured.interval is not None:
        low, high = measured.interval
        if kept(low) == kept(high):
            reason = (
                f"the whole interval {low:.4g} .. {high:.4g} is on one side of {limit:g} ({few})"
            )
            return verdict("pass" if kept(low) else "fail", reason)
    return verdict("undecided", f"{measured.value:.4g}, must be {sign} {limit:g}, but {few}")


def conclude(
    verdicts: Sequence[Verdict],
    limits: Mapping[str, float],
    measured: Sequence[Measurement],
    clips: Sequence[ClipRecord],
) -> str:
    """The verdicts in one or two sentences: what they rest on, and what could not be counted."""
    sick = sum(1 for clip in clips if clip.problems)
    if sick:
        return f"FAIL: {sick} of {len(clips)} clips are unhealthy, so nothing else was measured."
    same = sum(clip.reference_sha256 == clip.candidate_sha256 for clip in clips)
    tail = f" {same} of {len(clips)} clips are identical to the reference's." if same else ""
    if not limits:
        return f"No verdict: the recipe promises nothing.{tail}"
    decided = {verdict.metric.split("[")[0] for verdict in verdicts}
    without = [name for name in limits if name not in decided]
    if without:
        names = " and ".join(without)
        tail = f" {names} could not be measured, so the verdict does not rest on it.{tail}"
    groups = {
        outcome: [v.metric.split("[")[0] for v in verdicts if v.outcome == outcome]
        for outcome in ("fail", "undecided", "pass")
    }
    if groups["fail"]:
        head = f"FAIL: broken promises on {', '.join(groups['fail'])}"
        head += f"; kept on {', '.join(groups['pass'])}" if groups["pass"] else ""
    elif groups["undecided"]:
        nothing = all(one.value is None for one in measured if one.metric in groups["undecided"])
        why = "nothing promised could be measured" if nothing else "too few clips"
        head = f"UNDECIDED: {', '.join(groups['undecided'])} ({why})"
    else:
        kept = groups["pass"]
        count = "the promise" if len(kept) == 1 else f"all {len(kept)} promises"
        head = f"PASS: {count} kept ({', '.join(kept)})"
    return f"{head}.{tail}"
