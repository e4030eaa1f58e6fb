"""allocate: the least damage within the bytes, against brute force, and at any size."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Mapping, Sequence

import pytest

from hbxt_compress import allocation
from hbxt_compress.allocation import Option, allocate
from hbxt_compress.errors import PlanError

_BITS = (4.125, 4.25, 4.3125, 4.5, 4.625, 5.0, 5.25, 5.5, 6.0, 7.0, 8.0, 16.0)
_Options = Mapping[str, Sequence[Option]]


def _option(n_bytes: int, damage: float, name: str = "") -> Option:
    return Option(format=name or f"{n_bytes}b", bytes=n_bytes, damage=damage)


def _random_options(
    seed: int, *, n_layers: int = 6, n_options: int = 4, most_bytes: int = 60
) -> _Options:
    """Bytes collide often when they are few, and many options are off the hull or dominated."""
    rng = random.Random(seed)
    return {
        f"layer{i}": [
            _option(
                rng.randint(1, most_bytes), rng.random() ** 3 * 10 ** rng.uniform(-3, 3), f"f{k}"
            )
            for k in range(n_options)
        ]
        for i in range(n_layers)
    }


def _model(n_layers: int, seed: int = 0) -> _Options:
    """Layers of a few shapes, as transformers have, some 10^4 times as sensitive."""
    rng = random.Random(seed)
    options = {}
    for i in range(n_layers):
        n_weights = rng.choice([3072 * 3072, 3072 * 14336, 1536 * 8960])
        sensitivity = 10 ** rng.uniform(-6, -2)
        options[f"layer{i}"] = [
            _option(int(n_weights * bits / 8), sensitivity * 4**-bits * rng.uniform(0.6, 1.6))
            for bits in _BITS
        ]
    return options


def _range(options: _Options) -> tuple[int, int]:
    sizes = [[option.bytes for option in ladder] for ladder in options.values()]
    return sum(map(min, sizes)), sum(map(max, sizes))


def _least(options: _Options, budget: int) -> float:
    """Every combination there is."""
    return min(
        math.fsum(option.damage for option in combination)
        for combination in itertools.product(*options.values())
        if sum(option.bytes for option in combination) <= budget
    )


@pytest.mark.parametrize("most_bytes", [8, 60, 10**10])
@pytest.mark.parametrize("seed", range(40))
def test_it_is_as_good_as_brute_force(seed: int, most_bytes: int) -> None:
    options = _random_options(seed, most_bytes=most_bytes)
    smallest, largest = _range(options)
    budget = random.Random(seed).randint(smallest, largest)
    found = allocate(options, budget)
    assert found.chosen.keys() == options.keys()
    assert all(found.chosen[name] in ladder for name, ladder in options.items())
    assert found.bytes <= budget
    assert found.damage == pytest.approx(_least(options, budget), rel=1e-12)
    assert found.gap == 0.0


def _proportional(n_layers: int, n_options: int, seed: int, noise: float = 0.0) -> _Options:
    """The hard kind: options save what they cost, so that only sums of bytes tell them apart."""
    rng = random.Random(seed)
    return {
        f"layer{i}": [
            _option(size, 10**6 - size + noise * rng.random())
            for size in [0, *sorted(rng.sample(range(1, 10**6), n_options - 1))]
        ]
        for i in range(n_layers)
    }


def test_where_states_are_dropped_the_gap_is_honest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "_MOST_STATES", 8)
    gaps, missed = [], []
    for seed in range(30):
        options = _proportional(6, 4, seed, noise=1e5)
        budget = sum(_range(options)) * (seed + 1) // 32
        found, least = allocate(options, budget), _least(options, budget)
        assert found.bytes <= budget
        assert least * (1 - 1e-12) <= found.damage <= least * (1 + 1e-12) + found.gap
        gaps.append(found.gap)
        missed.append(found.damage / least - 1)
    assert sum(gap > 0 for gap in gaps) > 3
    assert max(missed) > 0  # so the gap was needed


def test_more_budget_never_does_more_damage() -> None:
    options = _random_options(3, n_layers=8, n_options=5)
    smallest, largest = _range(options)
    damages = [allocate(options, budget).damage for budget in range(smallest, largest + 1)]
    assert damages == sorted(damages, reverse=True)
    assert damages[0] > 10 * damages[-1]


def test_a_thousand_layers_are_solved_exactly_in_seconds() -> None:
    options = _model(1000)
    smallest, largest = _range(options)
    before = time.process_time()
    found = [allocate(options, smallest + (largest - smallest) * i // 10) for i in range(1, 10)]
    assert time.process_time() - before < 5
    for i, one in enumerate(found, 1):
        assert one.bytes <= smallest + (largest - smallest) * i // 10
        # Bytes sold at one price: nothing is better, and only one layer's bytes come in between.
        relaxed = math.fsum(
            min(option.damage + one.price * option.bytes for option in ladder)
            for ladder in options.values()
        ) - one.price * (smallest + (largest - smallest) * i // 10)
        assert relaxed <= one.damage * (1 + 1e-9)
        assert one.damage - relaxed <= one.price * 3072 * 14336 * 2
        assert one.gap == 0.0


def test_savings_in_proportion_to_bytes_fill_the_budget_to_the_byte() -> None:
    found = allocate(_proportional(60, 6, seed=0), 20 * 10**6)
    assert found.bytes == 20 * 10**6
    assert found.gap == 0.0


def test_a_budget_below_the_smallest_size_says_what_is_possible() -> None:
    options = _random_options(1)
    smallest, _ = _range(options)
    assert allocate(options, smallest).bytes == smallest
    with pytest.raises(PlanError, match=f"{smallest - 1} bytes.*6 weights.* {smallest} bytes"):
        allocate(options, smallest - 1)


def test_the_order_of_layers_and_options_changes_nothing() -> None:
    options = _model(30)
    options["layer7"] = options["layer3"]  # equal slopes
    budget = sum(_range(options)) // 3
    shuffled = {name: list(reversed(options[name])) for name in reversed(options)}
    assert allocate(options, budget) == allocate(shuffled, budget)


def test_what_is_larger_and_no_better_is_never_taken() -> None:
    options = {"a": [_option(10, 1.0), _option(20, 1.0), _option(30, 2.0), _option(10, 3.0)]}
    found = allocate(options, 100)
    assert found.chosen == {"a": _option(10, 1.0)}
    assert found.next_up == {"a": None}
    assert found.price == 0.0
    assert allocate({}, 0).chosen == {}


def test_each_layer_says_what_the_next_step_would_cost_and_save() -> None:
    options = {
        "cheap": [_option(10, 8.0, "small"), _option(20, 2.0, "large")],
        "dear": [_option(10, 4.0, "small"), _option(30, 3.0, "mid"), _option(40, 1.0, "large")],
    }
    found = allocate(options, 35)
    assert {name: option.format for name, option in found.chosen.items()} == {
        "cheap": "large",
        "dear": "small",
    }
    step = found.next_up["dear"]
    assert step is not None
    assert (step.format, step.bytes, step.damage) == ("large", 30, 3.0)
    assert found.price == pytest.approx(0.1)
    assert "large would cost 30 bytes more and save 3" in found.why["dear"]
    assert "no format on offer" in found.why["cheap"]


@pytest.mark.parametrize(
    "ladder", [[], [_option(1, math.nan)], [_option(1, math.inf)], [_option(-1, 1.0)]]
)
def test_options_that_make_no_sense_are_refused_by_name(ladder: list[Option]) -> None:
    with pytest.raises(ValueError, match="layer"):
        allocate({"layer": ladder}, 10)
