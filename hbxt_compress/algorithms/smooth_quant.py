"""SmoothQuant: how much of the inputs' spread moves into the weights, for 8-bit activations.

Channel j of the input is multiplied by r_j and column j of the weights divided by it, with
1 / r_j = max|x_j|^alpha / max_i|w_ij|^(1 - alpha) (arXiv 2211.10438, equation 4). An outlier
channel then no longer sets the step of its whole token; in exchange its column is large in the
weights. How much pays differs by layer, so alpha is chosen by the error of the product with both
sides rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from hbxt_compress.formats.activations import Int8Token
from hbxt_compress.formats.int8 import Int8

__all__ = ["ALPHAS", "choose_alpha", "smooth_scale"]

ALPHAS: Final[tuple[float, ...]] = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Strengths worth trying; 0 leaves the layer alone."""

_LEAST, _MOST = 1e-3, 1e3  # of an input scale, far inside float16
_SMALLEST = 1e-4  # of the largest: smaller channels and columns count as this large


def smooth_scale(absmax_I: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """r, float16 I in [1e-3, 1e3], to multiply the input with; ones for alpha = 0.

    absmax_I: largest absolute input of each channel. weights: of all layers that read this input,
    O I each. alpha: 0 to 1; 1 makes all channels of the input equally large.

    Raises:
        ValueError: alpha is out of range, a shape does not fit, or a value is not finite.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha}: must be between 0 and 1")
    n_in = absmax_I.numel()
    if not weights or any(weight.shape[1:] != (n_in,) for weight in weights):
        shapes = [tuple(weight.shape) for weight in weights]
        raise ValueError(f"weights of shapes {shapes} for {n_in} input channels")
    columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).double()
    channels = absmax_I.abs().double()
    if not bool(torch.isfinite(columns).all() and torch.isfinite(channels).all()):
        raise ValueError("weights or absolute maxima hold NaN or infinity")
    if alpha == 0 or not bool(columns.any()) or not bool(channels.any()):
        return torch.ones(n_in, dtype=torch.float16)
    columns = columns.clamp_min(_SMALLEST * float(columns.max()))
    channels = channels.clamp_min(_SMALLEST * float(channels.max()))
    factor = columns.pow(1 - alpha) / channels.pow(alpha)
    # A common factor changes nothing but the weights' scales, which should stay normal in float16.
    factor = factor / factor.log().mean().exp()
    return factor.clamp(_LEAST, _MOST).to(torch.float16)


def choose_alpha(
    x_NI: Tensor,
    weights: Sequence[Tensor],
    alphas: Sequence[float] = ALPHAS,
    *,
    least_gain_db: float = 0.3,
) -> tuple[float, Tensor]:
    """The alpha of least error, and its input scale, float16 I.

    The error is that of Q(x r) Q(W / r)^T against x W^T, relative to the latter, summed over
    weights; inputs are rounded per token, weights per output channel. 0 (no scale, no Mul at run
    time) is always tried, and kept unless another alpha gains least_gain_db. x_NI: some hundred
    rows of inputs.
    """
    absmax_I = x_NI.abs().amax(0)
    best = (0.0, smooth_scale(absmax_I, weights, 0.0))
    exact = [x_NI.float() @ weight.float().T for weight in weights]
    least = _error(x_NI, weights, exact, best[1]) * 10 ** (-least_gain_db / 10)
    for alpha in alphas:
        if alpha == 0:
            continue
        scale_I = smooth_scale(absmax_I, weights, alpha)
        error = _error(x_NI, weights, exact, scale_I)
        if error < least:
            best, least = (alpha, scale_I), error
    return best


def _error(
    x_NI: Tensor, weights: Sequence[Tensor], exact: Sequence[Tensor], scale_I: Tensor
) -> float:
    scale_I = scale_I.float()
    rounded_NI = Int8Token().apply(x_NI.float() * scale_I)
    total = 0.0
    for weight_OI, exact_NO in zip(weights, exact, strict=True):
        scaled_OI = weight_OI.float() / scale_I
        payload = Int8().encode(scaled_OI, scaled_OI.abs().amax(1, keepdim=True) / 127)
        lost_NO = rounded_NI @ Int8().decode(payload).T - exact_NO
        size = float(exact_NO.double().square().sum())
        total += float(lost_NO.double().square().sum()) / max(size, 1e-30)
    return total
