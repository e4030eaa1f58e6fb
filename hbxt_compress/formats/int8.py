"""int8-channel: 8-bit codes, symmetric, one float16 scale per output channel.

w = code * scale, codes -127..127. In ONNX: DequantizeLinear with a zero point of 0, then MatMul.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hbxt_compress.graph.builder import GraphBuilder, Value
from hbxt_compress.layers import LayerSpec

__all__ = ["Int8"]

_LARGEST = 127


class Int8:
    """Name int8-channel. Shapes: O out, I in."""

    name = "int8-channel"
    group: int | None = None
    n_levels = (_LARGEST, _LARGEST)

    def fits(self, spec: LayerSpec) -> str | None:
        """Why the weight cannot take this format and what to do, or None if it can."""
        if spec.kind != "linear":
            return f"{self.name} stores only linear weights, this is a {spec.kind}: keep it"
        return None

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of codes, float16 scales and the zero points, which targets insist on."""
        return math.prod(shape) + 2 * shape[0] + shape[0]

    def encode(self, weight_OI: Tensor, scales: Tensor) -> Mapping[str, Tensor]:
        """codes int8 O I in -127..127, the nearest under scales O (or O 1); scales float16 O."""
        scales_O = scales.reshape(-1).to(torch.float16)
        step_O1 = scales_O.float()[:, None]
        safe_O1 = torch.where(step_O1 == 0, torch.ones_like(step_O1), step_O1)
        codes_OI = torch.round(weight_OI.float() / safe_O1).clamp_(-_LARGEST, _LARGEST)
        return {"codes": codes_OI.to(torch.int8), "scales": scales_O}

    def decode(self, payload: Mapping[str, Tensor]) -> Tensor:
        """The float32 weight, O I."""
        return payload["codes"].float() * payload["scales"].float()[:, None]

    def emit(
        self, graph: GraphBuilder, name: str, x: Value, payload: Mapping[str, Tensor]
    ) -> Value:
        """Adds DequantizeLinear of the transposed codes along their output channels, and MatMul."""
        n_out, n_in = payload["codes"].shape
        codes = graph.initializer(f"{name}.codes", payload["codes"].T)
        scales = graph.float32(f"{name}.scales", payload["scales"])
        zeros = graph.initializer(f"{name}.zeros", torch.zeros(n_out, dtype=torch.int8))
        weight = graph.node("DequantizeLinear", [codes, scales, zeros], shape=(n_in, n_out), axis=1)
        return graph.node("MatMul", [x, weight], shape=(*graph.shape_of(x)[:-1], n_out))
