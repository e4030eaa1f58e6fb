"""Layers and statistics to round by: real rows, or moments that are given exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from hbxt_compress.stats import LayerInputs, LayerStats


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(
    rows: int, n_in: int, *, power: float = 1.0, gain: float = 0.7, mean: float = 0.3, seed: int = 0
) -> Tensor:
    """Rows with a spectrum 1 / k^power, log-normal channel gains and means of their own."""
    basis, _ = torch.linalg.qr(normal(n_in, n_in, seed=seed + 100))
    spectrum = torch.arange(1, n_in + 1).float() ** (-power / 2)
    gains = torch.exp(gain * normal(n_in, seed=seed + 200))
    x = normal(rows, n_in, seed=seed + 300) * spectrum @ basis.T
    return x / x.std() * gains + mean * normal(n_in, seed=seed + 400) * gains


def stats_of(x: Tensor, y: Tensor | None = None) -> LayerStats:
    stats = LayerStats.empty(x.shape[1], "covariance")
    stats.add(x, x if y is None else y)
    return stats


def inputs_of(
    x: Tensor, y: Tensor | None = None, *, bias: bool = True, held: float = 0.2
) -> LayerInputs:
    """The last share of the rows is held out; none if it is zero."""
    y = x if y is None else y
    n = round(len(x) * (1 - held))
    held_out = stats_of(x[n:], y[n:]) if held else None
    return LayerInputs(fit=stats_of(x[:n], y[:n]), held_out=held_out, takes_bias=bias)


def exact(hessian_II: Tensor, cross_II: Tensor | None = None, *, bias: bool = True) -> LayerInputs:
    """Statistics without means whose covariances are exactly these, nothing held out."""
    n_in, weight = len(hessian_II), 64.0  # a power of two: sums divide back exactly
    zeros_I = torch.zeros(n_in, dtype=torch.float64)
    hessian_II = hessian_II.double()
    fit = LayerStats(
        n=64,
        weight=weight,
        shift_I=zeros_I,
        total_x_I=zeros_I,
        total_y_I=zeros_I,
        squares_y_I=hessian_II.diagonal() * weight,
        absmax_I=hessian_II.diagonal().clamp_min(0).sqrt(),
        products_yy_II=hessian_II * weight,
        products_xy_II=(hessian_II if cross_II is None else cross_II.double()) * weight,
    )
    return LayerInputs(fit=fit, held_out=None, takes_bias=bias)


def covariance(n_in: int, *, power: float = 1.0, seed: int = 0) -> Tensor:
    """A well-conditioned random covariance, float64."""
    x = correlated(4 * n_in, n_in, power=power, seed=seed).double()
    x = x - x.mean(0)
    return x.T @ x / len(x) + 0.01 * torch.eye(n_in, dtype=torch.float64)
