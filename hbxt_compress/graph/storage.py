"""Storage: how each layer of a component is stored, and when its weight is really read.

A format adds its nodes twice. While a graph is lowered it sees a payload whose matrices are on the
meta device: that gives names, shapes and dtypes. When an initializer is written it adds them to
another graph, which is thrown away, from the true payload. So no two weights are in memory at once.
Of a table that is looked up the same is done for some rows at a time: it may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal, TypeVar

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from hbxt_compress.errors import ExportError, listing
from hbxt_compress.formats import FORMATS, WeightFormat
from hbxt_compress.graph.builder import ByRows, GraphBuilder, Value, content_of
from hbxt_compress.layers import LayerName
from hbxt_compress.quantized import outline

__all__ = ["Precision", "ReadRows", "Storage", "Stored"]

Precision = Literal[16, 32]
Payload = Mapping[str, Tensor]
MadeT = TypeVar("MadeT")
Emit = Callable[[GraphBuilder, Value, Payload], MadeT]
ReadRows = Callable[[str, int, int], Tensor]
_NO_NAMES: Mapping[LayerName, str] = MappingProxyType({})
_NUMBERS_AT_ONCE = 1 << 20  # of a table: 4 MiB in float32, and a few copies


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One weight in its format.

    outline: the payload with every matrix on the meta device. payload: gives the whole of it.
    rows: gives that of rows start..stop of a table; in_parts: whether they can be had apart.
    """

    layer: str
    format: WeightFormat
    outline: Payload
    payload: Callable[[], Payload]
    rows: Callable[[int, int], Payload]
    in_parts: bool

    def emit(self, graph: ir.Graph, before: ir.Node, x: Value, emit: Emit[MadeT]) -> MadeT:
        """What `emit(builder, x, payload)` adds to the graph; matrices are read when written."""
        contents = _Contents(self.payload, x, emit)
        return emit(GraphBuilder(graph, before, contents.later), x, self.outline)

    def emit_rows(self, graph: ir.Graph, before: ir.Node, ids: Value, emit: Emit[Value]) -> Value:
        """The same for nodes that look rows up; matrices are read and written by rows."""
        n_rows = max(len(tensor) for tensor in self.outline.values() if tensor.is_meta)
        n_features = max(tensor[0].numel() for tensor in self.outline.values() if tensor.is_meta)
        n_at_once = max(1, _NUMBERS_AT_ONCE // n_features) if self.in_parts else n_rows

        def later(name: str) -> ByRows:
            def part(start: int, stop: int) -> ir.TensorProtocol:
                return _emitted({name}, self.rows(start, stop), ids, emit)[name]

            return ByRows(n_rows=n_rows, n_at_once=n_at_once, part=part)

        return emit(GraphBuilder(graph, before, later), ids, self.outline)


class Storage:
    """How each layer of one component is stored, and which layers a graph has used so far.

    read_rows: gives rows start..stop of a parameter by its name; None: they are cut from the whole.
    """

    def __init__(
        self,
        component: str,
        weights: Mapping[LayerName, tuple[WeightFormat, Payload]],
        precision: Precision,
        activations: Mapping[LayerName, str] = _NO_NAMES,
        read_rows: ReadRows | None = None,
    ) -> None:
        prefix = f"{component}/"
        self._activations = activations
        self._read_rows = read_rows
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
        shape = weight.shape.numpy()
        read = partial(_rows, f"{layer.removeprefix(f'{self.component}/')}.weight", weight)

        def rows(start: int, stop: int) -> Payload:
            part = {key: tensor[start:stop] for key, tensor in payload.items()}
            return _read(layer, chosen, part, partial(read, self._read_rows, start, stop))

        return Stored(
            layer=layer,
            format=chosen,
            outline=outline(payload or _encoded(chosen, torch.empty(shape, device="meta"))),
            payload=partial(_read, layer, chosen, payload, partial(_tensor, weight)),
            rows=rows,
            in_parts=bool(payload) or self._read_rows is not None,
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

    def __init__(self, payload: Callable[[], Payload], x: Value, emit: Emit[object]) -> None:
        self._payload, self._x, self._emit = payload, x, emit
        self._wanted: set[str] = set()
        self._made: dict[str, ir.TensorProtocol] = {}

    def later(self, name: str) -> Callable[[], ir.TensorProtocol]:
        """Notes that an initializer will be asked for; what to ask then."""
        self._wanted.add(name)
        return partial(self._of, name)

    def _of(self, name: str) -> ir.TensorProtocol:
        if name not in self._made:
            self._made = _emitted(self._wanted, self._payload(), self._x, self._emit)
        return self._made.pop(name)


def _emitted(
    wanted: Set[str], payload: Payload, like: Value, emit: Emit[object]
) -> dict[str, ir.TensorProtocol]:
    """The initializers of these names that a format makes of a payload, given a value like x."""
    x = ir.Value(name="x", shape=like.shape, type=like.type)
    end = ir.node("Identity", [x])
    scratch = ir.Graph([x], end.outputs, nodes=[end])
    emit(GraphBuilder(scratch, end), x, payload)
    made = {key: content_of(scratch.initializers[key]) for key in wanted}
    for value in scratch.initializers.values():  # a graph is a cycle, freed who knows when
        value.const_value = None
    return made


def _encoded(chosen: WeightFormat, weight: Tensor) -> Payload:
    return chosen.encode(weight, torch.ones(()))


def _read(
    layer: str, chosen: WeightFormat, payload: Payload, weight: Callable[[], Tensor]
) -> Payload:
    """The planned payload or else the weight's own, checked finite."""
    found = payload or _encoded(chosen, weight())
    for key, like in outline(found).items():
        if like.is_floating_point() and not _finite(found[key]):
            raise ExportError(
                f"{layer}: cannot be stored as {chosen.name}: its largest absolute value "
                f"{float(weight().abs().max()):.6g} is beyond 65504 or not finite; "
                "store it as fp32"
            )
    return found


def _finite(tensor: Tensor) -> bool:
    """Without a temporary of the tensor's size."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def _tensor(content: ir.TensorProtocol) -> Tensor:
    return torch.from_numpy(np.asarray(content.numpy()))


def _rows(
    parameter: str, weight: ir.TensorProtocol, read: ReadRows | None, start: int, stop: int
) -> Tensor:
    return _tensor(weight)[start:stop] if read is None else read(parameter, start, stop)
