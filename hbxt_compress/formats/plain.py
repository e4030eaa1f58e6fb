"""fp16 and fp32: the weight itself. Stored in 16 bit it is cast to float32 where it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import onnx_ir as ir
import torch
from torch import Tensor

from hbxt_compress.graph.builder import GraphBuilder, Value
from hbxt_compress.layers import LayerSpec

__all__ = ["Plain"]


class Plain:
    """Names fp16, fp32. Takes every kind of weight, of any rank, output features first."""

    group: int | None = None
    n_levels = (0, 0)  # it has no codes
    asymmetric = False
    rank = 0

    def __init__(self, *, bits: Literal[16, 32]) -> None:
        self.bits = bits
        self.name = f"fp{bits}"
        self._dtype = torch.float16 if bits == 16 else torch.float32

    def fits(self, spec: LayerSpec) -> str | None:
        """None: every weight fits (one beyond float16's range is refused at export)."""
        return None

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the weight."""
        return math.prod(shape) * self.bits // 8

    def encode(
        self,
        weight_OI: Tensor,
        scales_OG: Tensor | None = None,
        zeros_OG: Tensor | None = None,
    ) -> Mapping[str, Tensor]:
        """weight, rounded to the format; scales and zeros are ignored."""
        return {"weight": weight_OI.to(self._dtype)}

    def store(
        self,
        levels_OI: Tensor,
        scales_OG: Tensor,
        zeros_OG: Tensor | None = None,
        *,
        low_rank: tuple[Tensor, Tensor] | None = None,
    ) -> Mapping[str, Tensor]:
        """Raises ValueError: the format has no levels."""
        raise ValueError(f"{self.name} has no levels: use encode")

    def decode(self, payload: Mapping[str, Tensor]) -> Tensor:
        """The float32 weight."""
        return payload["weight"].float()

    def emit(
        self, graph: GraphBuilder, name: str, x: Value, payload: Mapping[str, Tensor]
    ) -> Value:
        """Adds MatMul with the transposed weight; a convolution's is flattened to O I first."""
        weight_OI = payload["weight"].flatten(1)
        weight = graph.float32(f"{name}.weight", weight_OI.T)
        shape = (*graph.shape_of(x)[:-1], weight_OI.shape[0])
        return graph.node("MatMul", [x, weight], shape=shape)

    def weight(
        self, graph: GraphBuilder, name: str, payload: Mapping[str, Tensor], shape: tuple[int, ...]
    ) -> Value:
        """The float32 weight of this shape; 16 bit through a Cast."""
        return graph.float32(f"{name}.weight", payload["weight"].reshape(shape))

    def rows(
        self, graph: GraphBuilder, name: str, ids: Value, payload: Mapping[str, Tensor]
    ) -> Value:
        """Adds the Gather; of 16 bit a Cast behind it, so that the table stays so at run time."""
        table = graph.initializer(f"{name}.weight", payload["weight"])
        shape = (*graph.shape_of(ids), *graph.shape_of(table)[1:])
        dtype = ir.DataType.FLOAT16 if self.bits == 16 else ir.DataType.FLOAT
        found = graph.node("Gather", [table, ids], shape=shape, dtype=dtype, axis=0)
        if self.bits == 32:
            return found
        return graph.node("Cast", [found], shape=shape, to=int(ir.DataType.FLOAT))
