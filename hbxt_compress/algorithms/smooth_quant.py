"""SmoothQuant: how much of the inputs' spread moves into the weights, for 8-bit activations.

Channel j of the input is multiplied by r_j and column j of the weights divided by it, with
1 / r_j = max|x_j|^alpha / max_i|w_ij|^(1 - alpha) (arXiv 2211.10438, equation 4). An outlier
channel then no longer sets the step of its whole token; in exchange its column is large in the
weights. How much pays differs by layer: the alpha is chosen with both sides rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hbxt_compress.algorithms.transform import Transform
from hbxt_compress.stats import LayerInputs, Need
from hbxt_compress.strict import Settings

__all__ = ["SmoothQuant", "smooth_scale"]

_SMALLEST = 1e-4  # of the largest: smaller channels and columns count as this large


class SmoothQuant(Settings):
    """Evens out the largest values of input channels, one Mul at run time."""

    VERSION: ClassVar[int] = 1

    alphas: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """Strengths that are tried; 1 makes all channels of the input equally large."""

    @property
    def need(self) -> Need | None:
        """Statistics that choosing among the candidates takes."""
        return "covariance"

    def candidates(
        self, weights: Sequence[Tensor], inputs: LayerInputs
    ) -> Iterator[tuple[str, Transform]]:
        """Named transforms of the input that all weights (O I each) share, without the identity."""
        absmax_I = inputs.fit.absmax_I
        for alpha in self.alphas:
            scale_I = smooth_scale(absmax_I, weights, alpha)
            if bool((scale_I != scale_I[0]).any()):
                yield f"smooth {alpha:g}", Transform(scale_I=scale_I)


def smooth_scale(absmax_I: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """r, float16 I in [1e-3, 1e3], to multiply the input with; ones for alpha = 0.

    absmax_I: largest absolute input of each channel. weights: of all layers that read this input,
    O I each. alpha: 0 to 1.

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
        return torch.ones(n_in, dtype=torch.float16, device=columns.device)
    columns = columns.clamp_min(_SMALLEST * float(columns.max()))
    channels = channels.clamp_min(_SMALLEST * float(channels.max()))
    factor = columns.pow(1 - alpha) / channels.pow(alpha)
    # A common factor changes nothing but the weights' scales, which should stay normal in float16.
    factor = factor / factor.log().mean().exp()
    scale_I = Transform.scaling(factor).scale_I
    assert scale_I is not None
    return scale_I
