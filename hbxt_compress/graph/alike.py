"""Whether two blocks are alike: as modules, and as nodes of a graph that was traced from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import onnx_ir as ir
import torch
from torch import Tensor, nn

from hbxt_compress.graph.builder import name_of
from hbxt_compress.graph.naming import scope_of

__all__ = ["BlocksDiffer", "Match", "match_nodes", "require_alike"]

Rename = Callable[[str], str]
_OWN = frozenset({"_parameters", "_buffers", "_modules"})


class BlocksDiffer(Exception):
    """Why a module's blocks cannot be repeated; tracing all of them is always right."""


class Match(NamedTuple):
    """Nodes of two blocks that are the same, and what the first of the two is given and gives.

    own: its initializers, with those that correspond to them in the second one.
    """

    nodes: Sequence[ir.Node]
    others: Sequence[ir.Node]
    enters: ir.Value
    leaves: ir.Value
    own: Mapping[ir.Value, ir.Value]


def require_alike(one: nn.Module, other: nn.Module, rename: Rename, at: tuple[int, int]) -> None:
    """Raises BlocksDiffer unless only the values of parameters, and names, tell two blocks apart.

    rename: gives a text that names the first block, about the second. at: their numbers, which
    they may know.
    """
    where = f"blocks {at[0]} and {at[1]}"
    ones, others = dict(one.named_modules()), dict(other.named_modules())
    if ones.keys() != others.keys():
        raise BlocksDiffer(f"{where} are made of other modules")
    for name, module in ones.items():
        a, b = vars(module), vars(others[name])
        if (
            type(module) is not type(others[name])
            or a.keys() != b.keys()
            or not all(_equal(a[key], b[key], rename, at) for key in a.keys() - _OWN)
        ):
            raise BlocksDiffer(f"{where}: {name or 'they'} are set otherwise")
    if _outline(one) != _outline(other):
        raise BlocksDiffer(f"{where} have parameters of other shapes")
    buffers = dict(other.named_buffers())
    if not all(torch.equal(buffer, buffers[name]) for name, buffer in one.named_buffers()):
        raise BlocksDiffer(f"{where} have other buffers")


def match_nodes(nodes: Sequence[ir.Node], others: Sequence[ir.Node], rename: Rename) -> Match:
    """Two blocks' nodes if they are the same in every way but names, and one value links them.

    rename: gives a text that names the first block, about the second.

    Raises:
        BlocksDiffer: they are not, or somebody else reads what the first block makes.
    """
    if len(nodes) != len(others):
        raise BlocksDiffer(f"{len(nodes)} nodes of a block, {len(others)} of the last one")
    inside, there = _places(nodes), _places(others)
    links: set[tuple[ir.Value, ir.Value]] = set()
    own: dict[ir.Value, ir.Value] = {}
    for one, other in zip(nodes, others, strict=True):
        where = f"{one.name} and {other.name}"
        if _looks(one, rename) != _looks(other, str):
            raise BlocksDiffer(f"{where} differ")
        for a, b in zip(one.inputs, other.inputs, strict=True):
            if a is None or b is None or (a is b and a not in inside):
                same = a is b
            elif a in inside or b in there:
                same = inside.get(a) == there.get(b)
            elif b in inside:
                links.add((a, b))
                same = a.dtype == b.dtype and a.shape == b.shape
            else:
                same = own.setdefault(a, b) is b and _correspond(a, b, rename)
            if not same:
                raise BlocksDiffer(f"{where} read other values")
    if len(links) != 1:
        raise BlocksDiffer(f"{len(links)} values lead from block to block")
    ((enters, leaves),) = links
    within = {*nodes}
    for value in inside:
        readers = within | {*others} if value is leaves else within
        if value.is_graph_output() or not set(value.consumers()) <= readers:
            raise BlocksDiffer(f"{value.name} is read outside of its block")
    return Match(nodes, others, enters, leaves, own)


def _equal(a: object, b: object, rename: Rename, at: tuple[int, int]) -> bool:
    """Whether a module's setting in one block is that in another, or each block's own number."""
    if a is b or (a, b) == at:
        return True
    if isinstance(a, str):
        return rename(a) == b
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)


def _outline(module: nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
    tensors = (*module.named_parameters(), *module.named_buffers())
    return [(name, tensor.shape, tensor.dtype) for name, tensor in tensors]


def _places(nodes: Sequence[ir.Node]) -> dict[ir.Value, tuple[int, int]]:
    return {v: (i, j) for i, node in enumerate(nodes) for j, v in enumerate(node.outputs)}


def _looks(node: ir.Node, text: Rename) -> object:
    """Everything about a node but whom it reads and what its values are called."""
    return (
        *(node.domain, node.op_type, node.overload, node.version),
        {name: _plain(attribute, text) for name, attribute in node.attributes.items()},
        [(value.dtype, value.shape) for value in node.outputs],
        len(node.inputs),
        text(scope_of(node)),
    )


def _plain(attribute: ir.Attr, text: Rename) -> object:
    """An attribute's value as something to compare; graphs are never equal."""
    if attribute.type == ir.AttributeType.STRING:
        return text(attribute.as_string())
    if attribute.type == ir.AttributeType.TENSOR:
        return _content(attribute.as_tensor())
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return id(attribute)
    return attribute.type, attribute.value


def _correspond(a: ir.Value, b: ir.Value, rename: Rename) -> bool:
    """Whether two initializers are one parameter of both blocks, or constants of one content."""
    if a.const_value is None or b.const_value is None:
        return False
    if "." in name_of(a) or "." in name_of(b):  # a parameter or buffer
        alike = a.dtype == b.dtype and a.shape == b.shape
        return alike and rename(name_of(a)) == name_of(b)
    return _content(a.const_value) == _content(b.const_value)


def _content(tensor: ir.TensorProtocol) -> tuple[ir.DataType, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()
