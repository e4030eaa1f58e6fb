"""int8-row, int4-row: tables whose rows are looked up, never multiplied with.

int8: w = code * scale, codes -127..127, one float16 scale a row. int4: w = (code - 8) * scale,
codes 0..15 two a byte, one float16 scale (of either sign, as in int4.py) for each group of a row.
In ONNX: the rows of codes and of scales are gathered first, then decoded; the table stays as it is
stored at run time too. A byte is split by Floor and exact float32 arithmetic: MIGraphX parses no
BitShift.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import onnx_ir as ir
import torch
from torch import Tensor

from hbxt_compress.formats.levels import checked, nearest, value
from hbxt_compress.graph.builder import GraphBuilder, Value
from hbxt_compress.layers import LayerSpec

__all__ = ["Table"]

_LEVELS = {8: (127, 127), 4: (8, 7)}
_ZERO = 8
_FLOAT = int(ir.DataType.FLOAT)


class Table:
    """Names int8-row, int4-row-g128. O rows, I features of each, G = I / group.

    Payload: codes int8 O I in -127..127, or uint8 O I/2, two codes a byte, the first in the low
    four bits; scales float16 O G.
    """

    asymmetric = False
    rank = 0

    def __init__(self, *, bits: Literal[8, 4], group: int | None = None) -> None:
        if bits == 4 and (group is None or group % 2):
            raise ValueError(f"group {group}: 4-bit tables need an even group")
        self.bits = bits
        self.group = group
        self.n_levels = _LEVELS[bits]
        self.name = f"int{bits}-row" + (f"-g{group}" if group else "")

    def fits(self, spec: LayerSpec) -> str | None:
        """Why the weight cannot take this format and what to do, or None if it can."""
        if spec.kind != "embedding":
            return f"{self.name} stores only tables that are looked up, this is a {spec.kind}"
        if self.group and spec.shape[1] % self.group:
            return f"{spec.shape[1]} features are not a multiple of {self.group}: use int8-row"
        return None

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of codes and float16 scales; a few scalars that decode them are not counted."""
        n_rows, n_features = shape
        n_groups = n_features // (self.group or n_features)
        return n_rows * n_features * self.bits // 8 + 2 * n_rows * n_groups

    def encode(
        self, weight_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """The payload of nearest levels under given scales; those of int8 may be O or O 1."""
        scales_OG = scales_OG.to(torch.float16).reshape(len(weight_OI), -1)
        return self.store(nearest(weight_OI, scales_OG, zeros_OG, self.n_levels), scales_OG)

    def store(
        self,
        levels_OI: Tensor,
        scales_OG: Tensor,
        zeros_OG: Tensor | None = None,
        *,
        low_rank: tuple[Tensor, Tensor] | None = None,
    ) -> Mapping[str, Tensor]:
        """The payload of given levels and scales.

        Raises:
            ValueError: a level is out of range, or there are zeros or factors.
        """
        if low_rank is not None or (zeros_OG is not None and bool(zeros_OG.any())):
            raise ValueError(f"{self.name} has no room for zero points or a low-rank branch")
        codes_OI = checked(levels_OI, self.n_levels)
        scales_OG = scales_OG.to(torch.float16).reshape(len(codes_OI), -1)
        if self.bits == 8:
            return {"codes": codes_OI.to(torch.int8), "scales": scales_OG}
        codes_OI = (codes_OI + _ZERO).to(torch.uint8)
        return {"codes": codes_OI[:, 0::2] | (codes_OI[:, 1::2] << 4), "scales": scales_OG}

    def decode(self, payload: Mapping[str, Tensor]) -> Tensor:
        """The float32 table, O I; of some rows of the payload those rows."""
        codes_OI = payload["codes"]
        if self.bits == 4:
            pairs = torch.stack([codes_OI & 15, codes_OI >> 4], dim=-1)
            codes_OI = pairs.flatten(1).float() - _ZERO
        return value(codes_OI, payload["scales"], None)

    def emit(
        self, graph: GraphBuilder, name: str, x: Value, payload: Mapping[str, Tensor]
    ) -> Value:
        """Raises ValueError: nothing is multiplied with a table."""
        raise ValueError(f"{name}: {self.name} stores only tables that are looked up")

    def weight(
        self, graph: GraphBuilder, name: str, payload: Mapping[str, Tensor], shape: tuple[int, ...]
    ) -> Value:
        """Adds the nodes of the whole table, for one that is smaller than what is looked up."""
        return self._decoded(graph, name, *self._stored(graph, name, payload))

    def rows(
        self, graph: GraphBuilder, name: str, ids: Value, payload: Mapping[str, Tensor]
    ) -> Value:
        """Adds Gathers of codes and scales and the nodes that decode them."""
        shape = graph.shape_of(ids)
        gathered = (
            graph.node(
                "Gather",
                [stored, ids],
                shape=(*shape, *graph.shape_of(stored)[1:]),
                dtype=stored.dtype or ir.DataType.UNDEFINED,
                axis=0,
            )
            for stored in self._stored(graph, name, payload)
        )
        return self._decoded(graph, name, *gathered)

    def _stored(
        self, graph: GraphBuilder, name: str, payload: Mapping[str, Tensor]
    ) -> tuple[Value, Value]:
        """Codes O I, or bytes O I/2 1; scales O 1, or O G 1."""
        codes, scales = payload["codes"], payload["scales"]
        if self.bits == 4:
            codes, scales = codes.unsqueeze(-1), scales.unsqueeze(-1)
        return (
            graph.initializer(f"{name}.codes", codes),
            graph.initializer(f"{name}.scales", scales),
        )

    def _decoded(self, graph: GraphBuilder, name: str, codes: Value, scales: Value) -> Value:
        """The float32 numbers of what `_stored` gave, or of some rows of it."""
        shape = graph.shape_of(codes)
        steps = graph.node("Cast", [codes], shape=shape, to=_FLOAT)
        scales = graph.node("Cast", [scales], shape=graph.shape_of(scales), to=_FLOAT)
        if self.bits == 8:
            return graph.node("Mul", [steps, scales], shape=shape)

        def number(what: str, *numbers: float) -> Value:
            return graph.initializer(f"{name}/{what}", torch.tensor(numbers))

        def sizes(what: str, shape: tuple[int, ...]) -> Value:
            return graph.initializer(f"{name}/{what}", torch.tensor(shape))

        n_rows, groups = shape[:-2], graph.shape_of(scales)[:-1]
        pairs = (*shape[:-1], 2)
        shifted = graph.node("Mul", [steps, number("sixteenth", 1 / 16)], shape=shape)
        high = graph.node("Floor", [shifted], shape=shape)
        above = graph.node("Mul", [high, number("sixteen", 16.0)], shape=shape)
        low = graph.node("Sub", [steps, above], shape=shape)
        both = graph.node("Concat", [low, high], shape=pairs, axis=len(shape) - 1)
        levels = graph.node("Sub", [both, number("zero", float(_ZERO))], shape=pairs)
        grouped = (*groups, self.group or 0)
        levels = graph.node("Reshape", [levels, sizes("groups", grouped)], shape=grouped)
        weight = graph.node("Mul", [levels, scales], shape=grouped)
        flat = (*n_rows, math.prod(grouped[-2:]))
        return graph.node("Reshape", [weight, sizes("rows", flat)], shape=flat)
