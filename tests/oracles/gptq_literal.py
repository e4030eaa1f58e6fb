"""GPTQ as its paper writes it: explicit inverse, one row and one column at a time. Slow."""

from __future__ import annotations

import numpy as np


def round_row(value: float, scale: float, zero: float, below: int, above: int) -> int:
    return int(min(max(np.round(value / scale) + zero, -below), above))


def gptq(
    weight_OI: np.ndarray,
    hessian_II: np.ndarray,
    scales_OI: np.ndarray,
    zeros_OI: np.ndarray,
    levels: tuple[int, int],
    order: list[int],
) -> np.ndarray:
    """Levels: each column rounded, its error spread by the inverse Hessian of what is left."""
    n_out, n_in = weight_OI.shape
    found = np.zeros((n_out, n_in), dtype=int)
    for row in range(n_out):
        w = weight_OI[row].astype(np.float64).copy()
        inverse = np.linalg.inv(hessian_II)
        for column in order:
            scale, zero = scales_OI[row, column], zeros_OI[row, column]
            level = round_row(w[column], scale, zero, *levels)
            found[row, column] = level
            error = (w[column] - (level - zero) * scale) / inverse[column, column]
            done = np.isin(np.arange(n_in), order[: order.index(column) + 1])
            w[~done] -= error * inverse[column][~done]
            inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return found


def descend(
    weight_OI: np.ndarray,
    found_OI: np.ndarray,
    hessian_II: np.ndarray,
    scales_OI: np.ndarray,
    zeros_OI: np.ndarray,
    levels: tuple[int, int],
    order: list[int],
) -> np.ndarray:
    """One sweep of the best single change of each level, tried by trying every level."""
    found = found_OI.copy()
    every = np.arange(-levels[0], levels[1] + 1)
    for row in range(len(found)):
        for column in order:
            losses = []
            for level in every:
                trial = found[row].copy()
                trial[column] = level
                error = weight_OI[row] - (trial - zeros_OI[row]) * scales_OI[row]
                losses.append(error @ hessian_II @ error)
            found[row, column] = every[int(np.argmin(losses))]
    return found
