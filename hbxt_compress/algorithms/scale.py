"""Scale: channels of the input multiplied by r, columns of the weight divided by it.

s_j = E[y_j^2]^(alpha/2) / max_i |w_ij|^beta, r = 1 / s: columns whose input is strong get finer
steps, columns whose weights are large do not coarsen those of their group. alpha = 0.5 to 1 with
beta = 0 is AWQ (arXiv 2306.00978), both together SmoothQuant's balance (arXiv 2211.10438). Where
scales are searched for weighted error, as here, the best alpha is smaller, about 0.2: the search
has already clipped the columns that hardly count to the benefit of those that do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hbxt_compress.algorithms.transform import Transform, channel_power
from hbxt_compress.stats import LayerInputs, Need
from hbxt_compress.strict import Settings

__all__ = ["Scale", "input_scale"]

_Exponent = Annotated[float, Field(ge=0, le=1)]


class Scale(Settings):
    """Scales each input channel, one Mul at run time for all layers that share the input."""

    VERSION: ClassVar[int] = 1

    alphas: tuple[_Exponent, ...] = (0.0, 0.1, 0.2, 0.3, 0.45)
    """Exponents of the input's size that are tried."""
    betas: tuple[_Exponent, ...] = (0.0, 0.2, 0.5, 0.75)
    """Exponents of the weight's size that are tried, with every alpha."""

    @property
    def need(self) -> Need | None:
        """Statistics that choosing among the candidates takes."""
        return "covariance"

    def candidates(
        self, weights: Sequence[Tensor], inputs: LayerInputs
    ) -> Iterator[tuple[str, Transform]]:
        """Named transforms of the input that all weights (O I each) share, without the identity."""
        for alpha in self.alphas:
            for beta in self.betas:
                factor_I = input_scale(weights, inputs, alpha, beta)
                if bool((factor_I != factor_I[0]).any()):
                    yield f"scale {alpha:g} {beta:g}", Transform.scaling(factor_I)


def input_scale(
    weights: Sequence[Tensor], inputs: LayerInputs, alpha: float, beta: float
) -> Tensor:
    """r = 1 / s, float64 I, unclipped, with sqrt(max * min) = 1.

    The largest |w| of a column is over all weights, each in units of its root mean square: the
    layers of a group count alike.
    """
    largest = torch.stack([_column_sizes(weight_OI) for weight_OI in weights]).amax(0)
    factor = largest.pow(beta) / channel_power(inputs).pow(alpha / 2)
    return factor / (factor.max() * factor.min()).sqrt()


def _column_sizes(weight_OI: Tensor) -> Tensor:
    """max |w| of each column over the weight's root mean square, at least 1e-4 of the largest."""
    if not bool(torch.isfinite(weight_OI).all()):
        raise ValueError("a weight holds NaN or infinity")
    size = weight_OI.abs().amax(0).double()
    if not bool(size.any()):
        return torch.ones_like(size)
    norm = weight_OI.double().square().mean().sqrt()
    return size.clamp_min(1e-4 * float(size.max())) / norm
