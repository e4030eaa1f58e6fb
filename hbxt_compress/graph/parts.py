"""feed_forward_in_parts: what stands between two products is never there for all tokens at once.

A feed-forward layer is four to six times as wide as the tokens that pass through it, and is the
most that a step keeps in memory. It knows no other token, so the tokens go through it in parts; a
part of some hundred tokens also stays in a processor's cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch

from hbxt_compress.graph.builder import CONTRIB, GraphBuilder, Value, present

__all__ = ["LEAST_TOKENS", "MOST_PARTS", "feed_forward_in_parts"]

LEAST_TOKENS = 512  # of a part
MOST_PARTS = 4  # more would make graphs long for little
_TOKENS = 1  # their axis
_PRODUCTS = frozenset({"MatMul", "MatMulNBits"})
_BY_NUMBER = frozenset({"Add", "Cast", "Div", "Mul", "Sub"})
_MADE_OF_CONSTANTS = 8  # nodes in a row, at most


def feed_forward_in_parts(
    model: ir.Model, *, least: int = LEAST_TOKENS, most: int = MOST_PARTS
) -> None:
    """Before: product, FastGelu, product of 1 S D. After: Split along S, these for each, Concat.

    Up to `most` parts of `least` tokens or more. One where another value than constants comes in
    between stays whole.
    """
    for gelu in [n for n in model.graph if (n.domain, n.op_type) == (CONTRIB, "FastGelu")]:
        shape = GraphBuilder.shape_of(gelu.outputs[0])
        n_parts = min(most, shape[_TOKENS] // least) if len(shape) == 3 else 1
        before, after = _before(gelu), _after(gelu)
        if n_parts > 1 and _has_product(before) and _has_product(after):
            _divide(model.graph, [*before, gelu, *after], n_parts)


def _divide(graph: ir.Graph, chain: Sequence[ir.Node], n_parts: int) -> None:
    x, last = _changing(chain[0]), chain[-1].outputs[0]
    n_tokens = GraphBuilder.shape_of(x)[_TOKENS]
    sizes = [n_tokens * (i + 1) // n_parts - n_tokens * i // n_parts for i in range(n_parts)]
    builder = GraphBuilder(graph, chain[0])
    name = f"parts.{n_tokens}.{n_parts}"
    given = graph.initializers.get(name)
    if given is None:
        given = builder.initializer(name, torch.tensor(sizes))
    parts = [_like(x, size) for size in sizes]
    _insert(graph, chain[0], ir.node("Split", [x, given], {"axis": _TOKENS}, outputs=parts))
    done = []
    for part, size in zip(parts, sizes, strict=True):
        value = part
        for node in chain:
            inputs = [value if one is _changing(node) else one for one in node.inputs]
            value = _like(node.outputs[0], size)
            made = ir.node(
                node.op_type, inputs, dict(node.attributes), domain=node.domain, outputs=[value]
            )
            _insert(graph, chain[0], made, like=node)
        done.append(value)
    whole = _like(last, n_tokens)
    _insert(graph, chain[0], ir.node("Concat", done, {"axis": _TOKENS}, outputs=[whole]))
    last.replace_all_uses_with(whole, replace_graph_outputs=True)
    for node in reversed(chain):
        graph.remove(node, safe=True)


def _insert(graph: ir.Graph, at: ir.Node, node: ir.Node, like: ir.Node | None = None) -> None:
    node.metadata_props.update((like or at).metadata_props)
    graph.insert_before(at, node)


def _like(value: Value, n_tokens: int) -> Value:
    """A new value of that many tokens."""
    shape = list(GraphBuilder.shape_of(value))
    shape[_TOKENS] = n_tokens
    return ir.Value(shape=ir.Shape(shape), type=value.type)


def _before(node: ir.Node) -> list[ir.Node]:
    """What leads to a node token by token, and to nothing else, in order."""
    found: list[ir.Node] = []
    maker = present(node.inputs[0]).producer()
    while maker is not None and _by_token(maker) and _readers(maker) == 1:
        found.insert(0, maker)
        maker = _changing(maker).producer()
    return found


def _after(node: ir.Node) -> list[ir.Node]:
    """What a node leads to token by token, as long as that is one thing."""
    found: list[ir.Node] = []
    while _readers(node) == 1:
        ((node, _),) = node.outputs[0].uses()
        if not _by_token(node):
            break
        found.append(node)
    return found


def _readers(node: ir.Node) -> int:
    """How many look at a node's output; what leaves the graph has too many."""
    return 2 if node.outputs[0].is_graph_output() else len(list(node.outputs[0].uses()))


def _has_product(chain: Sequence[ir.Node]) -> bool:
    return any(node.op_type in _PRODUCTS for node in chain)


def _by_token(node: ir.Node) -> bool:
    """Whether each token of its output comes from that token of one input, and from constants."""
    changing = [one for one in node.inputs if one is not None and not _is_constant(one)]
    if len(changing) != 1 or len(node.outputs) != 1:
        return False
    shapes = [GraphBuilder.shape_of(one) for one in (changing[0], node.outputs[0])]
    if any(len(shape) != 3 or shape[0] != 1 for shape in shapes):
        return False
    if shapes[0][_TOKENS] != shapes[1][_TOKENS]:
        return False
    if node.op_type in _PRODUCTS:
        return node.inputs[0] is changing[0] and not _is_decoded(node.inputs[1])
    others = [one for one in node.inputs if one is not None and one is not changing[0]]
    return node.op_type in _BY_NUMBER and all(_is_for_every_token(one) for one in others)


def _is_decoded(weight: Value | None, depth: int = _MADE_OF_CONSTANTS) -> bool:
    """Whether a weight passes a DequantizeLinear: ONNX Runtime fails where products share that."""
    maker = None if weight is None else weight.producer()
    if maker is None or depth == 0:
        return False
    return maker.op_type == "DequantizeLinear" or _is_decoded(maker.inputs[0], depth - 1)


def _is_for_every_token(value: Value) -> bool:
    return all(n == 1 for n in GraphBuilder.shape_of(value)[:-1])


def _changing(node: ir.Node) -> Value:
    """The one input that is computed from the graph's inputs."""
    return next(one for one in node.inputs if one is not None and not _is_constant(one))


def _is_constant(value: Value, depth: int = _MADE_OF_CONSTANTS) -> bool:
    """An initializer, or made of such alone."""
    maker = value.producer()
    if maker is None:
        return value.is_initializer()
    return depth > 0 and all(one is None or _is_constant(one, depth - 1) for one in maker.inputs)
