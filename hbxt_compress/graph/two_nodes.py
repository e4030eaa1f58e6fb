"""The smallest graph that a provider can prove itself on: y = (x + 1) * 2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

__all__ = ["INPUT", "OUTPUT", "write_two_nodes"]

INPUT = {"x": np.array([1, 2], np.float32)}
OUTPUT = np.array([4, 6], np.float32)


def write_two_nodes(path: Path) -> None:
    """Writes it: float32, opset 18, IR 10."""
    numbers = [numpy_helper.from_array(np.array([n], np.float32), f"c{n}") for n in (1, 2)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    nodes = [
        helper.make_node("Add", ["x", "c1"], ["a"]),
        helper.make_node("Mul", ["a", "c2"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "two nodes", ends[:1], ends[1:], numbers)
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    path.write_bytes(model.SerializeToString())
