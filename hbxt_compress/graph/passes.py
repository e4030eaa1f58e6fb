"""From a captured model to the one that ships: the passes, in the order of `lower`.

Each is a function that edits an onnx_ir model in place; its docstring says what the graph looks
like before and after. Naming is in graph/naming.py, files are written by graph/external.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from torch import Tensor

from hbxt_compress.errors import ExportError
from hbxt_compress.formats import WeightFormat
from hbxt_compress.formats.activations import ACTIVATIONS, ActivationFormat
from hbxt_compress.graph.builder import CONTRIB, GraphBuilder, Value, content_of, name_of, present
from hbxt_compress.graph.convolution import lower_convolutions
from hbxt_compress.graph.half import LAYER, compute_in_half
from hbxt_compress.graph.modulation import fold_modulation
from hbxt_compress.graph.naming import name_everything
from hbxt_compress.graph.ops import OWN_DOMAIN
from hbxt_compress.graph.parts import feed_forward_in_parts
from hbxt_compress.graph.storage import Storage
from hbxt_compress.graph.transform import emit_transform

__all__ = [
    "cancel_transposes",
    "clean_up",
    "expand_fills",
    "lower",
    "lower_linears",
    "merge_constants",
    "store_other_weights",
]

IR_VERSION = 10
_FEW = 8
_NONE: Mapping[str, float] = MappingProxyType({})


def lower(
    model: ir.Model, storage: Storage, *, half: bool = False, ranges: Mapping[str, float] = _NONE
) -> None:
    """Applies every pass; afterwards the model obeys graph/targets.py.

    half, ranges: whether products are float16, and of what size their numbers, see graph/half.py.
    """
    cancel_transposes(model)
    fold_modulation(model)
    lower_linears(model, storage)
    store_other_weights(model, storage)
    lower_convolutions(model, storage)
    expand_fills(model)
    if half:
        compute_in_half(model, ranges)
    feed_forward_in_parts(model)
    clean_up(model)
    name_everything(model)


def cancel_transposes(model: ir.Model) -> None:
    """Before: Transpose(p) -> Transpose(inverse of p). After: neither, where nothing else looks."""
    for node in list(model.graph):
        first = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if node.op_type != "Transpose" or first is None or first.op_type != "Transpose":
            continue
        perms = [list(n.attributes["perm"].as_ints()) for n in (first, node)]
        if [perms[0][axis] for axis in perms[1]] == list(range(len(perms[0]))):
            node.outputs[0].replace_all_uses_with(present(first.inputs[0]))


def lower_linears(model: ir.Model, storage: Storage) -> None:
    """Before: hbxt::Linear(x, W[, b]) {layer}. After: the format's nodes, then Add of the bias.

    What the payload does to the input comes first; a rounded input brings its own nodes for both.
    """
    graph = model.graph
    for node in [n for n in graph if (n.domain, n.op_type) == (OWN_DOMAIN, "Linear")]:
        x, weight, *rest = (present(value) for value in node.inputs)
        layer = node.attributes["layer"].as_string()
        stored = storage.of(layer, content_of(weight))
        short = layer.removeprefix(f"{storage.component}/")
        activations = storage.activations(layer)
        node.metadata_props[LAYER] = layer  # all nodes that stand for it bear the same
        emitter = stored.format if activations == "keep" else ACTIVATIONS[activations]
        out = stored.emit(graph, node, x, partial(_product, emitter, short))
        if rest:
            builder = GraphBuilder(graph, node)
            out = builder.node("Add", [out, rest[0]], shape=builder.shape_of(out))
        node.outputs[0].replace_all_uses_with(out, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _product(
    emitter: WeightFormat | ActivationFormat,
    name: str,
    builder: GraphBuilder,
    x: Value,
    payload: Mapping[str, Tensor],
) -> Value:
    x = emit_transform(builder, name, x, payload)
    return emitter.emit(builder, name, x, payload)


def store_other_weights(model: ir.Model, storage: Storage) -> None:
    """Before: Conv and Gather read float32 weights. After: stored ones, decoded by their format.

    A table larger than what is gathered from it is decoded behind the Gather: the table itself then
    stays as it is stored at run time too.

    Raises:
        ExportError: two Gathers look up rows of one large table.
    """
    graph = model.graph
    done: dict[str, ir.Value] = {}
    looked_up: set[str] = set()
    for node in [n for n in graph if n.op_type in ("Conv", "Gather") and n.domain == ""]:
        index = 1 if node.op_type == "Conv" else 0
        weight = node.inputs[index]
        if weight is None or weight.const_value is None or weight.dtype != ir.DataType.FLOAT:
            continue
        module = name_of(weight).removeprefix("model.").removesuffix(".weight")
        shape = GraphBuilder.shape_of(weight)
        if node.op_type == "Gather" and _looks_up(node, shape):
            if module in looked_up:
                raise ExportError(
                    f"{module}: two operators look up rows of this table of shape {list(shape)}; "
                    "look up all rows at once in the model's export wrapper"
                )
            looked_up.add(module)
            stored = storage.of(f"{storage.component}/{module}", content_of(weight))
            emit = partial(_rows, stored.format, module)
            out = stored.emit_rows(graph, node, present(node.inputs[1]), emit)
            node.outputs[0].replace_all_uses_with(out, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            continue
        if module not in done:
            stored = storage.of(f"{storage.component}/{module}", content_of(weight))
            emit = partial(_weight, stored.format, module, shape)
            done[module] = stored.emit(graph, node, weight, emit)
        node.replace_input_with(index, done[module])


def _looks_up(node: ir.Node, shape: tuple[int, ...]) -> bool:
    """Whether a Gather takes rows of a table, and fewer numbers than the table has."""
    axis = node.attributes.get("axis")
    n_found = math.prod(GraphBuilder.shape_of(node.outputs[0]))
    return (axis is None or axis.as_int() == 0) and math.prod(shape) > n_found


def _weight(
    stored: WeightFormat,
    name: str,
    shape: tuple[int, ...],
    builder: GraphBuilder,
    _: Value,
    payload: Mapping[str, Tensor],
) -> Value:
    """The float32 weight."""
    return stored.weight(builder, name, payload, shape)


def _rows(
    stored: WeightFormat,
    name: str,
    builder: GraphBuilder,
    ids: Value,
    payload: Mapping[str, Tensor],
) -> Value:
    """The float32 rows that are looked up."""
    return stored.rows(builder, name, ids, payload)


def expand_fills(model: ir.Model) -> None:
    """Before: ConstantOfShape (zero caches). After: Expand of one number; the file stays small."""
    graph = model.graph
    for node in [n for n in graph if n.op_type == "ConstantOfShape"]:
        value = node.attributes.get("value")
        number = 0.0 if value is None else float(value.as_tensor().numpy().item())
        name = node.outputs[0].name
        builder = GraphBuilder(graph, node)
        fill = builder.initializer(f"{name}/fill", torch.tensor(number))
        shape = builder.shape_of(node.outputs[0])
        filled = builder.node("Expand", [fill, present(node.inputs[0])], shape=shape)
        node.outputs[0].replace_all_uses_with(filled, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        filled.name = name


def merge_constants(model: ir.Model) -> None:
    """Before: equal constants of few numbers. After: one of each, but for vectors of zero points.

    ONNX Runtime fails where nodes share those that it makes unsigned.
    """
    graph, kept = model.graph, dict[tuple[ir.DataType, tuple[int, ...], bytes], Value]()
    for name, value in list(graph.initializers.items()):
        tensor = content_of(value)
        if tensor.size > _FEW or (tensor.size > 1 and tensor.dtype == ir.DataType.INT8):
            continue
        key = (tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes())
        if (one := kept.setdefault(key, value)) is not value:
            value.replace_all_uses_with(one)
            del graph.initializers[name]


def clean_up(model: ir.Model) -> None:
    """Before: dead nodes, Constants, duplicates. After: only used nodes, constants initializers."""
    for step in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.CommonSubexpressionEliminationPass(),
        merge_constants,
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    ):
        step(model)
    for node in model.graph:
        node.metadata_props.pop(LAYER, None)
        if node.op_type == "Reshape":  # no shape here has a zero, and old parsers do not know it
            node.attributes.pop("allowzero", None)
    if any(node.domain == CONTRIB for node in model.graph):
        model.graph.opset_imports[CONTRIB] = 1
    model.ir_version = IR_VERSION
    model.producer_name = "hbxt_compress"
    model.producer_version = None
    model.doc_string = None
    model.metadata_props.clear()
