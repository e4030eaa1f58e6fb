"""The order in which ONNX Runtime runs a graph's nodes: depth first from the end, not the file's.

Of a node's inputs the one made by the node furthest down the file is computed first, with all it
needs. So keys and values that every block takes from one text are all made before the first block.
"""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["run_order"]


def run_order(graph: ir.Graph) -> tuple[ir.Node, ...]:
    """The graph's nodes as ONNX Runtime's default order has them."""
    place = {node: i for i, node in enumerate(graph)}
    ends = [node for node in graph if not any(one.uses() for one in node.outputs)]
    stack = [(node, False) for node in ends]
    seen: set[ir.Node] = set()
    found: list[ir.Node] = []
    while stack:
        node, is_done = stack.pop()
        if is_done:
            found.append(node)
            continue
        if node in seen:
            continue
        seen.add(node)
        stack.append((node, True))
        makers = {one.producer() for one in node.inputs if one is not None}
        before = sorted((one for one in makers if one is not None), key=place.__getitem__)
        stack += [(one, False) for one in before if one not in seen]
    return tuple(found)
