"""Strips: where a candidate lies between noise and an unrelated clip, a line of dots per metric.

Left is identical, right is worse, so all strips read alike. Distances are on a log scale, for
twice the error says as much near zero as far from it; decibels are one already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from hbxt_compress.render.axes import log_ticks, opening, round_ticks
from hbxt_compress.render.table import number
from hbxt_compress.report import Control, Measurement, QualityReport

__all__ = ["KINDS", "Strip", "strips"]

KINDS = {
    "candidate": "candidate",
    "noise": "noise",
    "damage": "known damage",
    "seed": "unrelated clips",
}
_LETTER = 7.5  # its width where the page is narrow
_WIDTH, _LABEL, _SAME, _FIRST, _LAST, _LANE = 400, 104, 122, 142, 330, 19
_PERFECT_DB = 100.0  # where PSNR ends
_LEAST = 1e-10


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """A metric's chart, and in words how far the candidate is between noise and another seed."""

    metric: str
    svg: str
    place: str


@dataclass(frozen=True, slots=True)
class _Lane:
    name: str
    kind: str
    values: Sequence[float]
    mean: float
    interval: tuple[float, float] | None = None


def strips(report: QualityReport) -> list[Strip]:
    """A strip for each fidelity metric that has a value per clip, controls below the candidate."""
    found = []
    order = list(KINDS)
    controls = sorted(report.controls, key=lambda one: order.index(one.kind))
    for one in report.measurements:
        if one.family != "fidelity" or not one.per_clip or one.value is None:
            continue
        name = str(report.recipe.get("name", "candidate"))
        lanes = [_Lane(name, "candidate", one.per_clip, one.value, one.interval)]
        lanes += [_lane(each, one.metric) for each in controls if each.values.get(one.metric)]
        found.append(Strip(metric=one.metric, svg=_svg(one, lanes), place=_place(one, lanes)))
    return found


def _lane(control: Control, metric: str) -> _Lane:
    values = control.values[metric]
    return _Lane(control.name, control.kind, values, sum(values) / len(values))


def _position(one: Measurement) -> Callable[[float], float | None]:
    """Value -> place on the axis, more is worse; None for identical."""
    if one.unit == "dB":
        return lambda value: None if value >= _PERFECT_DB else -value
    if one.direction == "higher":
        return lambda value: None if 1 - value <= _LEAST else math.log10(1 - value)
    return lambda value: None if value <= _LEAST else math.log10(value)


def _ticks(one: Measurement, low: float, high: float) -> list[tuple[float, str]]:
    if one.unit == "dB":
        ticks = [tick for tick in round_ticks(low, high) if low <= tick <= high]
        return [(tick, f"{-tick + 0.0:g}") for tick in ticks]
    if one.direction == "higher":
        told = {
            tick: f"{1 - tick:.6g}" if tick > 5e-5 else f"1-{tick:.0e}"
            for tick in log_ticks(low, high)
        }
        return [(math.log10(tick), text) for tick, text in told.items()]
    return [(math.log10(tick), f"{tick:.3g}") for tick in log_ticks(low, high)]


def _svg(one: Measurement, lanes: Sequence[_Lane]) -> str:
    position = _position(one)
    ends = [end for lane in lanes for end in lane.interval or ()]
    all_values = [*(v for lane in lanes for v in (*lane.values, lane.mean)), *ends]
    places = [p for value in all_values if (p := position(value)) is not None]
    low, high = (min(places), max(places)) if places else (0.0, 1.0)
    pad = 0.04 * (high - low) or 0.5
    low, high = low - pad, high + pad

    def x(value: float) -> float:
        place = position(value)
        return _SAME if place is None else _FIRST + (_LAST - _FIRST) * (place - low) / (high - low)

    bottom = 8 + _LANE * len(lanes)
    told = "; ".join(f"{lane.name} {number(lane.mean)}" for lane in lanes)
    parts = [opening(_WIDTH, bottom + 18, f"{one.metric}, means: {told}", "chart strip")]
    taken = 0.0
    for tick, text in sorted(_ticks(one, low, high)) if places else []:
        at = _FIRST + (_LAST - _FIRST) * (tick - low) / (high - low)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="4" y2="{bottom}"/>')
        half = _LETTER * len(text) / 2
        if at - half >= taken:  # a label that would lie on the one before is left out
            parts.append(f'<text x="{at:.1f}" y="{bottom + 13}" text-anchor="middle">{text}</text>')
            taken = at + half
    if any(position(value) is None for value in all_values):
        parts.append(f'<line class="grid" x1="{_SAME}" x2="{_SAME}" y1="4" y2="{bottom}"/>')
        parts.append(f'<text x="{_SAME + 6}" y="{bottom + 13}" text-anchor="end">identical</text>')
    parts += [
        f'<line class="guide" x1="{x(lane.mean):.1f}" x2="{x(lane.mean):.1f}" '
        f'y1="4" y2="{bottom}"/>'
        for lane in lanes
        if lane.kind in ("noise", "seed")
    ]
    for k, lane in enumerate(lanes):
        parts += _drawn(lane, 8 + _LANE * (k + 0.5), x)
    return "".join(parts) + "</svg>"


def _drawn(lane: _Lane, y: float, x: Callable[[float], float]) -> list[str]:
    shown = lane.name if len(lane.name) <= 15 else f"{lane.name[:13]}…"
    parts = [
        f'<text class="{lane.kind}" x="{_LABEL - 6}" y="{y + 4:.1f}" text-anchor="end">'
        f"{escape(shown)}<title>{escape(lane.name)}: {KINDS[lane.kind]}</title></text>"
    ]
    parts += [
        f'<circle class="one {lane.kind}" cx="{x(value):.1f}" cy="{y:.1f}" r="2.2">'
        f"<title>clip {i}: {value:.4g}</title></circle>"
        for i, value in enumerate(lane.values)
    ]
    if lane.interval is not None:
        a, b = sorted(map(x, lane.interval))
        parts.append(f'<line class="sure" x1="{a:.1f}" x2="{b:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts.append(
        f'<path class="mean {lane.kind}" d="{_MARKS[lane.kind]}" '
        f'transform="translate({x(lane.mean):.1f} {y:.1f})"/>'
    )
    parts.append(
        f'<text class="{lane.kind}" x="{_WIDTH - 2}" y="{y + 4:.1f}" text-anchor="end">'
        f"{number(lane.mean)}</text>"
    )
    return parts


_MARKS = {
    "candidate": "M0-6 6 0 0 6-6 0Z",
    "noise": "M-4 0A4 4 0 1 1 4 0A4 4 0 1 1-4 0Z",
    "damage": "M0-5 5 4H-5Z",
    "seed": "M-4-4H4V4H-4Z",
}


def _place(one: Measurement, lanes: Sequence[_Lane]) -> str:
    """How far from noise to another seed the candidate's mean is; nothing without both."""
    position = _position(one)
    own = position(lanes[0].mean)
    noises = [lane for lane in lanes if lane.kind == "noise"]
    seeds = [lane for lane in lanes if lane.kind == "seed"]
    if own is None:
        return "The candidate's clips are identical to the reference's."
    if not noises or not seeds:
        return ""
    floor = max((p for lane in noises if (p := position(lane.mean)) is not None), default=None)
    roof = position(seeds[0].mean)
    if floor is None:
        return "Noise changes nothing here: all that differs is the candidate's."
    if roof is None or roof <= floor:
        return "Noise alone is as far as unrelated clips: this metric tells nothing here."
    share = (own - floor) / (roof - floor)
    if share <= 0:
        return "The candidate is no farther than noise alone."
    if share >= 1:
        return "The candidate is as far as an unrelated clip."
    return f"The candidate is {100 * share:.0f} % of the way from noise to an unrelated clip."
