"""Rotate: each head's features turned by an orthogonal matrix, folded into value and output.

Attention mixes tokens, not the features of a head, so softmax(q k) (R v) = R softmax(q k) v.
Two kinds of R are tried. "hadamard" spreads outlier columns. "level" makes the pivots of the
head's covariance equal: the error of a layer rounded with feedback is about step^2 / 12 times the
sum of the LDL pivots d_j of its input covariance. Their product is the determinant, which no
rotation changes, so the sum is least when they are equal, and then they are the geometric mean:
what rate-distortion theory gains by unequal bit rates is gained at equal ones. (The existence is
the geometric mean decomposition, Jiang, Hager and Li, 2005.) The price is columns of less equal
size; sorted by size within their head, the alike ones at least share a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hbxt_compress.algorithms.transform import Mixing, hadamard_matrix
from hbxt_compress.stats import LayerInputs, Need
from hbxt_compress.strict import Settings

__all__ = ["Rotate", "level_turns"]


class Rotate(Settings):
    """Turns the features of each head between a value and an output projection."""

    VERSION: ClassVar[int] = 1
    JOINTS: ClassVar[frozenset[str]] = frozenset({"heads"})

    kinds: tuple[Literal["hadamard", "level"], ...] = ("hadamard", "level")
    """Rotations that are tried."""
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Added to the covariance before its pivots are levelled, in units of its mean diagonal."""
    widest: Annotated[int, Field(ge=1)] = 8192
    """features between two layers up to which it is tried: judging takes their covariance"""

    @property
    def need(self) -> Need | None:
        """Statistics that choosing among the candidates takes."""
        return "covariance"

    def candidates(
        self, first_FI: Tensor, second_OF: Tensor, inputs_of_second: LayerInputs, n_heads: int
    ) -> Iterator[tuple[str, Mixing]]:
        """Named rotations of the F features, one matrix a head."""
        n_features = second_OF.shape[1]
        if n_features % n_heads or first_FI.shape[0] != n_features:
            raise ValueError(
                f"{first_FI.shape[0]} features into {n_features} columns of {n_heads} heads: "
                "they must be as many, and a multiple of the heads"
            )
        size = n_features // n_heads
        block = size & -size  # the largest power of two that divides a head
        if "hadamard" in self.kinds and block > 1:
            turn_DD = torch.block_diag(*[hadamard_matrix(block)] * (size // block))
            turn_DD = turn_DD.to(second_OF.device)
            yield "hadamard", Mixing(turn_NDD=turn_DD.expand(n_heads, -1, -1).clone())
        if "level" in self.kinds and size > 1:
            whole = inputs_of_second.fit.hessian(centred=inputs_of_second.takes_bias)
            heads = whole.reshape(n_heads, size, n_heads, size)
            covariance_NDD = heads.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            turn_NDD = level_turns(covariance_NDD, self.damping)
            turned_OF = Mixing(turn_NDD=turn_NDD).second(second_OF.double())
            size_ND1 = turned_OF.norm(dim=0).reshape(n_heads, size, 1)
            order_ND1 = size_ND1.argsort(dim=1, descending=True, stable=True)
            yield "level", Mixing(turn_NDD=turn_NDD.gather(1, order_ND1.expand_as(turn_NDD)))


def level_turns(covariance_NDD: Tensor, damping: float) -> Tensor:
    """Rotations after which the variance of each feature, given all later ones, is the same.

    That variance is the pivot of a feature that is rounded before the later ones. From the last
    feature to the first: mixes the strongest and the weakest direction left into one of the
    wanted variance; what is orthogonal to it in their plane goes on, uncorrelated with the rest
    once the new feature is known. float64 N D D; all-zero covariance gives an orthogonal matrix.
    """
    n_heads, size, _ = covariance_NDD.shape
    mean_N = covariance_NDD.diagonal(dim1=1, dim2=2).mean(-1)
    extra_N = torch.where(mean_N > 0, damping * mean_N, torch.ones_like(mean_N))
    device = covariance_NDD.device
    unit = torch.eye(size, dtype=torch.float64, device=device)
    damped_NDD = covariance_NDD.double() + extra_N[:, None, None] * unit
    variance_ND, basis_NDD = torch.linalg.eigh(damped_NDD)
    variance_ND = torch.maximum(variance_ND, extra_N[:, None])
    direction_NDD = basis_NDD.mT.contiguous()  # one direction a row
    wanted_N = variance_ND.log().mean(-1).exp()
    heads = torch.arange(n_heads, device=device)
    left_ND = torch.ones(n_heads, size, dtype=torch.bool, device=device)
    turn_NDD = torch.empty_like(direction_NDD)
    for place in range(size - 1, 0, -1):
        strong = variance_ND.masked_fill(~left_ND, -torch.inf).argmax(-1)
        left_ND[heads, strong] = False
        weak = variance_ND.masked_fill(~left_ND, torch.inf).argmin(-1)
        high, low = variance_ND[heads, strong], variance_ND[heads, weak]
        share = ((wanted_N - low) / (high - low).clamp_min(1e-300)).clamp(0, 1)
        cos, sin = share.sqrt()[:, None], (1 - share).sqrt()[:, None]
        one, two = direction_NDD[heads, strong], direction_NDD[heads, weak]
        turn_NDD[:, place] = cos * one + sin * two
        direction_NDD[heads, weak] = cos * two - sin * one
        variance_ND[heads, weak] = high * low / wanted_N
    turn_NDD[:, 0] = direction_NDD[left_ND]
    return turn_NDD
