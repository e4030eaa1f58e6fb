"""Against: the verdicts on a candidate beside the baseline that was accepted for its recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hbxt_compress.baseline import Accepted, model_digest
from hbxt_compress.metrics import METRICS
from hbxt_compress.metrics.comparison import LEAST_CLIPS, compare
from hbxt_compress.metrics.scales import Scale
from hbxt_compress.report import Baseline, Control, Measurement, Verdict

__all__ = ["against_baseline", "floor_of", "scales_of"]


def against_baseline(
    baseline: tuple[str, Accepted],
    measured: Sequence[Measurement],
    controls: Sequence[Control],
    told: tuple[Mapping[str, object], Mapping[str, object], int],
    seed: int,
) -> tuple[Baseline, tuple[Verdict, ...]]:
    """What the candidate was compared with, and a verdict for each metric that both have by clip.

    told: the suite, the source and the number of clips of the candidate's report.
    """
    path, accepted = baseline
    about = Baseline(
        path=path, accepted=accepted.accepted, artifact=accepted.artifact,
        made_with=accepted.made_with, note=_why_not(accepted, *told),
    )  # fmt: skip
    if about.note:
        return about, ()
    values = {one.metric: one.per_clip for one in measured if one.per_clip}
    scales = scales_of(values)
    changes = compare(values, accepted.per_clip, scales, floor_of(controls, scales), seed)
    verdicts = tuple(
        Verdict(
            metric=one.metric, limit=one.margin, outcome=one.outcome, reason=one.text,
            against="baseline", n_needed=one.n_needed,
        )
        for one in changes
    )  # fmt: skip
    return about, verdicts


def scales_of(metrics: Sequence[str] | Mapping[str, object]) -> dict[str, Scale]:
    """Of the metrics whose values of single clips compare their scales."""
    found = {name: METRICS[name].scale for name in metrics if name in METRICS}
    return {name: scale for name, scale in found.items() if scale is not None}


def floor_of(
    controls: Sequence[Control], scales: Mapping[str, Scale]
) -> dict[str, Sequence[float]]:
    """Metric -> clip by clip what full precision scores against itself; the worst kind of noise."""
    found: dict[str, Sequence[float]] = {}
    for metric, scale in scales.items():
        noises = [c.values[metric] for c in controls if c.kind == "noise" and metric in c.values]
        if noises:
            found[metric] = max(noises, key=lambda v: float(scale.damage(np.asarray(v)).mean()))
    return found


def _why_not(
    accepted: Accepted, suite: Mapping[str, object], source: Mapping[str, object], n_clips: int
) -> str:
    """Why a baseline cannot be compared with; nothing if it can."""
    if accepted.model != model_digest(source):
        return "it is of another model: accept a baseline of this one, and name it with --baseline"
    if accepted.experiment != suite.get("experiment"):
        return "it was measured on other prompts, seeds or steps: accept a new one"
    if n_clips < LEAST_CLIPS:
        return f"{n_clips} clips are too few to compare, it takes {LEAST_CLIPS}"
    return ""
