"""Names for nodes, values and initializers that depend on the model's structure alone.

A node is called `<module path>/<operator>`, with a number where that repeats; its outputs bear its
name. Whatever else torch's exporter left (file paths, source lines, counters) is removed.
"""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir
import onnx_ir.passes.common as common

from hbxt_compress.graph.builder import name_of

__all__ = ["SCOPES", "name_everything", "scope_of"]

SCOPES = "pkg.torch.onnx.name_scopes"
_WRAPPED = "model"


def name_everything(model: ir.Model) -> None:
    """Renames nodes, inner values and initializers; clears metadata and doc strings."""
    graph = model.graph
    ends = {*graph.inputs, *graph.outputs}
    used: Counter[str] = Counter()
    for node in graph:
        stem = f"{scope_of(node)}/{node.op_type}".removeprefix("/")
        node.name = stem if not used[stem] else f"{stem}_{used[stem]}"
        used[stem] += 1
        for index, output in enumerate(node.outputs):
            if output not in ends:
                output.name = node.name if index == 0 else f"{node.name}:{index}"
            output.metadata_props.clear()
    _name_initializers(graph)
    common.ClearMetadataAndDocStringPass()(model)
    for value in ends:
        value.metadata_props.clear()
        value.doc_string = None
    graph.name = "main"
    graph.doc_string = None
    graph.metadata_props.clear()


def scope_of(node: ir.Node) -> str:
    """The path of the module that a traced node belongs to; "" of none or the wrapper."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    modules = [scope for scope in scopes[:-1] if scope]
    return modules[-1].removeprefix(_WRAPPED).removeprefix(".") if modules else ""


def _name_initializers(graph: ir.Graph) -> None:
    """Parameters drop the wrapper's name; constants are numbered in the order of their use."""
    order: dict[str, None] = {}
    for node in graph:
        for value in node.inputs:
            if value is not None and value.name in graph.initializers:
                order.setdefault(name_of(value))
    values = [graph.initializers[name] for name in order]
    graph.initializers.clear()
    n_constants = 0
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None
        name = name_of(value)
        if name.startswith(f"{_WRAPPED}."):
            value.name = name.removeprefix(f"{_WRAPPED}.")
        elif "." not in name:
            value.name = f"constant_{n_constants}"
            n_constants += 1
        graph.register_initializer(value)
