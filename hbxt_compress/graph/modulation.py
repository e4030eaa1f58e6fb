"""fold_modulation: a norm that is scaled and shifted by what is computed, in one node.

Diffusion transformers multiply what a LayerNorm without parameters gives by 1 + scale and add a
shift, both from the timestep. As the norm's own scale and bias they cost no pass over all tokens.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from hbxt_compress.graph.builder import GraphBuilder, Value, content_of, present

__all__ = ["fold_modulation"]

_SHAPE = "modulation.shape"


def fold_modulation(model: ir.Model) -> None:
    """Before: Add(Mul(LayerNormalization(x, ones), scale), shift). After: LayerNormalization.

    scale and shift must be one vector of the norm's features each, and nothing else may look at
    what is between.
    """
    graph = model.graph
    for norm in [node for node in graph if node.op_type == "LayerNormalization"]:
        size = GraphBuilder.shape_of(present(norm.inputs[1]))
        found = _then(norm, "Mul", size)
        if found is None or len(norm.inputs) > 2 or not _is_one(norm.inputs[1]):
            continue
        product, scale = found
        if (added := _then(product, "Add", size)) is None:
            continue
        last, shift = added
        builder = GraphBuilder(graph, last)
        inputs = [
            present(norm.inputs[0]),
            *(_flat(builder, graph, v, size) for v in (scale, shift)),
        ]
        attributes = {name: norm.attributes[name].value for name in norm.attributes}
        out = builder.node(
            "LayerNormalization", inputs, shape=builder.shape_of(last.outputs[0]), **attributes
        )
        last.outputs[0].replace_all_uses_with(out, replace_graph_outputs=True)
        for node in (last, product, norm):
            graph.remove(node, safe=True)


def _then(node: ir.Node, op_type: str, size: tuple[int, ...]) -> tuple[ir.Node, Value] | None:
    """The only node that reads a node's output, if it is of that type, and its other input."""
    out = node.outputs[0]
    uses = list(out.uses())
    if len(uses) != 1 or uses[0][0].op_type != op_type or out.is_graph_output():
        return None
    reader, index = uses[0]
    other = present(reader.inputs[1 - index])
    shape = GraphBuilder.shape_of(other)
    vector = shape[-1:] == size and all(n == 1 for n in shape[:-1])
    return (reader, other) if vector and len(shape) <= len(GraphBuilder.shape_of(out)) else None


def _is_one(weight: Value | None) -> bool:
    weight = present(weight)
    return weight.is_initializer() and bool(np.all(content_of(weight).numpy() == 1))


def _flat(builder: GraphBuilder, graph: ir.Graph, value: Value, size: tuple[int, ...]) -> Value:
    """The value as a vector."""
    name = f"{_SHAPE}.{size[0]}"
    shape = graph.initializers.get(name)
    if shape is None:
        shape = builder.initializer(name, torch.tensor(size, dtype=torch.int64))
    return builder.node("Reshape", [value, shape], shape=size)
