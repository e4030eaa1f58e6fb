"""From the signals of clips to what is found: fail, pass, or too few clips to say.

A failure counts if the mean signal is more than people overlook and its 95 % interval over clips
leaves out 0, or if a single clip is so far off that the others do not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from hbxt_compress.clips import Clip
from hbxt_compress.metrics.statistics import bootstrap_interval
from hbxt_compress.report import Finding

__all__ = ["LEAST_N", "Detector", "conclude_one"]

LEAST_N = 8
"""Clips from which on the mean decides; below it only single clips do."""
_MOST_NAMED = 8


class Detector(Protocol):
    """One failure and how much of it a clip shows.

    meaning: what a person would see. unit: of the signal. tolerance: the greatest |mean signal|
    over clips that nobody sees. alarm: |signal| past which a single clip fails whatever the others
    do; None: only the mean counts.
    """

    @property
    def name(self) -> str: ...
    @property
    def meaning(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def tolerance(self) -> float: ...
    @property
    def alarm(self) -> float | None: ...
    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """Signed, 0 as the reference; None where it cannot be told from these clips."""


def conclude_one(detector: Detector, signals: Sequence[float | None], seed: int) -> Finding:
    """What the signals of all clips, in their order, say of a failure; the same seed, the same."""
    told = [value for value in signals if value is not None]
    if not told:
        return _finding(detector, "pass", told, None, (), None, "cannot be told from these clips")
    mean, interval = float(np.mean(told)), bootstrap_interval(told, seed)
    alone = _alone(detector, signals)
    beyond = abs(mean) > detector.tolerance
    sure = interval is not None and (interval[0] > 0 or interval[1] < 0)
    unit = "" if detector.unit.startswith("%") else " "
    numbers = f"mean {mean:+.3g}{unit}{detector.unit}"
    if interval is not None:
        numbers += f" [{interval[0]:.3g}, {interval[1]:.3g}]"
    numbers += f" over {len(told)} clips"
    limit = f"{detector.tolerance:g}{unit}{detector.unit}"
    if alone:
        worst = max((signals[i] or 0.0 for i in alone), key=abs)
        text = (
            f"{detector.meaning} in {_named(alone)}, by up to {worst:+.3g}{unit}{detector.unit} "
            f"where {detector.alarm:g} are too many in any clip; {numbers}"
        )
        return _finding(detector, "fail", told, interval, alone, None, text)
    if not beyond:
        text = f"{numbers}, up to {limit} are overlooked"
        return _finding(detector, "pass", told, interval, (), None, text)
    if len(told) < LEAST_N:
        text = (
            f"{numbers}, more than the {limit} that are overlooked, but it takes {LEAST_N} to tell"
        )
        return _finding(detector, "pass", told, interval, (), LEAST_N, text)
    if sure:
        text = f"{detector.meaning}: {numbers}, more than the {limit} that are overlooked"
        return _finding(detector, "fail", told, interval, (), None, text)
    assert interval is not None
    needed = _needed(mean, interval, len(told))
    text = (
        f"perhaps {detector.meaning}: {numbers}, more than the {limit} that are overlooked, but "
        f"it would take some {needed} such clips to be sure"
    )
    return _finding(detector, "undecided", told, interval, (), needed, text)


def _alone(detector: Detector, signals: Sequence[float | None]) -> tuple[int, ...]:
    alarm = detector.alarm
    if alarm is None:
        return ()
    return tuple(i for i, value in enumerate(signals) if value is not None and abs(value) > alarm)


def _needed(mean: float, interval: tuple[float, float], n: int) -> int:
    """The interval shrinks with the root of n until it leaves out 0."""
    half = (interval[1] - interval[0]) / 2
    return max(n + 1, math.ceil(n * (half / abs(mean)) ** 2))


def _named(clips: Sequence[int]) -> str:
    more = f" and {len(clips) - _MOST_NAMED} more" if len(clips) > _MOST_NAMED else ""
    head = "clip" if len(clips) == 1 else "clips"
    return f"{head} {', '.join(str(i) for i in clips[:_MOST_NAMED])}{more}"


def _finding(
    detector: Detector,
    outcome: Literal["fail", "undecided", "pass"],
    told: Sequence[float],
    interval: tuple[float, float] | None,
    clips: tuple[int, ...],
    n_needed: int | None,
    text: str,
) -> Finding:
    return Finding(
        failure=detector.name, outcome=outcome, value=float(np.mean(told)) if told else None,
        interval=interval, tolerance=detector.tolerance, unit=detector.unit, n=len(told),
        clips=clips, n_needed=n_needed, text=f"{detector.name}: {text}",
    )  # fmt: skip
