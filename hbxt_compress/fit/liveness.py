"""Liveness: how many bytes of a graph's values exist at once while it runs, node after node.

A Reshape shares its input's buffer; an elementwise operator writes over an input that nothing reads
later and that is as large. What the caller gives lives all the time, what it gets until the end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from itertools import accumulate

import onnx_ir as ir

__all__ = ["ELEMENTWISE", "VIEWS", "Liveness", "liveness", "nbytes", "shape_of"]

VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
ELEMENTWISE = frozenset(
    {
        "Abs", "Add", "Clip", "Cos", "Div", "Erf", "Exp", "Floor", "Log", "Max", "Min", "Mul",
        "Neg", "Pow", "Reciprocal", "Relu", "Sigmoid", "Sin", "Softmax", "Sqrt", "Sub", "Tanh",
    }
)  # fmt: skip
_NO_VALUES: frozenset[ir.Value] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Liveness:
    """peak_bytes: of all buffers at the worst node, with inputs, outputs and its working set.

    at: that node's name. working_bytes: what it needs inside, part of the peak. input_bytes,
    output_bytes: of the graph's ends, held by who runs it.
    """

    peak_bytes: int
    at: str
    working_bytes: int
    input_bytes: int
    output_bytes: int


@dataclass(slots=True)
class _Buffer:
    """begin, end: first and last step that it exists at."""

    size: int
    begin: int
    end: int
    values: set[ir.Value] = field(default_factory=set)


def nbytes(value: ir.Value) -> int:
    """Bytes of a value with a static shape.

    Raises:
        ValueError: its shape or element type is not known.
    """
    if value.dtype is None:
        raise ValueError(f"value {value.name!r} has no element type")
    return -(-math.prod(shape_of(value)) * value.dtype.bitwidth // 8)


def shape_of(value: ir.Value | None) -> tuple[int, ...]:
    """A value's static shape; ValueError if it has none."""
    if value is None or value.shape is None or not value.shape.is_static():
        raise ValueError(f"value {value and value.name!r} has no static shape")
    return tuple(value.shape.numpy())


def liveness(
    model: ir.Model,
    *,
    constants: Set[ir.Value] = _NO_VALUES,
    order: Sequence[ir.Node] | None = None,
    working: Callable[[ir.Node], int] = lambda _: 0,
    size: Callable[[ir.Value], int] = nbytes,
    is_view: Callable[[ir.Node], bool] = lambda node: node.op_type in VIEWS,
) -> Liveness:
    """The peak over the graph's nodes, in the file's order or in another.

    constants: values that are known before it runs (initializers always are); nodes that make
    nothing else are left out. working: bytes that a node needs inside while it runs. size: of a
    value, if it is kept in other numbers than the graph says. is_view: nothing is computed.
    """
    graph = model.graph
    known = {*constants, *graph.initializers.values()}
    nodes = [n for n in order or graph if not all(v in known for v in n.outputs if v.name)]
    kept = {*graph.inputs, *graph.outputs}
    left = Counter(value for node in nodes for value in node.inputs if value is not None)
    buffers = [_Buffer(size(v), 0, len(nodes), {v}) for v in graph.inputs]
    of = {next(iter(one.values)): one for one in buffers}

    def is_dead(buffer: _Buffer) -> bool:
        return not any(left[one] > 0 or one in kept for one in buffer.values)

    for step, node in enumerate(nodes):
        inputs = [one for one in node.inputs if one is not None and one not in known]
        left.subtract(inputs)
        for value in (one for one in node.outputs if one.name):
            buffer = None if value in kept else _shared(node, value, inputs, of, is_dead, is_view)
            if buffer is None:
                end = len(nodes) if value in kept else step
                buffer = _Buffer(size(value), step, end)
                buffers.append(buffer)
            buffer.values.add(value)
            of[value] = buffer
        for one in (*inputs, *node.outputs):
            if one in of:
                of[one].end = max(of[one].end, step)
    return _worst(nodes, buffers, graph, working)


def _shared(
    node: ir.Node, value: ir.Value, inputs: Sequence[ir.Value], of: dict[ir.Value, _Buffer],
    is_dead: Callable[[_Buffer], bool], is_view: Callable[[ir.Node], bool],
) -> _Buffer | None:  # fmt: skip
    """The buffer of an input that an output takes over, if there is one."""
    if is_view(node):
        return of[inputs[0]] if inputs and node.inputs[0] is inputs[0] else None
    if node.op_type not in ELEMENTWISE:
        return None
    for one in inputs:
        if nbytes(one) == nbytes(value) and one.dtype == value.dtype and is_dead(of[one]):
            return of[one]
    return None


def _worst(
    nodes: Sequence[ir.Node], buffers: Iterable[_Buffer], graph: ir.Graph,
    working: Callable[[ir.Node], int],
) -> Liveness:  # fmt: skip
    changes = [0] * (len(nodes) + 2)
    for one in buffers:
        changes[one.begin] += one.size
        changes[one.end + 1] -= one.size
    alive = list(accumulate(changes))
    needed = [working(node) for node in nodes]
    totals = [a + w for a, w in zip(alive, needed, strict=False)]
    at = max(range(len(nodes)), key=totals.__getitem__, default=None)
    return Liveness(
        peak_bytes=alive[0] if at is None else totals[at],
        at="the inputs" if at is None else nodes[at].name or nodes[at].op_type,
        working_bytes=0 if at is None else needed[at],
        input_bytes=sum(map(nbytes, graph.inputs)),
        output_bytes=sum(map(nbytes, graph.outputs)),
    )
