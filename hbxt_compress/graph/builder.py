"""GraphBuilder: the few graph edits that a number format needs, so that formats never see onnx_ir.

Every value gets its dtype and shape here, because ONNX shape inference knows no contrib operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor

__all__ = [
    "CONTRIB",
    "ByRows",
    "GraphBuilder",
    "Value",
    "constant",
    "content_of",
    "name_of",
    "present",
]

CONTRIB = "com.microsoft"
Value = ir.Value


class GraphBuilder:
    """Adds initializers to a graph, and nodes in front of one of its nodes.

    later: called with the name of each initializer of which only shape and dtype are known yet;
    gives what to call for its content.
    """

    def __init__(
        self,
        graph: ir.Graph,
        before: ir.Node,
        later: Callable[[str], Callable[[], ir.TensorProtocol]] | None = None,
    ) -> None:
        self._graph = graph
        self._before = before
        self._later = later

    def initializer(self, name: str, tensor: Tensor) -> Value:
        """A constant with the tensor's dtype and shape; its name must be new to the graph.

        Of a tensor on the meta device the content is asked for `later`, whenever it is needed.
        """
        if name in self._graph.initializers:
            raise ValueError(f"the graph already has an initializer {name!r}")
        data: ir.Tensor | ir.LazyTensor
        if tensor.is_meta and self._later is not None:
            dtype, shape = from_torch_dtype(tensor.dtype), ir.Shape(tensor.shape)
            data = ir.LazyTensor(self._later(name), dtype, shape, name=name)
        else:
            data = constant(name, tensor)
        value = ir.Value(
            name=name, shape=data.shape, type=ir.TensorType(data.dtype), const_value=data
        )
        self._graph.register_initializer(value)
        return value

    def float32(self, name: str, tensor: Tensor) -> Value:
        """A float32 value of the tensor, stored as it is: float16 gets a Cast that loaders fold."""
        stored = self.initializer(name, tensor)
        if tensor.dtype == torch.float32:
            return stored
        return self.node("Cast", [stored], shape=tuple(tensor.shape), to=int(ir.DataType.FLOAT))

    def node(
        self,
        op_type: str,
        inputs: Sequence[Value],
        *,
        shape: Sequence[int],
        domain: str = "",
        dtype: ir.DataType = ir.DataType.FLOAT,
        **attributes: int | float | str | Sequence[int],
    ) -> Value:
        """The one output of a new node, of the given shape and dtype."""
        output = ir.Value(shape=ir.Shape(shape), type=ir.TensorType(dtype))
        node = ir.node(op_type, inputs, attributes, domain=domain, outputs=[output])
        node.metadata_props.update(self._before.metadata_props)
        self._graph.insert_before(self._before, node)
        return output

    @staticmethod
    def shape_of(value: Value) -> tuple[int, ...]:
        """The value's static shape."""
        if value.shape is None or not value.shape.is_static():
            raise ValueError(f"value {value.name!r} has no static shape: {value.shape}")
        return tuple(value.shape.numpy())


@dataclass(frozen=True, slots=True, kw_only=True)
class ByRows:
    """A content that need not be in memory at once. Called, it gives the whole.

    part: gives rows start..stop along the first axis. n_at_once: rows that are asked for together.
    """

    n_rows: int
    n_at_once: int
    part: Callable[[int, int], ir.TensorProtocol]

    def __call__(self) -> ir.TensorProtocol:
        return self.part(0, self.n_rows)

    def parts(self) -> Iterator[ir.TensorProtocol]:
        """The whole, in order."""
        for start in range(0, self.n_rows, self.n_at_once):
            yield self.part(start, min(start + self.n_at_once, self.n_rows))


def constant(name: str, tensor: Tensor) -> ir.Tensor:
    """The tensor as an ONNX one; it shares memory where that lies in order."""
    return ir.Tensor(tensor.detach().cpu().contiguous().numpy(), name=name)


def present(value: Value | None) -> Value:
    """An input that the operator requires."""
    if value is None:
        raise ValueError("a required input is missing")
    return value


def name_of(value: Value) -> str:
    """The value's name: every value of a whole graph has one."""
    if value.name is None:
        raise ValueError(f"a value has no name: {value}")
    return value.name


def content_of(value: Value) -> ir.TensorProtocol:
    """The tensor behind an initializer."""
    if value.const_value is None:
        raise ValueError(f"{value.name!r} is not an initializer")
    return value.const_value
