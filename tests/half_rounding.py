"""What a graph computes where float16 is really rounded to.

ONNX Runtime's CPU provider has no float16 products: it computes them in float32 and takes the casts
around them out, so it shows nothing of what a GPU loses. Here each float16 value is rounded by a
Cast that it cannot take out, and products are summed in float32 as matrix cores do.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

__all__ = ["round_to_half"]

_COMPUTED = {"Conv", "MatMul", "MatMulNBits", "MultiHeadAttention"}


def round_to_half(path: Path) -> int:
    """Rewrites the file; how many products and attentions it had in float16.

    To be run without graph optimizations, which would take an Unsqueeze and its Squeeze out.
    """
    model = ir.serde.deserialize_model(onnx.load(path, load_external_data=False))
    graph = model.graph
    axes = ir.tensor([0], dtype=ir.DataType.INT64, name="rounding/axes")
    value = ir.Value(name="rounding/axes", shape=axes.shape, type=ir.TensorType(axes.dtype))
    value.const_value = axes
    graph.register_initializer(value)
    found = [
        n for n in graph if n.op_type in _COMPUTED and n.outputs[0].dtype == ir.DataType.FLOAT16
    ]
    for i, node in enumerate(found):
        for j, one in enumerate(node.inputs):
            if one is None or one.dtype != ir.DataType.FLOAT16:
                continue
            nodes, wide = [], one
            if not one.is_initializer():
                nodes, wide = _kept(one, value, f"rounding/{i}/{j}")
            nodes.append(_node("Cast", [wide], f"rounding/{i}/{j}/wide", ir.DataType.FLOAT))
            graph.insert_before(node, nodes)
            node.replace_input_with(j, nodes[-1].outputs[0])
        out = node.outputs[0]
        exact = ir.Value(
            name=f"rounding/{i}/exact", shape=out.shape, type=ir.TensorType(ir.DataType.FLOAT)
        )
        narrow = _node("Cast", [exact], f"rounding/{i}/out", ir.DataType.FLOAT16)
        nodes, rounded = _kept(narrow.outputs[0], value, f"rounding/{i}/kept")
        out.replace_all_uses_with(rounded, replace_graph_outputs=True)
        new = ir.node(
            node.op_type, node.inputs, node.attributes, domain=node.domain, outputs=[exact]
        )
        graph.insert_before(node, [new, narrow, *nodes])
        graph.remove(node, safe=True)
    proto = ir.serde.serialize_model(model)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    return len(found)


def _kept(one: ir.Value, axes: ir.Value, name: str) -> tuple[list[ir.Node], ir.Value]:
    first = _node("Unsqueeze", [one, axes], f"{name}/more", ir.DataType.FLOAT16)
    second = _node("Squeeze", [first.outputs[0], axes], f"{name}/less", ir.DataType.FLOAT16)
    return [first, second], second.outputs[0]


def _node(kind: str, inputs: list[ir.Value], name: str, dtype: ir.DataType) -> ir.Node:
    out = ir.Value(name=name, type=ir.TensorType(dtype))
    attributes = {"to": int(dtype)} if kind == "Cast" else {}
    return ir.node(kind, inputs, attributes, outputs=[out])
