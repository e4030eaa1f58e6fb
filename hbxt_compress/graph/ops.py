"""Torch modules and functions that trace to the ONNX nodes we ship.

They replace their torch namesakes before capture and keep parameter names. A linear becomes one
hbxt::Linear node that names its layer; graph/passes.py hands it to the layer's number format, and
graph/convolution.py does so with hbxt::Conv. Run eagerly the symbolic ones return zeros: they exist
to be traced.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from hbxt_compress.graph.builder import CONTRIB

__all__ = [
    "OWN_DOMAIN",
    "FastGelu",
    "LayerNorm",
    "Linear",
    "RmsNorm",
    "attend",
    "convolve_frames",
    "shared_copy",
    "swap",
]

OWN_DOMAIN = "hbxt"
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Linear(nn.Module):
    """x @ W^T + b as one node; a weight of higher rank counts as flattened to O I."""

    def __init__(self, layer: str, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.layer = layer
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        inputs = (x, self.weight) if self.bias is None else (x, self.weight, self.bias)
        return torch.onnx.ops.symbolic(
            f"{OWN_DOMAIN}::Linear",
            inputs,
            {"layer": self.layer},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.weight.shape[0]),
            version=1,
        )


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in elementary float32 nodes."""

    def __init__(self, weight: Tensor, eps: float | None) -> None:
        super().__init__()
        self.weight = weight
        self.eps = torch.finfo(torch.float32).eps if eps is None else eps

    def forward(self, x: Tensor) -> Tensor:
        # a power, not a product: so ONNX Runtime knows the pattern and computes it in one pass
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class LayerNorm(nn.Module):
    """LayerNormalization over the last axis; without affine parameters its scale is a buffer."""

    def __init__(self, size: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        super().__init__()
        self.size = (size,)
        self.eps = eps
        if weight is None:
            self.register_buffer("weight", torch.ones(size))
        else:
            self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, self.size, self.weight, self.bias, self.eps)


class FastGelu(nn.Module):
    """GELU by its tanh formula, one node."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{CONTRIB}::FastGelu", (x,), dtype=x.dtype, shape=x.shape, version=1
        )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    n_heads: int,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of B S H*D tensors as one MultiHeadAttention node; bias is 1 H S S, added."""
    inputs = (query, key, value) if bias is None else (query, key, value, None, None, bias)
    return torch.onnx.ops.symbolic(
        f"{CONTRIB}::MultiHeadAttention",
        inputs,
        {"num_heads": n_heads, "scale": scale},
        dtype=query.dtype,
        shape=query.shape,
        version=1,
    )


def convolve_frames(
    frames: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    padding: tuple[int, int],
    before: Tensor | None = None,
    groups: int = 1,
) -> Tensor:
    """T O H W of frames T C H W: Conv3d with a weight O C/groups K h w, stride 1, as one node.

    before: the K-1 frames that came before, K-1 C H W; None: zeros, of which a single frame may do
    without. padding: zeros above and below, left and right.
    """
    n_frames, _, *size = frames.shape
    n_out, _, n_together, *kernel = weight.shape
    if before is None and n_frames > 1 < n_together:
        raise ValueError(f"{n_frames} frames need the {n_together - 1} before them")
    sizes = (n + 2 * p - k + 1 for n, p, k in zip(size, padding, kernel, strict=True))
    return torch.onnx.ops.symbolic(
        f"{OWN_DOMAIN}::Conv",
        (frames, weight, bias, before),
        {"pads": [*padding, *padding], "group": groups},
        dtype=frames.dtype,
        shape=(n_frames, n_out, *sizes),
        version=1,
    )


def shared_copy(module: ModuleT) -> ModuleT:
    """A copy with modules of its own that shares the parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def swap(module: nn.Module, replacement: Callable[[str, nn.Module], nn.Module | None]) -> None:
    """Replaces, in place, every descendant for which `replacement(its path, it)` is not None."""
    for path, child in list(module.named_modules()):
        new = replacement(path, child) if path else None
        if new is not None:
            module.set_submodule(path, new)
