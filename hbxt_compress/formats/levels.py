"""Levels: the integers that codes stand for, w = (level - zero) * scale, one scale a group."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["checked", "nearest", "value"]


def nearest(
    weight_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor | None, n_levels: tuple[int, int]
) -> Tensor:
    """The levels nearest to a weight, whole float32 in [-below, above]; under a scale of 0: zero.

    n_levels: (below, above). zeros_OG: whole numbers in the same range, or None for 0.
    """
    step_OG1 = scales_OG.float().unsqueeze(-1)
    step_OG1 = torch.where(step_OG1 == 0, torch.inf, step_OG1)
    levels_OGS = (_grouped(weight_OI.float(), scales_OG) / step_OG1).round_()
    if zeros_OG is not None:
        levels_OGS += zeros_OG.float().unsqueeze(-1)
    return levels_OGS.clamp_(-n_levels[0], n_levels[1]).reshape(weight_OI.shape)


def value(levels_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor | None) -> Tensor:
    """The float32 weight that levels stand for."""
    steps_OGS = _grouped(levels_OI.float(), scales_OG)
    if zeros_OG is not None:
        steps_OGS = steps_OGS - zeros_OG.float().unsqueeze(-1)
    return (steps_OGS * scales_OG.float().unsqueeze(-1)).reshape(levels_OI.shape)


def _grouped(tensor_OI: Tensor, scales_OG: Tensor) -> Tensor:
    """O G S: the inputs of each group along the last axis."""
    n_out, n_groups = scales_OG.shape
    if tensor_OI.shape[0] != n_out or not n_groups or tensor_OI.shape[1] % n_groups:
        raise ValueError(f"scales of shape {n_out} {n_groups} for {tuple(tensor_OI.shape)} weights")
    return tensor_OI.reshape(n_out, n_groups, -1)


def checked(levels: Tensor, n_levels: tuple[int, int]) -> Tensor:
    """The same levels in int16, ready to be stored.

    Raises:
        ValueError: one is not whole or not in [-below, above].
    """
    whole = levels.to(torch.int16)
    below, above = n_levels
    least, most = whole.aminmax() if whole.numel() else (0, 0)
    if least < -below or most > above or not bool((whole == levels).all()):
        raise ValueError(f"levels must be whole numbers from -{below} to {above}")
    return whole
