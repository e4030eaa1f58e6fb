"""compute_in_half: products, convolutions and attention in float16, all else in float32.

So matrices are multiplied at a GPU's matrix rate and stored as they lie in the file: MIGraphX folds
a Cast of float16 weights to float32 when it compiles, and keeps twice the bytes. Norms, sums,
softmax, tables and the graph's ends stay float32. Integer products stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir
import torch

from hbxt_compress.graph.builder import CONTRIB, GraphBuilder, Value, present
from hbxt_compress.graph.transform import ROTATION

__all__ = ["LAYER", "compute_in_half"]

LAYER = "layer"  # of a node's metadata: whose product it is

_FULL = ir.DataType.FLOAT
_LARGEST = 65504 / 16  # other prompts' numbers may be larger, and a rotation's are
_INPUTS_WITHOUT_BIAS = 3
_NO_RANGES: Mapping[str, float] = MappingProxyType({})
_COMPUTED = frozenset(
    {("", "Conv"), ("", "MatMul"), (CONTRIB, "MatMulNBits"), (CONTRIB, "MultiHeadAttention")}
)


def compute_in_half(model: ir.Model, ranges: Mapping[str, float] = _NO_RANGES) -> None:
    """Before: these operators take and give float32. After: float16, with a Cast on either side.

    A Cast of what was float16 before is left out. A layer whose weight is stored as float32 is
    computed as float32, and so is attention with a bias: T5's, whose scores nothing bounds.
    ranges: layer -> the largest number that it is given or gives; where that comes near 65504 its
    input is divided by a power of two and its output multiplied again, which rounds nothing.
    """
    graph = model.graph
    for node in [n for n in graph if (n.domain, n.op_type) in _COMPUTED and not _stays(n)]:
        builder = GraphBuilder(graph, node)
        factor = _factor(ranges.get(node.metadata_props.get(LAYER, ""), 0.0))
        if factor > 1:
            small, x = _number(builder, graph, 1 / factor), present(node.inputs[0])
            scaled = builder.node("Mul", [x, small], shape=builder.shape_of(x))
            node.replace_input_with(0, scaled)
        for i, value in enumerate(node.inputs):
            if value is not None and value.dtype == _FULL:
                node.replace_input_with(i, _half(builder, value))
        _widened(graph, node, _number(builder, graph, factor) if factor > 1 else None)


def _factor(largest: float) -> float:
    """The least power of two by which that number is small enough; 1 or more."""
    return 2.0 ** max(0, math.ceil(math.log2(largest / _LARGEST))) if largest > 0 else 1.0


def _number(builder: GraphBuilder, graph: ir.Graph, factor: float) -> Value:
    """A constant of the graph, added if it is new."""
    name = f"half.times.{factor:.9g}"
    known = graph.initializers.get(name)
    return builder.initializer(name, torch.tensor(factor)) if known is None else known


def _stays(node: ir.Node) -> bool:
    """Whether it multiplies integers, or a weight that is stored as float32."""
    if node.op_type == "MultiHeadAttention":
        return len(node.inputs) > _INPUTS_WITHOUT_BIAS
    first, second, *_ = node.inputs
    producer = None if first is None else first.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        return True
    return (
        second is not None
        and second.is_initializer()
        and second.dtype == _FULL
        and not (second.name or "").startswith(ROTATION)
    )


def _half(builder: GraphBuilder, value: Value) -> Value:
    """The value in float16: what it was cast from, or a Cast of it."""
    cast = value.producer()
    if cast is not None and cast.op_type == "Cast":
        source = cast.inputs[0]
        if source is not None and source.dtype == ir.DataType.FLOAT16:
            return source
    to = ir.DataType.FLOAT16
    return builder.node("Cast", [value], shape=builder.shape_of(value), dtype=to, to=int(to))


def _widened(graph: ir.Graph, node: ir.Node, factor: Value | None) -> None:
    """Makes a node's output float16 and hands its float32 Cast, times a factor, to its readers."""
    narrow = node.outputs[0]
    shape, is_output = narrow.shape, narrow.is_graph_output()
    casted, wide = (ir.Value(shape=shape, type=ir.TensorType(_FULL)) for _ in range(2))
    last = casted if factor is None else wide
    narrow.replace_all_uses_with(last, replace_graph_outputs=True)
    if is_output:
        last.name, narrow.name = narrow.name, None
    narrow.dtype = ir.DataType.FLOAT16
    added = [ir.node("Cast", [narrow], {"to": int(_FULL)}, outputs=[casted])]
    if factor is not None:
        added.append(ir.node("Mul", [casted, factor], outputs=[wide]))
    for one in added:
        one.metadata_props.update(node.metadata_props)
    graph.insert_after(node, added)
