"""Storage: how each layer of a component is stored, and when its weight is really read.

A format adds its nodes twice. While a graph is lowered it sees a payload whose matrices are on the
meta device: that gives names, shapes and dtypes. When an initializer is written it adds them to
another graph, which is thrown away, from the true payload. So no two weights are in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from hbxt_compress.errors import ExportError, listing
from hbxt_compress.formats import FORMATS, WeightFormat
from hbxt_compress.graph.builder import GraphBuilder, Value, content_of
from hbxt_compress.layers import LayerName

__all__ = ["Precision", "Storage", "Stored"]

Precision = Literal[16, 32]
Payload = Mapping[str, Tensor]
Emit = Callable[[GraphBuilder, Value, Payload], Value]
_NO_NAMES: Mapping[LayerName, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One weight in its format.

    outline: the payload with every matrix on the meta device. payload: gives the whole of it.
    """

    layer: str
    format: WeightFormat
    outline: Payload
    payload: Callable[[], Payload]

    def emit(self, graph: ir.Graph, before: ir.Node, x: Value, emit: Emit) -> Value:
        """What `emit(builder, x, payload)` adds to the graph; matrices are read when written."""
        contents = _Contents(self.payload, x, emit)
        return emit(GraphBuilder(graph, before, contents.later), x, self.outline)


class Storage:
    """How each layer of one component is stored, and which layers a graph has used so far."""

    def __init__(
        self,
        component: str,
        weights: Mapping[LayerName, tuple[WeightFormat, Payload]],
        precision: Precision,
        activations: Mapping[LayerName, str] = _NO_NAMES,
    ) -> None:
        prefix = f"{component}/"
        self._activations = activations
        self.component = component
        self._default = FORMATS[f"fp{precision}"]
        self._weights = {name: how for name, how in weights.items() if name.startswith(prefix)}
        self._unused = set(self._weights)

    def of(self, layer: str, weight: ir.TensorProtocol) -> Stored:
        """The layer as planned, else its weight in the default precision.

        Reading the payload raises ExportError if it is not finite in that format.
        """
        self._unused.discard(LayerName(layer))
        chosen, payload = self._weights.get(LayerName(layer)) or (self._default, {})
        outline = payload or _encoded(
            chosen, torch.empty(weight.shape.numpy(), dtype=torch.float32, device="meta")
        )
        return Stored(
            layer=layer,
            format=chosen,
            outline={key: t.to("meta") if t.ndim > 1 else t.clone() for key, t in outline.items()},
            payload=partial(_read, layer, chosen, payload, weight),
        )

    def activations(self, layer: str) -> str:
        """What the layer's input is stored as, or keep."""
        return self._activations.get(LayerName(layer), "keep")

    def require_all_used(self) -> None:
        """Raises ExportError if a planned format met no layer: its name is wrong."""
        lost = [n for n in sorted(self._unused) if not self._weights[n][0].name.startswith("fp")]
        if lost:
            raise ExportError(f"{len(lost)} layers are not in the graph:\n{listing(lost)}")


class _Contents:
    """What a format makes of one payload's matrices, by initializer.

    What is made along with the one that is asked for is kept until it is asked for in turn.
    """

    def __init__(self, payload: Callable[[], Payload], x: Value, emit: Emit) -> None:
        self._payload = payload
        self._shape, self._type = x.shape, x.type
        self._emit = emit
        self._wanted: set[str] = set()
        self._made: dict[str, ir.TensorProtocol] = {}

    def later(self, name: str) -> Callable[[], ir.TensorProtocol]:
        """Notes that an initializer will be asked for; what to ask then."""
        self._wanted.add(name)
        return partial(self._of, name)

    def _of(self, name: str) -> ir.TensorProtocol:
        if name not in self._made:
            x = ir.Value(name="x", shape=self._shape, type=self._type)
            end = ir.node("Identity", [x])
            scratch = ir.Graph([x], end.outputs, nodes=[end])
            self._emit(GraphBuilder(scratch, end), x, self._payload())
            self._made = {key: content_of(scratch.initializers[key]) for key in self._wanted}
            for value in scratch.initializers.values():  # a graph is a cycle, freed who knows when
                value.const_value = None
        return self._made.pop(name)


def _encoded(chosen: WeightFormat, weight: Tensor) -> Payload:
    return chosen.encode(weight, torch.ones(()))


def _read(layer: str, chosen: WeightFormat, payload: Payload, weight: ir.TensorProtocol) -> Payload:
    """The planned payload or else the weight's own, checked finite."""
    found = dict(payload) or _encoded(chosen, _tensor(weight))
    for tensor in found.values():
        if tensor.is_floating_point() and not _finite(tensor):
            raise ExportError(
                f"{layer}: cannot be stored as {chosen.name}: its largest absolute value "
                f"{float(_tensor(weight).abs().max()):.6g} is beyond 65504 or not finite; "
                "store it as fp32"
            )
    return found


def _finite(tensor: Tensor) -> bool:
    """Without a temporary of the tensor's size."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def _tensor(content: ir.TensorProtocol) -> Tensor:
    return torch.from_numpy(np.asarray(content.numpy()))
