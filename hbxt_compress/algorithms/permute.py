"""Permute: the features between two layers reordered, so that alike columns share a group.

A group of weights takes its step from its largest entry. Sorting the second layer's columns by
size makes groups homogeneous; the first layer's rows, each with steps of its own, do not mind.
Free: both weights are stored in the new order. "hidden" features (an MLP's, elementwise between
the layers) may be reordered at will, "heads" (a value projection's) only within their head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hbxt_compress.algorithms.transform import Mixing, channel_power
from hbxt_compress.stats import LayerInputs, Need
from hbxt_compress.strict import Settings

__all__ = ["Permute"]


class Permute(Settings):
    """Sorts the features between two layers by max_i |w_ij| * E[y_j^2]^(power/2)."""

    VERSION: ClassVar[int] = 1
    JOINTS: ClassVar[frozenset[str]] = frozenset({"hidden", "heads"})

    powers: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.0, 0.5, 1.0)
    """Exponents of the input's size that are tried; 0 sorts by the weight alone."""
    widest: Annotated[int, Field(ge=1)] = 8192
    """features between two layers up to which it is tried: judging takes their covariance"""

    @property
    def need(self) -> Need | None:
        """Statistics that choosing among the candidates takes."""
        return "covariance"

    def candidates(
        self, first_FI: Tensor, second_OF: Tensor, inputs_of_second: LayerInputs, n_heads: int = 1
    ) -> Iterator[tuple[str, Mixing]]:
        """Named orders of the F features, none across a head; hidden features are one head."""
        n_features = second_OF.shape[1]
        if n_features % n_heads or first_FI.shape[0] != n_features:
            raise ValueError(
                f"{first_FI.shape[0]} features into {n_features} columns of {n_heads} heads: "
                "they must be as many, and a multiple of the heads"
            )
        largest = second_OF.abs().amax(0).double()
        power = channel_power(inputs_of_second).sqrt()
        starts_N = torch.arange(0, n_features, n_features // n_heads)
        start_N1 = starts_N[:, None].to(largest.device)
        for exponent in self.powers:
            size_ND = (largest * power.pow(exponent)).reshape(n_heads, -1)
            order_ND = size_ND.argsort(dim=-1, descending=True, stable=True) + start_N1
            yield f"sorted {exponent:g}", Mixing(order_F=order_ND.flatten())
