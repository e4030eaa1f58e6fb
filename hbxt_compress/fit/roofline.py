"""An estimate of a graph's time on a card: the peak of what its data sheet promises.

An operator takes the longer of two times: that of its products at the rate of the numbers it
computes with, that of its bytes at the memory's bandwidth. No run is faster; real ones reach a
third to two thirds of it. What lies between two elementwise operators is not counted as moved:
compilers fuse them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass

import onnx_ir as ir

from hbxt_compress.fit.cards import Card, Computed
from hbxt_compress.fit.liveness import ELEMENTWISE, VIEWS, nbytes, shape_of

__all__ = ["ATTENTION", "Amounts", "Estimate", "amounts", "estimate", "flops", "scores_bytes"]

ATTENTION = "attention"
_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul", "MatMulInteger", "MatMulNBits"})
_FUSED = ELEMENTWISE | VIEWS | {"Cast", "DequantizeLinear", "QuantizeLinear"}
_SCORE_PASSES = 4  # written, read by the softmax, written again, read by the second product


@dataclass(frozen=True, slots=True)
class Amounts:
    """What one operator does: operations of products, and bytes read and written."""

    kind: str
    computed: Computed
    flops: float
    n_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """seconds: by operator kind, of one run. Never measured: an estimate, and a lower bound."""

    seconds: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def attention_share(self) -> float:
        """0..1."""
        return self.seconds.get(ATTENTION, 0.0) / max(self.total, 1e-30)


def estimate(card: Card, done: tuple[Amounts, ...]) -> Estimate:
    """Seconds of one run on a card."""
    seconds: dict[str, float] = defaultdict(float)
    for one in done:
        products = one.flops / (1e12 * card.tflops[one.computed])
        seconds[one.kind] += max(products, one.n_bytes / (1e9 * card.bandwidth_gbs))
    return Estimate(seconds=dict(seconds))


def amounts(
    model: ir.Model, constants: Set[ir.Value], sizes: Mapping[ir.Value, int], *, fused: bool
) -> tuple[Amounts, ...]:
    """Each operator that runs. constants, sizes: see Kept; fused: scores are never in memory."""
    found = []
    for node in model.graph:
        if all(one in constants for one in node.outputs) or node.op_type in VIEWS:
            continue
        moved = sum(sizes.get(v, 0) for v in {v for v in node.inputs if v in constants and v})
        rest = {*node.inputs, *node.outputs} - constants - {None}
        moved += sum(nbytes(v) for v in rest if v is not None and not _stays_inside(v))
        if node.op_type == "Gather":
            moved = 2 * sum(nbytes(v) for v in node.outputs)  # of a table only rows are read
        kind = "other"
        if node.op_type == "MultiHeadAttention":
            kind = ATTENTION
            moved += 0 if fused else _SCORE_PASSES * scores_bytes(node)
        elif node.op_type in _PRODUCTS:
            kind = "conv" if node.op_type == "Conv" else "linear"
        found.append(Amounts(kind, _computed(node), flops(node), moved))
    return tuple(found)


def scores_bytes(node: ir.Node) -> int:
    """Bytes of an attention's scores, every query by every key, all heads."""
    query, key = node.inputs[0], node.inputs[1]
    heads = node.attributes["num_heads"].as_int()
    batch, n_queries, _ = shape_of(query)
    bits = query.dtype.bitwidth if query is not None and query.dtype is not None else 32
    return batch * heads * n_queries * shape_of(key)[1] * bits // 8


def flops(node: ir.Node) -> float:
    """Operations of the products in a node, two for each multiplication; 0 where there are none."""
    if node.op_type == "MultiHeadAttention":
        batch, n_queries, width = shape_of(node.inputs[0])
        return 4.0 * batch * n_queries * shape_of(node.inputs[1])[1] * width
    if node.op_type == "Conv":
        _, channels, *kernel = shape_of(node.inputs[1])
        return 2.0 * math.prod(shape_of(node.outputs[0])) * channels * math.prod(kernel)
    if node.op_type in _PRODUCTS:
        return 2.0 * math.prod(shape_of(node.outputs[0])) * shape_of(node.inputs[0])[-1]
    return 0.0


def _computed(node: ir.Node) -> Computed:
    if node.op_type == "MatMulInteger" or _both_dequantized(node):
        return "int8"
    value = node.inputs[0]
    return "float16" if value is not None and value.dtype == ir.DataType.FLOAT16 else "float32"


def _both_dequantized(node: ir.Node) -> bool:
    """Whether a MatMul's factors are both 8-bit codes with constant steps."""
    makers = [v.producer() if v is not None else None for v in node.inputs[:2]]
    return node.op_type == "MatMul" and all(
        maker is not None and maker.op_type == "DequantizeLinear" for maker in makers
    )


def _stays_inside(value: ir.Value) -> bool:
    """Whether a value lies between operators that are fused: it is never written to memory."""
    maker = value.producer()
    if maker is None or maker.op_type not in _FUSED or value.is_graph_output():
        return False
    users = value.uses()
    return bool(users) and all(user.op_type in _FUSED for user, _ in users)
