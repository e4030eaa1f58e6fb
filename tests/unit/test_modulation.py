"""Norms scaled and shifted in one node: the same numbers, and only where it is the same."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from hbxt_compress.graph.modulation import fold_modulation

N, D = 5, 16
SHAPES = {"x": (1, N, D), "scale": (1, 1, D), "shift": (1, 1, D)}


def model(
    *, ones: bool = True, bias: bool = False, operators: tuple[str, str] = ("Mul", "Add"),
    seen: str | None = None, swapped: bool = False,
    shapes: dict[str, tuple[int, ...]] | None = None,
) -> onnx.ModelProto:  # fmt: skip
    """Add(Mul(LayerNormalization(x, weight), scale), shift), varied; `seen` is an output, too."""
    shapes = SHAPES | (shapes or {})
    weight = np.ones(D, np.float32) if ones else np.linspace(0.5, 2, D, dtype=np.float32)
    initializers = [numpy_helper.from_array(weight, "weight")]
    inputs = ["x", "weight"]
    if bias:
        initializers.append(numpy_helper.from_array(np.ones(D, np.float32), "bias"))
        inputs.append("bias")
    first, second = ("scale", "normed"), ("shift", "scaled")
    if not swapped:
        first, second = first[::-1], second[::-1]
    nodes = [
        helper.make_node("LayerNormalization", inputs, ["normed"], epsilon=1e-3, axis=-1),
        helper.make_node(operators[0], first, ["scaled"]),
        helper.make_node(operators[1], second, ["out"]),
    ]
    ends = {name: helper.make_tensor_value_info(name, 1, shape) for name, shape in shapes.items()}
    between = [helper.make_tensor_value_info(n, 1, SHAPES["x"]) for n in ("normed", "scaled")]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, SHAPES["x"])]
    outputs += [one for one in between if one.name == seen]
    graph = helper.make_graph(
        nodes, "g", list(ends.values()), outputs, initializers, value_info=between
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(made, full_check=True)
    return made


def outputs(one: onnx.ModelProto) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(one.SerializeToString())
    drawn = np.random.default_rng(0)
    feeds = {
        i.name: 3 * drawn.standard_normal(i.shape, dtype=np.float32) for i in session.get_inputs()
    }
    return session.run(None, feeds)


def folded(one: onnx.ModelProto) -> onnx.ModelProto:
    edited = ir.from_proto(one)
    fold_modulation(edited)
    result = ir.to_proto(edited)
    onnx.checker.check_model(result, full_check=True)
    return result


def operators(one: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in one.graph.node)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, D), (1, D), (D,)])
def test_it_becomes_one_node_of_the_same_result(swapped: bool, shape: tuple[int, ...]) -> None:
    before = model(swapped=swapped, shapes={"scale": shape, "shift": shape})
    after = folded(before)
    assert operators(after)["LayerNormalization"] == 1
    assert not {"Mul", "Add"} & set(operators(after))
    np.testing.assert_allclose(outputs(after)[0], outputs(before)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "different",
    [
        {"ones": False},
        {"bias": True},
        {"operators": ("Div", "Add")},
        {"operators": ("Mul", "Sub")},
        {"seen": "normed"},
        {"seen": "scaled"},
        {"shapes": {"scale": (1, N, D)}},
        {"shapes": {"shift": (1, N, D)}},
        {"shapes": {"scale": (1, 1, 1)}},
        {"shapes": {"shift": (1, N, 1)}},
    ],
)
def test_what_is_otherwise_stays_as_it_is(different: dict[str, object]) -> None:
    before = model(**different)
    after = folded(before)
    assert operators(after) == operators(before)
    for got, expected in zip(outputs(after), outputs(before), strict=True):
        np.testing.assert_array_equal(got, expected)
