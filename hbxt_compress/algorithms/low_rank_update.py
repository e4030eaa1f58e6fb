"""Low-rank updates: W + B A in place of W, only A and B trained (Hu 2021, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["adapt"]


class _Update(nn.Module):
    """W -> W + B A, with B zero at first."""

    def __init__(self, like_OI: Tensor, rank: int) -> None:
        super().__init__()
        n_out, n_in = like_OI.shape
        draw = torch.Generator().manual_seed(0)
        start = torch.randn(rank, n_in, generator=draw) / n_in**0.5
        self.a_RI = nn.Parameter(start.to(like_OI))
        self.b_OR = nn.Parameter(like_OI.new_zeros(n_out, rank))

    def forward(self, weight_OI: Tensor) -> Tensor:
        return weight_OI + self.b_OR @ self.a_RI


def adapt(module: nn.Module, rank: int | None) -> Callable[[], dict[str, Tensor]]:
    """Gives every linear layer of rank 2 * rank or more an update; what reads the changed weights.

    All other parameters are frozen. rank None: nothing is changed, all parameters that wait for a
    gradient are read.
    """
    if rank is None:
        return lambda: {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    module.requires_grad_(False)
    adapted = {
        name: one
        for name, one in module.named_modules()
        if isinstance(one, nn.Linear) and min(one.weight.shape) >= 2 * rank
    }
    if not adapted:
        raise ValueError(f"rank {rank}: no linear layer is as large as twice that")
    for one in adapted.values():
        parametrize.register_parametrization(one, "weight", _Update(one.weight.detach(), rank))
    return lambda: {f"{name}.weight": one.weight.detach() for name, one in adapted.items()}
