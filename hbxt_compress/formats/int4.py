"""int4: 4-bit codes in groups along the input features, one float16 scale a group.

w = (code - 8) * scale, codes 0..15. A scale may be negative: the signed-max grid spends code 0 on
the largest weight of a group, whatever its sign. In ONNX: com.microsoft::MatMulNBits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hbxt_compress.graph.builder import CONTRIB, GraphBuilder, Value
from hbxt_compress.layers import LayerSpec

__all__ = ["Int4"]

_ZERO = 8
_GROUPS = (128, 64, 32)


class Int4:
    """Names int4-g128, int4-g64, int4-g32. Shapes: O out, I in, G = I / group."""

    n_levels = (_ZERO, _ZERO - 1)

    def __init__(self, *, group: int) -> None:
        if group < 16 or group & (group - 1):
            raise ValueError(f"group {group}: MatMulNBits takes powers of two from 16 on")
        self.group = group
        self.name = f"int4-g{group}"

    def fits(self, spec: LayerSpec) -> str | None:
        """Why the weight cannot take this format and what to do, or None if it can."""
        if spec.kind != "linear":
            return f"{self.name} stores only linear weights, this is a {spec.kind}: keep it"
        n_in = spec.shape[1]
        if n_in % self.group == 0:
            return None
        smaller = [group for group in _GROUPS if group < self.group and n_in % group == 0]
        remedy = f"use int4-g{smaller[0]} or keep it" if smaller else "use int8-channel or keep it"
        return f"{n_in} input features are not a multiple of {self.group}: {remedy}"

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of packed codes and float16 scales."""
        n_weights = math.prod(shape)
        return n_weights // 2 + n_weights // self.group * 2

    def encode(self, weight_OI: Tensor, scales: Tensor) -> Mapping[str, Tensor]:
        """codes uint8 O I in 0..15, the nearest under scales O G; scales float16 O G."""
        scales_OG = scales.to(torch.float16)
        step_OI = scales_OG.float().repeat_interleave(self.group, dim=1)
        safe_OI = torch.where(step_OI == 0, torch.ones_like(step_OI), step_OI)
        codes_OI = torch.round(weight_OI.float() / safe_OI).clamp_(-_ZERO, _ZERO - 1) + _ZERO
        return {"codes": codes_OI.to(torch.uint8), "scales": scales_OG}

    def decode(self, payload: Mapping[str, Tensor]) -> Tensor:
        """The float32 weight, O I."""
        step_OI = payload["scales"].float().repeat_interleave(self.group, dim=1)
        return (payload["codes"].float() - _ZERO) * step_OI

    def pack(self, payload: Mapping[str, Tensor]) -> Tensor:
        """uint8 O G group/2: two codes a byte, the first in the low four bits."""
        n_out, n_in = payload["codes"].shape
        codes = payload["codes"].reshape(n_out, n_in // self.group, self.group // 2, 2)
        return codes[..., 0] | (codes[..., 1] << 4)

    def unpack(self, packed: Tensor) -> Tensor:
        """codes uint8 O I of what `pack` returned."""
        return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)

    def emit(
        self, graph: GraphBuilder, name: str, x: Value, payload: Mapping[str, Tensor]
    ) -> Value:
        """Adds MatMulNBits with three inputs: a fourth or later one is misread on some targets."""
        n_out, n_in = payload["codes"].shape
        packed = graph.initializer(f"{name}.codes", self.pack(payload))
        scales = graph.float32(f"{name}.scales", payload["scales"].flatten())
        return graph.node(
            "MatMulNBits",
            [x, packed, scales],
            shape=(*graph.shape_of(x)[:-1], n_out),
            domain=CONTRIB,
            K=n_in,
            N=n_out,
            bits=4,
            block_size=self.group,
        )
