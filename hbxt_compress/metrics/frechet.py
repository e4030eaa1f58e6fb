"""Distances between two sets of feature vectors: Frechet and kernel (KID).

The Frechet distance uses tr((S_a S_b)^1/2) = ||A_c B_c^T||_* / sqrt((n-1)(m-1)) for centred feature
matrices A_c (n x d), B_c (m x d): exact, and stable where n < d, unlike a matrix square root.
"""

from __future__ import annotations

import numpy as np

__all__ = ["frechet_distance", "kernel_distance"]


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr S_a + tr S_b - 2 tr((S_a S_b)^1/2) of features (n, d) and (m, d), >= 0.

    Covariances have n - 1 in the denominator; ValueError below two vectors a side.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a Frechet distance needs 2 clips a side, got {len(a)} and {len(b)}")
    a, b = a.astype(np.float64), b.astype(np.float64)
    mean = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2)
    a_c, b_c = a - a.mean(axis=0), b - b.mean(axis=0)
    traces = np.sum(a_c**2) / (len(a) - 1) + np.sum(b_c**2) / (len(b) - 1)
    # The orthogonal factors do not change singular values, so only the small triangles matter.
    nuclear = np.linalg.svd(_small(a_c) @ _small(b_c).T, compute_uv=False).sum()
    overlap = nuclear / np.sqrt((len(a) - 1) * (len(b) - 1))
    return float(max(0.0, mean + traces - 2 * overlap))


def _small(x: np.ndarray) -> np.ndarray:
    """A matrix with at most d rows that has the Gram matrix x^T x; x is (n, d)."""
    return np.asarray(np.linalg.qr(x, mode="r")) if x.shape[0] > x.shape[1] else x


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3: near 0 for one law, may be < 0.

    Row i of both sides comes from one prompt and seed, so the terms (a_i, b_i) are left out as
    (a_i, a_i) and (b_i, b_i) are: exactly 0 for identical sides. Both sides are (n, d), n >= 2.
    """
    if a.shape != b.shape or len(a) < 2:
        raise ValueError(
            f"a kernel distance needs sides of one shape and 2 clips, got {a.shape}, {b.shape}"
        )
    a, b = a.astype(np.float64), b.astype(np.float64)
    n, d = a.shape

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.asarray((x @ y.T / d + 1) ** 3)

    cross = kernel(a, b)
    h = kernel(a, a) + kernel(b, b) - cross - cross.T
    return float((h.sum() - np.trace(h)) / (n * (n - 1)))
