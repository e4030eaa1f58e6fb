"""Split a weight into a 16-bit low-rank branch and a rest that is easier to round.

The branch takes the directions that stretch every group's scale (SVDQuant, arXiv 2411.05007). It is
the truncated SVD of W diag(sqrt(importance)), so columns of loud inputs are fitted more closely.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["branch", "split_low_rank"]

_EXACT_UP_TO = 2048  # smaller side of a weight beyond which its SVD is randomised
_OVERSAMPLE, _POWER_STEPS, _SEED = 8, 2, 0
_LEAST_ROOT = 1e-3  # of the largest root; keeps down / root inside float16
_LEAST = 1e-30  # stands for a strength of zero in divisions


def split_low_rank(
    weight_OI: Tensor, importance_I: Tensor | None, rank: int
) -> tuple[Tensor, Tensor]:
    """down_RI and up_OR, float16, so that up @ down is near the weight where importance is high.

    importance_I: what a squared error in each column costs, or None for ones. The same weight gives
    the same factors; components beyond the weight's own rank are zero.

    Raises:
        ValueError: rank is not positive, or the weight or importance is not finite.
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: a low-rank branch needs at least one component")
    weight_OI = weight_OI.double()
    root_I = weight_OI.new_ones(weight_OI.shape[1])
    if importance_I is not None and bool((importance_I > 0).any()):
        root_I = importance_I.double().clamp_min(0).sqrt()
        root_I = (root_I / root_I.max()).clamp_min(_LEAST_ROOT)
    scaled_OI = weight_OI * root_I
    if not bool(torch.isfinite(scaled_OI).all()):
        raise ValueError("low-rank split: the weight or its importances hold NaN or infinity")
    strong_RI = _leading(scaled_OI, min(rank, *weight_OI.shape))
    strength_R1 = strong_RI.norm(dim=1, keepdim=True)
    down_RI = weight_OI.new_zeros(rank, weight_OI.shape[1])
    down_RI[: len(strong_RI)] = strong_RI / strength_R1.sqrt().clamp_min(_LEAST) / root_I
    down_RI = down_RI.to(torch.float16)
    # `up` is fitted to `down` as stored, which makes up for most of its rounding.
    known_RI = down_RI.double() * root_I
    gram_RR = known_RI @ known_RI.T
    ridge = (gram_RR.diagonal().mean() * 1e-12).clamp_min(torch.finfo(torch.float64).tiny)
    gram_RR = gram_RR + ridge * torch.eye(rank).to(gram_RR)
    up_OR = torch.linalg.solve(gram_RR, known_RI @ scaled_OI.T).T
    return down_RI, up_OR.to(torch.float16)


def branch(low_rank: tuple[Tensor, Tensor]) -> Tensor:
    """up @ down, float64 O I."""
    down_RI, up_OR = low_rank
    return up_OR.double() @ down_RI.double()


def _leading(matrix_OI: Tensor, rank: int) -> Tensor:
    """The leading right singular vectors, each times its singular value and of fixed sign, R I."""
    if min(matrix_OI.shape) <= _EXACT_UP_TO:
        wide = matrix_OI.shape[0] < matrix_OI.shape[1]
        gram = matrix_OI @ matrix_OI.T if wide else matrix_OI.T @ matrix_OI
        squares, vectors = torch.linalg.eigh(gram)
        top = vectors[:, -rank:].flip(1)
        strength_R1 = squares[-rank:].flip(0).clamp_min(0).sqrt()[:, None]
        strong_RI = top.T @ matrix_OI if wide else strength_R1 * top.T
    else:
        generator = torch.Generator().manual_seed(_SEED)
        shape = (matrix_OI.shape[1], rank + _OVERSAMPLE)
        probe_IR = torch.randn(shape, dtype=torch.float64, generator=generator)
        basis_OR, _ = torch.linalg.qr(matrix_OI @ probe_IR.to(matrix_OI))
        for _ in range(_POWER_STEPS):
            basis_IR, _ = torch.linalg.qr(matrix_OI.T @ basis_OR)
            basis_OR, _ = torch.linalg.qr(matrix_OI @ basis_IR)
        _, strength_R, right_RI = torch.linalg.svd(basis_OR.T @ matrix_OI, full_matrices=False)
        strong_RI = (strength_R[:, None] * right_RI)[:rank]
    peak_R1 = strong_RI.gather(1, strong_RI.abs().argmax(1, keepdim=True))
    return torch.where(peak_R1 < 0, -strong_RI, strong_RI)
