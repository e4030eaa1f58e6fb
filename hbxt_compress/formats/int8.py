"""int8-channel: 8-bit codes, symmetric, one float16 scale per output channel.

w = code * scale, codes -127..127. In ONNX: DequantizeLinear with a zero point of 0, then MatMul, or
the Conv that reads the weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hbxt_compress.formats.levels import checked, nearest, value
from hbxt_compress.graph.builder import GraphBuilder, Value
from hbxt_compress.layers import LayerSpec

__all__ = ["Int8"]

_LARGEST = 127
_KINDS = ("linear", "conv2d", "conv3d")


class Int8:
    """Name int8-channel. O out, I in; a convolution's weight is flattened to O I first.

    Payload: codes int8 O I in -127..127, scales float16 O.
    """

    name = "int8-channel"
    group: int | None = None
    n_levels = (_LARGEST, _LARGEST)
    asymmetric = False
    rank = 0

    def fits(self, spec: LayerSpec) -> str | None:
        """Why the weight cannot take this format and what to do, or None if it can."""
        if spec.kind not in _KINDS:
            remedy = "use int8-row" if spec.kind == "embedding" else "keep it"
            return f"{self.name} stores no weights of a {spec.kind}: {remedy}"
        return None

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of codes, float16 scales and the zero points, which targets insist on."""
        return math.prod(shape) + 2 * shape[0] + shape[0]

    def encode(
        self, weight_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """The payload of nearest levels under given scales, O or O 1."""
        scales_O1 = scales_OG.to(torch.float16).reshape(-1, 1)
        levels_OI = nearest(weight_OI.flatten(1), scales_O1, zeros_OG, self.n_levels)
        return self.store(levels_OI, scales_O1, zeros_OG)

    def store(
        self,
        levels_OI: Tensor,
        scales_OG: Tensor,
        zeros_OG: Tensor | None = None,
        *,
        low_rank: tuple[Tensor, Tensor] | None = None,
    ) -> Mapping[str, Tensor]:
        """The payload of given levels, -127..127, and scales, O or O 1.

        Raises:
            ValueError: a level is out of range, or there are zeros or factors.
        """
        if low_rank is not None or (zeros_OG is not None and bool(zeros_OG.any())):
            raise ValueError(f"{self.name} has no room for zero points or a low-rank branch")
        codes_OI = checked(levels_OI, self.n_levels).to(torch.int8)
        return {"codes": codes_OI, "scales": scales_OG.to(torch.float16).reshape(-1)}

    def decode(self, payload: Mapping[str, Tensor]) -> Tensor:
        """The float32 weight, O I."""
        return value(payload["codes"], payload["scales"].reshape(-1, 1), None)

    def emit(
        self, graph: GraphBuilder, name: str, x: Value, payload: Mapping[str, Tensor]
    ) -> Value:
        """Adds DequantizeLinear of the transposed codes along their output channels, and MatMul."""
        n_out = payload["codes"].shape[0]
        weight = self._dequantized(graph, name, payload["codes"].T, payload["scales"], axis=1)
        return graph.node("MatMul", [x, weight], shape=(*graph.shape_of(x)[:-1], n_out))

    def weight(
        self, graph: GraphBuilder, name: str, payload: Mapping[str, Tensor], shape: tuple[int, ...]
    ) -> Value:
        """Adds DequantizeLinear along axis 0 of codes of this shape; returns the weight."""
        codes = payload["codes"].reshape(shape)
        return self._dequantized(graph, name, codes, payload["scales"], axis=0)

    def rows(
        self, graph: GraphBuilder, name: str, ids: Value, payload: Mapping[str, Tensor]
    ) -> Value:
        """Raises ValueError: tables have formats of their own."""
        raise ValueError(f"{name}: {self.name} stores no tables that are looked up")

    @staticmethod
    def _dequantized(
        graph: GraphBuilder, name: str, codes: Tensor, scales_O: Tensor, *, axis: int
    ) -> Value:
        inputs = [
            graph.initializer(f"{name}.codes", codes),
            graph.float32(f"{name}.scales", scales_O),
            graph.initializer(f"{name}.zeros", torch.zeros(len(scales_O), dtype=torch.int8)),
        ]
        return graph.node("DequantizeLinear", inputs, shape=tuple(codes.shape), axis=axis)
