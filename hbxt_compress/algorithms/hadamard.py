"""Hadamard: blocks of neighbouring input channels rotated at run time, alone or after a scaling.

A rotation spreads a column of large weights over its whole block, so that no group of weights has
to take its step from one outlier (QuIP#, arXiv 2402.04396; QuaRot, arXiv 2404.00456). Between
layers of a modulated transformer it cannot be folded into weights; as one MatMul with a B x B
matrix it costs B / O of the layer's own work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from hbxt_compress.algorithms.scale import input_scale
from hbxt_compress.algorithms.transform import Transform
from hbxt_compress.stats import LayerInputs, Need
from hbxt_compress.strict import Settings

__all__ = ["Hadamard"]

_Exponent = Annotated[float, Field(ge=0, le=1)]


class Hadamard(Settings):
    """Rotates blocks of input channels, one small MatMul for all layers that share the input."""

    VERSION: ClassVar[int] = 1

    blocks: tuple[Literal[16, 32, 64, 128, 256], ...] = (64, 128)
    """Block sizes that are tried where they divide the input's width."""
    scales: tuple[tuple[_Exponent, _Exponent], ...] = ((0.2, 0.3),)
    """Exponents (alpha, beta) of scalings before the rotation, tried with every block size."""

    @property
    def need(self) -> Need | None:
        """Statistics that choosing among the candidates takes."""
        return "covariance"

    def candidates(
        self, weights: Sequence[Tensor], inputs: LayerInputs
    ) -> Iterator[tuple[str, Transform]]:
        """Named transforms of the input that all weights (O I each) share."""
        fitting = [block for block in self.blocks if weights[0].shape[1] % block == 0]
        for block in fitting:
            yield f"hadamard {block}", Transform(block=block)
        for alpha, beta in self.scales if fitting else ():
            factor_I = input_scale(weights, inputs, alpha, beta)
            for block in fitting:
                yield (
                    f"scale {alpha:g} {beta:g} + hadamard {block}",
                    Transform.scaling(factor_I, block),
                )
