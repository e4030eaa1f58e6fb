"""check_model finds each kind of broken rule, and nothing in a good graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hbxt_compress.graph.obeyed import check_component, check_model
from hbxt_compress.graph.targets import TARGETS

_N, _K, _G = 16, 64, 32


def _good(zeros: np.ndarray | None = None) -> onnx.ModelProto:
    """x -> MatMulNBits -> Reshape -> y; with zero points if given."""
    weights = np.zeros((_N, _K // _G, _G // 2), np.uint8)
    scales = np.ones(_N * _K // _G, np.float32)
    nodes = [
        helper.make_node(
            "MatMulNBits", ["x", "w", "s"] + ["z"] * (zeros is not None), ["m"], "quantized",
            domain="com.microsoft",
            K=_K, N=_N, bits=4, block_size=_G,
        ),
        helper.make_node("Reshape", ["m", "shape"], ["y"], "reshaped"),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, _K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, _N])],
        [
            numpy_helper.from_array(weights, "w"),
            numpy_helper.from_array(scales, "s"),
            numpy_helper.from_array(np.array([1, 2, _N]), "shape"),
            *([] if zeros is None else [numpy_helper.from_array(zeros, "z")]),
        ],
        value_info=[helper.make_tensor_value_info("m", TensorProto.FLOAT, [2, _N])],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _newer_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 23


def _newer_ir(model: onnx.ModelProto) -> None:
    model.ir_version = 11


def _unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[1].op_type = "RMSNormalization"


def _foreign_domain(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("hbxt", 1))
    model.graph.node[1].domain = "hbxt"


def _standard_attention(model: onnx.ModelProto) -> None:
    model.graph.node[1].op_type = "Attention"


def _bias_input(model: onnx.ModelProto) -> None:
    model.graph.node[0].input.extend(["", "", "s"])


def _eight_bits(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute[2].i = 8


def _no_scales(model: onnx.ModelProto) -> None:
    del model.graph.node[0].input[2]


def _group_index(model: onnx.ModelProto) -> None:
    model.graph.node[0].input.extend(["", "s"])


def _empty_zero_points(model: onnx.ModelProto) -> None:
    model.graph.node[0].input.append("")


def _wrong_weight(model: onnx.ModelProto) -> None:
    weights = numpy_helper.from_array(np.zeros((_N, _K // _G * _G // 2), np.uint8), "w")
    model.graph.initializer[0].CopyFrom(weights)


def _integer_activations(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("accuracy_level", 4))


def _wrong_block(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute[3].i = 48


def _dynamic_shape(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"


def _runtime_argument(model: onnx.ModelProto) -> None:
    del model.graph.initializer[2]
    model.graph.input.append(helper.make_tensor_value_info("shape", TensorProto.INT64, [3]))


def _double(model: onnx.ModelProto) -> None:
    model.graph.value_info[0].type.tensor_type.elem_type = TensorProto.DOUBLE


def _infinite(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([np.inf], np.float16), "h"))


def _swapped_keys(model: onnx.ModelProto) -> None:
    _external(model, [("location", "model.onnx.data"), ("length", "4"), ("offset", "0")])


def _outside(model: onnx.ModelProto) -> None:
    _external(model, [("location", "../other.data"), ("offset", "0"), ("length", "4")])


def _beyond_the_end(model: onnx.ModelProto) -> None:
    _external(model, [("location", "model.onnx.data"), ("offset", "4090"), ("length", "128")])


def _external(model: onnx.ModelProto, entries: list[tuple[str, str]]) -> None:
    tensor = model.graph.initializer[1]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries:
        tensor.external_data.add(key=key, value=value)


_BROKEN: list[tuple[Callable[[onnx.ModelProto], None], str]] = [
    (_newer_opset, "opset 23"),
    (_newer_ir, "IR version 11"),
    (_unknown_operator, "RMSNormalization is not allowed"),
    (_foreign_domain, "domain 'hbxt'"),
    (_standard_attention, "ai.onnx::Attention is not allowed"),
    (_bias_input, "6 inputs, expected 3 or 4"),
    (_no_scales, "2 inputs, expected 3 or 4"),
    (_group_index, "5 inputs, expected 3 or 4"),
    (_empty_zero_points, "empty fourth input"),
    (_wrong_weight, "weight of shape [16, 32], expected [16, 2, 16]"),
    (_eight_bits, "8 bits"),
    (_integer_activations, "accuracy_level 4"),
    (_wrong_block, "block_size 48"),
    (_dynamic_shape, "not static"),
    (_runtime_argument, "input 1 of Reshape is not constant"),
    (_double, "DOUBLE"),
    (_infinite, "not finite"),
    (_swapped_keys, "in order"),
    (_outside, "../other.data"),
    (_beyond_the_end, "beyond the file's end"),
]


def _saved(model: onnx.ModelProto, folder: Path) -> Path:
    (folder / "model.onnx.data").write_bytes(bytes(4096))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def test_a_good_graph_has_no_problems(tmp_path: Path) -> None:
    assert check_model(_saved(_good(), tmp_path)) == ()


def test_zero_points_are_allowed_two_a_byte_along_one_axis(tmp_path: Path) -> None:
    assert check_model(_saved(_good(np.full(_N, 0x88, np.uint8)), tmp_path)) == ()


@pytest.mark.parametrize(
    ("zeros", "expected"),
    [
        (np.zeros((_N, 1), np.uint8), "zero points of shape [16, 1], expected [16]"),
        (np.zeros(2 * _N, np.uint8), "zero points of shape [32], expected [16]"),
        (np.zeros(_N, np.float32), "zero points of dtype FLOAT"),
        (np.zeros(_N, np.int8), "zero points of dtype INT8"),
    ],
)
def test_other_zero_points_are_misread_somewhere(
    zeros: np.ndarray, expected: str, tmp_path: Path
) -> None:
    problems = check_model(_saved(_good(zeros), tmp_path))
    assert any(expected in problem.what for problem in problems), problems


def test_zero_points_must_be_known_when_the_model_is_compiled(tmp_path: Path) -> None:
    model = _good(np.zeros(_N, np.uint8))
    del model.graph.initializer[3]
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.UINT8, [_N]))
    problems = check_model(_saved(model, tmp_path))
    assert any("expected a constant UINT8" in problem.what for problem in problems), problems


def test_rows_with_an_odd_number_of_blocks_are_padded(tmp_path: Path) -> None:
    """96 inputs are three blocks of 32: two bytes a row."""
    for n_bytes, fits in ((2 * _N, True), (_N * 3 // 2, False)):
        model = _good(np.zeros(n_bytes, np.uint8))
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 96
        attributes = {one.name: one for one in model.graph.node[0].attribute}
        attributes["K"].i = 96
        weights = numpy_helper.from_array(np.zeros((_N, 3, _G // 2), np.uint8), "w")
        model.graph.initializer[0].CopyFrom(weights)
        assert (check_model(_saved(model, tmp_path)) == ()) == fits


@pytest.mark.parametrize(("damage", "expected"), _BROKEN, ids=lambda p: getattr(p, "__name__", ""))
def test_every_broken_rule_is_found(
    damage: Callable[[onnx.ModelProto], None], expected: str, tmp_path: Path
) -> None:
    model = _good()
    damage(model)
    problems = [str(problem) for problem in check_model(_saved(model, tmp_path))]
    assert any(expected in problem for problem in problems), problems
    assert all(problem.startswith("model.onnx: ") for problem in problems)


def test_a_folder_without_graphs_is_a_problem(tmp_path: Path) -> None:
    assert len(check_component(tmp_path)) == 1


def test_the_target_names_its_source_and_leaves_out_misread_operators() -> None:
    target = TARGETS["rocm"]
    assert "f729a52" in target.source
    assert {"MatMul", "Conv", "DequantizeLinear", "LayerNormalization"} <= target.operators[""]
    assert {"MatMulNBits", "MultiHeadAttention", "FastGelu"} <= target.operators["com.microsoft"]
    assert not {"Attention", "RotaryEmbedding", "Loop", "Shape"} & target.operators[""]
