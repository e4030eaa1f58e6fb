"""Spends a byte budget where it saves most damage: one option for every layer, the sum least.

A multiple-choice knapsack. Each layer's lower convex hull of damage over bytes gives steps with
falling savings per byte; taken in that order until one does not fit, they give the price of a byte
and a first allocation. An option whose cost at that price is above what is still to be gained can
be in no better allocation (Sinha and Zoltners 1979); the few others are searched by dynamic
programming over (bytes, damage) pairs that no other pair beats.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from hbxt_compress.errors import PlanError

__all__ = ["Allocation", "Option", "Step", "allocate"]

_MOST_STATES = 30_000  # pairs kept after each layer, to bound memory and time
_Name = TypeVar("_Name", bound=str)
_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A format that a layer may take: bytes stored, and damage done (any additive measure)."""

    format: str
    bytes: int
    damage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What taking another format would add in bytes and save in damage."""

    format: str
    bytes: int
    damage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation(Generic[_Name]):
    """Every layer's option.

    price: damage that one more byte would save, 0 if there is nothing left to buy. gap: the most
    by which any other allocation could be better; 0: none is. next_up: per layer the step that
    saves most per byte, None at the top. why: the same in words, for plan and manifest.
    """

    chosen: Mapping[_Name, Option]
    price: float
    gap: float
    next_up: Mapping[_Name, Step | None]
    why: Mapping[_Name, str]

    @property
    def bytes(self) -> int:
        return sum(option.bytes for option in self.chosen.values())

    @property
    def damage(self) -> float:
        return math.fsum(option.damage for option in self.chosen.values())


def allocate(options: Mapping[_Name, Sequence[Option]], budget_bytes: int) -> Allocation[_Name]:
    """The options of least total damage within the budget; the same whatever order they come in.

    Of options that do equal damage the smaller one is taken.

    Raises:
        PlanError: the budget is below the smallest possible size, which the message names.
        ValueError: a layer has no options, or an option's bytes or damage make no sense.
    """
    names = sorted(options)
    ladders = [_ladder(name, options[name]) for name in names]
    smallest = sum(ladder[0].bytes for ladder in ladders)
    if smallest > budget_bytes:
        raise PlanError(
            f"a budget of {budget_bytes} bytes is too small for {len(names)} weights: the smallest "
            f"possible size is {smallest} bytes; allow more, or offer smaller formats"
        )
    picks, price = _greedy(ladders, budget_bytes)
    gap = 0.0
    if price > 0:
        slack = budget_bytes - sum(
            ladder[pick].bytes for ladder, pick in zip(ladders, picks, strict=True)
        )
        gap = _improve(ladders, picks, price, slack)
    chosen = {name: ladder[i] for name, ladder, i in zip(names, ladders, picks, strict=True)}
    next_up = {
        name: _next_up(ladder[i], ladder[i + 1 :])
        for name, ladder, i in zip(names, ladders, picks, strict=True)
    }
    return Allocation(
        chosen=chosen,
        price=price,
        gap=gap,
        next_up=next_up,
        why={name: _explained(chosen[name], next_up[name], price) for name in names},
    )


def _ladder(name: str, options: Sequence[Option]) -> list[Option]:
    """The options that no smaller or equal one matches: bytes rise, damage falls."""
    if not options:
        raise ValueError(f"{name}: no option to choose from")
    for option in options:
        if option.bytes < 0 or not math.isfinite(option.damage):
            raise ValueError(
                f"{name}: {option.format} takes {option.bytes} bytes and does damage "
                f"{option.damage}; both must be finite, bytes not negative"
            )
    rungs: list[Option] = []
    for option in sorted(options, key=lambda one: (one.bytes, one.damage, one.format)):
        if not rungs or option.damage < rungs[-1].damage:
            rungs.append(option)
    return rungs


def _hull(ladder: Sequence[Option]) -> list[int]:
    """Indices of the lower convex hull: each next step saves less per byte."""
    hull: list[int] = []
    for i, option in enumerate(ladder):
        while len(hull) > 1 and _slope(ladder[hull[-2]], ladder[hull[-1]]) <= _slope(
            ladder[hull[-1]], option
        ):
            hull.pop()
        hull.append(i)
    return hull


def _slope(low: Option, high: Option) -> float:
    """Damage saved per byte."""
    return (low.damage - high.damage) / (high.bytes - low.bytes)


def _greedy(ladders: Sequence[Sequence[Option]], budget_bytes: int) -> tuple[list[int], float]:
    """Index of each layer's option, and the price of a byte: the first step that does not fit."""
    steps = []
    for layer, ladder in enumerate(ladders):
        hull = _hull(ladder)
        for rank, (low, high) in enumerate(itertools.pairwise(hull)):
            slope = _slope(ladder[low], ladder[high])
            steps.append((-slope, layer, rank, low, high))
    picks = [0] * len(ladders)
    left = budget_bytes - sum(ladder[0].bytes for ladder in ladders)
    for negative_slope, layer, _, low, high in sorted(steps):
        cost = ladders[layer][high].bytes - ladders[layer][low].bytes
        if cost > left:
            return picks, -negative_slope
        picks[layer], left = high, left - cost
    return picks, 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moves:
    """The other options of one layer, by their bytes and damage above the greedy one's."""

    layer: int
    picks: _Ints
    bytes: _Ints
    damage: _Floats

    def cost(self, price: float) -> _Floats:
        """Damage and bytes together; not negative but for rounding, the greedy one being best."""
        return np.maximum(self.damage + price * self.bytes, 0.0)

    def where(self, kept: npt.NDArray[np.bool_]) -> _Moves:
        return _Moves(
            layer=self.layer,
            picks=self.picks[kept],
            bytes=self.bytes[kept],
            damage=self.damage[kept],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _States:
    """Pairs that no other beats after some layers, where each came from and what it took last."""

    layer: int
    bytes: _Ints
    damage: _Floats
    parent: _Ints
    picks: _Ints

    def where(self, kept: npt.NDArray[np.bool_] | _Ints) -> _States:
        return _States(
            layer=self.layer,
            bytes=self.bytes[kept],
            damage=self.damage[kept],
            parent=self.parent[kept],
            picks=self.picks[kept],
        )

    def bounds(self, price: float, slack: int, most_rest: int) -> _Floats:
        """The least damage that later layers could bring each pair to."""
        spent = np.minimum(slack, self.bytes + most_rest) - self.bytes
        return self.damage - price * spent


def _improve(
    ladders: Sequence[Sequence[Option]], picks: list[int], price: float, slack: int
) -> float:
    """Replaces picks by the best ones; returns how much better others could be at most.

    Bytes and damage are counted above the greedy allocation's, so bytes may be at most the slack
    and damage is at least cost - price * slack.
    """
    moves = [_moves(i, ladder, picks[i]) for i, ladder in enumerate(ladders) if len(ladder) > 1]
    moves = [m.where(m.cost(price) < price * slack) for m in moves]
    moves = sorted((m for m in moves if len(m.picks)), key=lambda m: float(m.cost(price).min()))
    most_rest = [*_sums([max(0, int(m.bytes.max())) for m in moves]), 0]
    least_rest = [*_sums([min(0, int(m.bytes.min())) for m in moves]), 0]
    none = np.zeros(1, np.int64)
    trail = [_States(layer=-1, bytes=none, damage=np.zeros(1), parent=none, picks=none)]
    least, dropped, found = 0.0, math.inf, dict[int, int]()
    for i, some in enumerate(moves):
        own = some.where(some.cost(price) < least + price * slack)
        if not len(own.picks):
            break  # nor has any later layer a move that cheap
        states = _extended(trail[-1], own, picks[own.layer], slack - least_rest[i + 1])
        whole = np.where(states.bytes <= slack, states.damage, math.inf)
        if whole.size and whole.min() < least:
            least = float(whole.min())
            found = dict(_path([*trail, states], int(whole.argmin())))
        states = states.where(states.bounds(price, slack, most_rest[i + 1]) < least)
        if len(states.bytes) > _MOST_STATES:
            bounds = states.bounds(price, slack, most_rest[i + 1])
            order = np.argsort(bounds, kind="stable")
            dropped = min(dropped, float(bounds[order[_MOST_STATES]]))
            states = states.where(np.sort(order[:_MOST_STATES]))
        if not len(states.bytes):
            break
        trail.append(states)
    for layer, pick in found.items():
        picks[layer] = pick
    return max(0.0, least - dropped)


def _moves(layer: int, ladder: Sequence[Option], pick: int) -> _Moves:
    others = [i for i in range(len(ladder)) if i != pick]
    base = ladder[pick]
    return _Moves(
        layer=layer,
        picks=np.array(others, np.int64),
        bytes=np.array([ladder[i].bytes - base.bytes for i in others], np.int64),
        damage=np.array([ladder[i].damage - base.damage for i in others], np.float64),
    )


def _sums(numbers: Sequence[int]) -> list[int]:
    """Sum of each number and all behind it."""
    return [*itertools.accumulate(reversed(numbers))][::-1]


def _extended(before: _States, moves: _Moves, pick: int, most_bytes: int) -> _States:
    """The pairs after one more layer that stays or moves, without those that another beats."""
    stay = np.zeros(1, np.int64)
    bytes_ = np.add.outer(np.concatenate([stay, moves.bytes]), before.bytes).ravel()
    damage = np.add.outer(np.concatenate([stay, moves.damage]), before.damage).ravel()
    order = np.lexsort((damage, bytes_))
    order = order[bytes_[order] <= most_bytes]
    beaten_by = np.minimum.accumulate(np.concatenate([[math.inf], damage[order]]))[:-1]
    order = order[damage[order] < beaten_by]
    taken = np.concatenate([np.array([pick]), moves.picks])
    return _States(
        layer=moves.layer,
        bytes=bytes_[order],
        damage=damage[order],
        parent=order % len(before.bytes),
        picks=taken[order // len(before.bytes)],
    )


def _path(trail: Sequence[_States], at: int) -> Iterator[tuple[int, int]]:
    """(layer, pick) of what led to a pair of the last states."""
    for states in reversed(trail[1:]):
        yield states.layer, int(states.picks[at])
        at = int(states.parent[at])


def _next_up(now: Option, larger: Sequence[Option]) -> Step | None:
    if not larger:
        return None
    best = max(larger, key=lambda option: _slope(now, option))
    return Step(format=best.format, bytes=best.bytes - now.bytes, damage=now.damage - best.damage)


def _explained(now: Option, step: Step | None, price: float) -> str:
    if step is None:
        return f"budget: no format on offer does less damage than {now.format}"
    text = f"budget: {step.format} would cost {step.bytes} bytes more and save {step.damage:.3g}"
    if price <= 0:
        return text
    return f"{text}, {step.damage / step.bytes / price:.2g} of what bytes save at the margin"
