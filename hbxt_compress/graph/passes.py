"""From a captured model to the one that ships: the passes, in the order of `lower`.

Each is a function that edits an onnx_ir model in place; its docstring says what the graph looks
like before and after. Naming is in graph/naming.py, files are written by graph/external.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from torch import Tensor

from hbxt_compress.errors import ExportError, listing
from hbxt_compress.formats import FORMATS, WeightFormat
from hbxt_compress.formats.activations import ACTIVATIONS
from hbxt_compress.graph.builder import CONTRIB, GraphBuilder, content_of, name_of, present
from hbxt_compress.graph.naming import name_everything
from hbxt_compress.graph.ops import LINEAR_DOMAIN
from hbxt_compress.graph.transform import emit_transform
from hbxt_compress.layers import LayerName

__all__ = [
    "Precision",
    "Storage",
    "cancel_transposes",
    "clean_up",
    "expand_fills",
    "lower",
    "lower_linears",
    "store_other_weights",
]

Precision = Literal[16, 32]
IR_VERSION = 10
_NO_NAMES: Mapping[LayerName, str] = MappingProxyType({})


class Storage:
    """How each layer of one component is stored, and which layers a graph has used so far."""

    def __init__(
        self,
        component: str,
        weights: Mapping[LayerName, tuple[WeightFormat, Mapping[str, Tensor]]],
        precision: Precision,
        activations: Mapping[LayerName, str] = _NO_NAMES,
    ) -> None:
        prefix = f"{component}/"
        self._activations = activations
        self.component = component
        self._default = FORMATS[f"fp{precision}"]
        self._weights = {name: how for name, how in weights.items() if name.startswith(prefix)}
        self._unused = set(self._weights)

    def of(self, layer: str, weight: Tensor) -> tuple[WeightFormat, Mapping[str, Tensor]]:
        """The layer's format and payload: as planned, else its weight in the default precision."""
        self._unused.discard(LayerName(layer))
        planned = self._weights.get(LayerName(layer))
        chosen, payload = planned or (self._default, {})
        if not payload:
            payload = chosen.encode(weight, torch.ones(()))
        for tensor in payload.values():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ExportError(
                    f"{layer}: cannot be stored as {chosen.name}: its largest absolute value "
                    f"{float(weight.abs().max()):.6g} is beyond 65504 or not finite; "
                    "store it as fp32"
                )
        return chosen, payload

    def activations(self, layer: str) -> str:
        """What the layer's input is stored as, or keep."""
        return self._activations.get(LayerName(layer), "keep")

    def require_all_used(self) -> None:
        """Raises ExportError if a planned format met no layer: its name is wrong."""
        lost = [n for n in sorted(self._unused) if not self._weights[n][0].name.startswith("fp")]
        if lost:
            raise ExportError(f"{len(lost)} layers are not in the graph:\n{listing(lost)}")


def lower(model: ir.Model, storage: Storage) -> None:
    """Applies every pass; afterwards the model obeys graph/targets.py."""
    cancel_transposes(model)
    lower_linears(model, storage)
    store_other_weights(model, storage)
    expand_fills(model)
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
    for node in [n for n in graph if n.domain == LINEAR_DOMAIN]:
        x, weight, *rest = (present(value) for value in node.inputs)
        layer = node.attributes["layer"].as_string()
        chosen, payload = storage.of(layer, _tensor(weight))
        builder = GraphBuilder(graph, node)
        short = layer.removeprefix(f"{storage.component}/")
        x = emit_transform(builder, short, x, payload)
        activations = storage.activations(layer)
        emitter = chosen if activations == "keep" else ACTIVATIONS[activations]
        out = emitter.emit(builder, short, x, payload)
        if rest:
            out = builder.node("Add", [out, rest[0]], shape=builder.shape_of(out))
        node.outputs[0].replace_all_uses_with(out, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def store_other_weights(model: ir.Model, storage: Storage) -> None:
    """Before: Conv and Gather read float32 weights. After: stored ones, 16 bit through a Cast.

    A table larger than what is gathered from it is cast behind the Gather: the table itself then
    stays in 16 bit at run time too.
    """
    graph = model.graph
    stored: dict[str, ir.Value] = {}
    for node in [n for n in graph if n.op_type in ("Conv", "Gather") and n.domain == ""]:
        index = 1 if node.op_type == "Conv" else 0
        weight = node.inputs[index]
        if weight is None or weight.const_value is None or weight.dtype != ir.DataType.FLOAT:
            continue
        module = name_of(weight).removeprefix("model.").removesuffix(".weight")
        tensor = _tensor(weight)
        chosen, payload = storage.of(f"{storage.component}/{module}", tensor)
        builder = GraphBuilder(graph, node)
        if set(payload) != {"weight"}:
            if node.op_type != "Conv":
                raise ExportError(f"{module}: a table cannot be stored as {chosen.name}")
            if module not in stored:
                stored[module] = chosen.weight(builder, module, payload, tuple(tensor.shape))
            node.replace_input_with(index, stored[module])
            continue
        behind = node.op_type == "Gather" and tensor.numel() > math.prod(
            builder.shape_of(node.outputs[0])
        )
        if not behind or payload["weight"].dtype == torch.float32:
            if module not in stored:
                stored[module] = builder.float32(f"{module}.weight", payload["weight"])
            node.replace_input_with(index, stored[module])
            continue
        if module not in stored:
            stored[module] = builder.initializer(f"{module}.weight", payload["weight"])
        node.replace_input_with(index, stored[module])
        _cast_behind(graph, node)


def _cast_behind(graph: ir.Graph, node: ir.Node) -> None:
    out = node.outputs[0]
    out.type = ir.TensorType(ir.DataType.FLOAT16)
    cast = ir.node("Cast", [out], {"to": int(ir.DataType.FLOAT)})
    cast.outputs[0].shape, cast.outputs[0].type = out.shape, ir.TensorType(ir.DataType.FLOAT)
    cast.metadata_props.update(node.metadata_props)
    for user, index in out.uses():
        if user is not cast:
            user.replace_input_with(index, cast.outputs[0])
    graph.insert_after(node, cast)


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


def clean_up(model: ir.Model) -> None:
    """Before: dead nodes, Constants, duplicates. After: only used nodes, constants initializers."""
    for step in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.CommonSubexpressionEliminationPass(),
        # not vectors: ONNX Runtime fails where layers share zero points that it makes unsigned
        common.DeduplicateInitializersPass(size_limit=8),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    ):
        step(model)
    for node in model.graph:
        if node.op_type == "Reshape":  # no shape here has a zero, and old parsers do not know it
            node.attributes.pop("allowzero", None)
    if any(node.domain == CONTRIB for node in model.graph):
        model.graph.opset_imports[CONTRIB] = 1
    model.ir_version = IR_VERSION
    model.producer_name = "hbxt_compress"
    model.producer_version = None
    model.doc_string = None
    model.metadata_props.clear()


def _tensor(value: ir.Value) -> Tensor:
    """An initializer as a torch tensor."""
    return torch.from_numpy(np.asarray(content_of(value).numpy()))
