"""Whether one set of clips is worse than another: against literal statements and known answers."""

from __future__ import annotations

import numpy as np
import pytest

from hbxt_compress.metrics import METRICS
from hbxt_compress.metrics.comparison import compare, difference, holm, more_clips
from hbxt_compress.metrics.scales import AMPLITUDE, DECIBEL, POWER, SHARE, SIMILARITY

_N = 64


def _noise(seed: int, spread: float = 1.0, n: int = _N) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n) * spread


def test_scales_count_errors_in_decibels_and_more_is_worse() -> None:
    assert AMPLITUDE.damage(np.array([0.1, 1.0])) == pytest.approx([-20, 0])
    assert POWER.damage(np.array([0.1, 0.01])) == pytest.approx([-10, -20])
    assert SIMILARITY.damage(np.array([0.9, 0.99])) == pytest.approx([-10, -20])
    assert DECIBEL.damage(np.array([40.0, 30.0])) == pytest.approx([-40, -30])
    assert SHARE.damage(np.array([1.0, 0.5])) == pytest.approx([-1, -0.5])
    for scale, perfect in ((AMPLITUDE, 0.0), (POWER, 0.0), (SIMILARITY, 1.0)):
        assert scale.damage(np.array(perfect)) == pytest.approx(-100)


def test_every_paired_metric_says_how_its_values_compare() -> None:
    without = [m.name for m in METRICS.values() if m.family == "fidelity" and m.scale is None]
    assert not without
    for metric in METRICS.values():
        if metric.scale is not None:
            worse, better = (0.1, 0.9) if metric.direction == "higher" else (0.9, 0.1)
            damage = metric.scale.damage(np.array([worse, better]))
            assert damage[0] > damage[1], metric.name


def test_holm_is_the_literal_one() -> None:
    chances = [0.01, 0.04, 0.03, 0.005]
    # sorted: 0.005*4, 0.01*3, 0.03*2, 0.04*1, each at least the one before
    assert holm(chances) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("by", "outcome"), [(0.0, "pass"), (-3.0, "pass"), (0.9, "undecided"), (3.0, "fail")]
)
def test_a_mean_change_is_judged_by_its_interval_and_the_margin(by: float, outcome: str) -> None:
    usual = 40 + _noise(0, 5)
    candidate = usual - by + _noise(1, 1)
    (one,) = compare({"psnr": candidate}, {"psnr": usual}, {"psnr": DECIBEL}, {}, 0)
    assert one.outcome == outcome
    assert one.value == pytest.approx(by, abs=0.5)
    assert one.interval[0] < one.value < one.interval[1]
    assert (one.n_needed is None) == (outcome != "undecided")
    assert "may be 1 dB worse" in one.text


def test_the_interval_is_that_of_the_mean() -> None:
    usual, moved = 40 + _noise(0, 5), _noise(1, 2)
    (one,) = compare({"psnr": usual - moved}, {"psnr": usual}, {"psnr": DECIBEL}, {}, 0)
    half = 1.96 * moved.std(ddof=1) / np.sqrt(_N)
    assert one.interval[0] == pytest.approx(moved.mean() - half, abs=0.15 * half)
    assert one.interval[1] == pytest.approx(moved.mean() + half, abs=0.15 * half)


def test_pairs_are_compared_not_sides() -> None:
    """Clips differ by 10 dB from each other; a change of 2 dB in each of them is seen."""
    usual = 40 + _noise(0, 10)
    (one,) = compare({"psnr": usual - 2}, {"psnr": usual}, {"psnr": DECIBEL}, {}, 0)
    assert (one.outcome, one.value) == ("fail", pytest.approx(2))


def test_nobody_is_asked_to_be_nearer_than_full_precision_to_itself() -> None:
    identical, noisy = np.full(_N, 100.0), 90 + _noise(1, 2)
    floor = 90 + _noise(2, 2, n=16)
    (harsh,) = compare({"psnr": noisy}, {"psnr": identical}, {"psnr": DECIBEL}, {}, 0)
    assert harsh.outcome == "fail"
    (fair,) = compare({"psnr": noisy}, {"psnr": identical}, {"psnr": DECIBEL}, {"psnr": floor}, 0)
    assert fair.outcome == "pass"
    (worse,) = compare(
        {"psnr": noisy - 5}, {"psnr": identical}, {"psnr": DECIBEL}, {"psnr": floor}, 0
    )
    assert worse.outcome == "fail"


def test_of_many_metrics_without_a_change_few_fail() -> None:
    """At the margin itself, the worst case, a family of six fails in at most about 1 %."""
    failed = 0
    for seed in range(60):
        usual = {f"m{i}": 40 + _noise(1000 * seed + i, 3, n=32) for i in range(6)}
        same = {
            name: v - 1 + _noise(7 + seed * 31 + i, 1, n=32)
            for i, (name, v) in enumerate(usual.items())
        }
        changes = compare(same, usual, dict.fromkeys(usual, DECIBEL), {}, seed)
        failed += any(one.outcome == "fail" for one in changes)
    assert failed <= 4  # 1 % of 60 is less than 1; a bootstrap of 32 clips is a little short


def test_too_few_or_unequal_clips_are_refused() -> None:
    for n, m in ((7, 7), (8, 9)):
        with pytest.raises(ValueError, match=f"{n} and {m} clips"):
            compare({"psnr": np.ones(n)}, {"psnr": np.ones(m)}, {"psnr": DECIBEL}, {}, 0)


def test_a_metric_of_one_side_only_is_left_out() -> None:
    assert compare({"psnr": np.ones(8)}, {"ssim": np.ones(8)}, {"psnr": DECIBEL}, {}, 0) == []


def test_a_difference_has_two_sides() -> None:
    usual = 40 + _noise(0, 5)
    for by in (1.0, -1.0):
        value, interval, p = difference(usual - by, usual + _noise(3, 0.2), DECIBEL, 0)
        assert value == pytest.approx(by, abs=0.1)
        assert interval[0] < value < interval[1]
        assert p < 0.001
    *_, p = difference(usual, usual + _noise(3, 1), DECIBEL, 0)
    assert p > 0.05
    assert difference(usual, usual, DECIBEL, 0) == (0.0, (0.0, 0.0), 1.0)


def test_more_clips_is_what_the_square_root_law_says() -> None:
    assert more_clips(16, 1.0, 0.5) == 64
    assert more_clips(16, 1.0, -0.5) == 64
    assert more_clips(16, 1.0, 0.0) is None
    assert more_clips(16, 0.1, 5.0) == 17
