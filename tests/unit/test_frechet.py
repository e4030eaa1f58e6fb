"""Set distances against independent formulas, and their intervals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from hbxt_compress.metrics.frechet import frechet_distance, kernel_distance
from hbxt_compress.metrics.statistics import bootstrap_interval, half_sampling_interval


def _by_sqrtm(a: np.ndarray, b: np.ndarray) -> float:
    s_a, s_b = np.cov(a.T), np.cov(b.T)
    root = sqrtm(s_a @ s_b)
    return float(
        np.sum((a.mean(0) - b.mean(0)) ** 2)
        + np.trace(s_a)
        + np.trace(s_b)
        - 2 * np.trace(root.real)
    )


@pytest.mark.parametrize(("n", "m"), [(200, 200), (150, 60)])
def test_nuclear_norm_equals_the_matrix_square_root(
    rng: np.random.Generator, n: int, m: int
) -> None:
    a = rng.normal(size=(n, 16)) @ rng.normal(size=(16, 16)) + 1
    b = rng.normal(size=(m, 16)) @ rng.normal(size=(16, 16))
    assert frechet_distance(a, b) == pytest.approx(_by_sqrtm(a, b), rel=1e-9)


def test_fewer_clips_than_features_is_exact_too(rng: np.random.Generator) -> None:
    """With n < d, by the eigenvalues of the small Gram product instead of any square root."""
    a, b = rng.normal(size=(10, 40)), rng.normal(size=(12, 40)) * 2
    a_c, b_c = a - a.mean(0), b - b.mean(0)
    gram = a_c @ b_c.T / np.sqrt(9 * 11)
    root = np.sqrt(np.maximum(np.linalg.eigvalsh(gram @ gram.T), 0)).sum()
    wanted = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-8)  # the roots of rounding noise


def test_known_gaussians() -> None:
    """Means 3 apart, deviations 1 and 2 in each of two directions: 9 + 2 (2 - 1)^2."""
    square = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) * np.sqrt(3 / 4)
    assert frechet_distance(square, 2 * square + [3, 0]) == pytest.approx(11)


def test_identity_symmetry_and_too_few(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(20, 5)), rng.normal(size=(20, 5))
    for distance in (frechet_distance, kernel_distance):
        assert distance(a, a) == pytest.approx(0, abs=1e-9)
        assert distance(a, b) == pytest.approx(distance(b, a), abs=1e-9)
        with pytest.raises(ValueError, match="2 clips"):
            distance(a[:1], b[:1])


def test_kernel_distance_equals_the_literal_double_loop(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(6, 3)), rng.normal(size=(6, 3)) + 0.5

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 3 + 1) ** 3)

    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    total = sum(k(a[i], a[j]) + k(b[i], b[j]) - k(a[i], b[j]) - k(a[j], b[i]) for i, j in pairs)
    assert kernel_distance(a, b) == pytest.approx(total / len(pairs))


def test_kernel_distance_of_one_law_is_zero_on_average(rng: np.random.Generator) -> None:
    found = [kernel_distance(*rng.normal(size=(2, 16, 4))) for _ in range(400)]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 4 * error
    assert min(found) < 0


def test_intervals_cover_the_truth_and_repeat(rng: np.random.Generator) -> None:
    covered = 0
    for k in range(100):
        values = rng.normal(5, 2, size=40).tolist()
        interval = bootstrap_interval(values, seed=k, n=400)
        assert interval is not None
        covered += interval[0] <= 5 <= interval[1]
    assert 85 <= covered <= 100
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval([1.0], seed=0) is None
    assert bootstrap_interval([2.0, 2.0], seed=0) == (2.0, 2.0)


def test_half_sampling_spread_matches_fresh_samples(rng: np.random.Generator) -> None:
    """The interval's width is that of the distance over new samples of the same size."""

    def draw() -> tuple[np.ndarray, np.ndarray]:
        a = rng.normal(size=(60, 3))
        return a, a + rng.normal(0.4, 0.5, size=(60, 3))

    fresh = np.percentile([frechet_distance(*draw()) for _ in range(200)], (2.5, 97.5))
    widths = []
    for k in range(8):
        a, b = draw()
        interval = half_sampling_interval(frechet_distance, a, b, seed=k, n=200)
        assert interval is not None
        assert interval[0] <= frechet_distance(a, b) <= interval[1]
        widths.append(interval[1] - interval[0])
    assert 0.6 < np.mean(widths) / (fresh[1] - fresh[0]) < 1.7
    assert half_sampling_interval(frechet_distance, a[:7], b[:7], seed=0) is None
