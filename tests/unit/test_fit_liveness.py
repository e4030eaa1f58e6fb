"""Liveness, order and kept weights, on graphs small enough to count by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir
import pytest
from onnx_ir import DataType

from hbxt_compress.fit.constants import kept_on_cpu, kept_on_gpu, stored_bytes
from hbxt_compress.fit.cpu import on_cpu, working_set
from hbxt_compress.fit.liveness import liveness, nbytes
from hbxt_compress.fit.order import run_order
from hbxt_compress.fit.roofline import flops, scores_bytes


def _value(name: str, *shape: int, dtype: DataType = DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _weight(name: str, *shape: int, dtype: DataType = DataType.FLOAT) -> ir.Value:
    value = _value(name, *shape, dtype=dtype)
    value.const_value = ir.LazyTensor(lambda: pytest.fail("read"), dtype, ir.Shape(shape))
    return value


def _node(op: str, inputs: Sequence[ir.Value | None], out: ir.Value, **attributes: int) -> ir.Node:
    domain = "com.microsoft" if op in ("MultiHeadAttention", "FastGelu", "MatMulNBits") else ""
    return ir.node(op, inputs, attributes, domain=domain, outputs=[out], name=f"make {out.name}")


def _model(
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    nodes: Sequence[ir.Node],
    weights: Iterable[ir.Value] = (),
) -> ir.Model:
    graph = ir.Graph(
        inputs, outputs, nodes=nodes, initializers=weights, opset_imports={"": 18}, name="g"
    )
    return ir.Model(graph, ir_version=10)


def test_a_chain_of_products_holds_two_values_beside_the_ends() -> None:
    x, w = _value("x", 10, 10), _weight("w", 10, 10)
    values = [_value(f"v{i}", 10, 10) for i in range(4)]
    nodes = [_node("MatMul", [a, w], b) for a, b in zip([x, *values], values, strict=False)]
    found = liveness(_model([x], [values[-1]], nodes, [w]))
    assert found.peak_bytes == 3 * 400  # x all the time, and one value becomes the next
    assert (found.input_bytes, found.output_bytes) == (400, 400)
    assert found.at == "make v1"


def test_elementwise_operators_write_over_a_value_that_nothing_else_reads() -> None:
    x, w = _value("x", 5), _weight("w", 5, 5)
    a, b, c, y = (_value(name, 5) for name in "abcy")
    first = _node("MatMul", [x, w], a)
    over = [first, _node("Mul", [a, a], b), _node("Sqrt", [b], c), _node("MatMul", [c, w], y)]
    assert liveness(_model([x], [y], over, [w])).peak_bytes == 3 * 20  # x, one buffer, y
    x, w = _value("x", 5), _weight("w", 5, 5)
    a, b, c, y = (_value(name, 5) for name in "abcy")
    first = _node("MatMul", [x, w], a)
    read = [first, _node("Mul", [a, a], b), _node("Sqrt", [b], c), _node("Add", [c, a], y)]
    assert liveness(_model([x], [y], read, [w])).peak_bytes == 4 * 20  # a lives beside b


def test_views_share_memory_and_keep_it_alive() -> None:
    x, w = _value("x", 6), _weight("w", 6, 6)
    shape = _weight("s", 2, dtype=DataType.INT64)
    a, v, b, y = _value("a", 6), _value("v", 2, 3), _value("b", 6), _value("y", 2, 3)
    nodes = [
        _node("MatMul", [x, w], a),
        _node("Reshape", [a, shape], v),
        _node("MatMul", [a, w], b),
        _node("Concat", [v, b], y),
    ]
    assert liveness(_model([x], [y], nodes, [w, shape])).peak_bytes == 4 * 24


def test_a_value_goes_when_nothing_reads_it_any_more() -> None:
    x, wide, narrow, square = (
        _value("x", 4), _weight("wide", 4, 8), _weight("narrow", 8, 4), _weight("square", 4, 4),
    )  # fmt: skip
    a, b, c, d, y = _value("a", 8), _value("b", 4), _value("c", 4), _value("d", 8), _value("y", 4)
    nodes = [
        _node("MatMul", [x, wide], a),
        _node("MatMul", [a, narrow], b),
        _node("MatMul", [b, square], c),
        _node("MatMul", [c, wide], d),
        _node("MatMul", [d, narrow], y),
    ]
    model = _model([x], [y], nodes, [wide, narrow, square])
    # alive at once: x and a and b; x and b and c; x and c and d; x and d and y
    assert liveness(model).peak_bytes == 16 + 32 + 16


def test_what_a_node_needs_inside_counts_while_it_runs() -> None:
    x, y = _value("x", 4), _value("y", 4)
    model = _model([x], [y], [_node("FastGelu", [x], y)])
    found = liveness(model, working=lambda node: 1000)
    assert (found.peak_bytes, found.working_bytes, found.at) == (1032, 1000, "make y")


def test_onnx_runtime_goes_depth_first_from_the_end() -> None:
    text, x, w = _value("text", 4), _value("x", 4), _weight("w", 4, 4)
    h, keys, y, more, z = (_value(n, 4) for n in ("h", "keys", "y", "more", "z"))
    nodes = [
        _node("MatMul", [x, w], h),
        _node("MatMul", [text, w], keys),
        _node("Add", [h, keys], y),
        _node("Relu", [text], more),
        _node("Add", [y, more], z),
    ]
    names = [node.name for node in run_order(_model([x, text], [z], nodes, [w]).graph)]
    assert names == ["make more", "make keys", "make h", "make y", "make z"]


def _scaled(op: str, codes: DataType) -> ir.Model:
    """x times a weight that is stored in `codes` and made float by `op`."""
    x, y, w = _value("x", 2, 8), _value("y", 2, 4), _value("w", 8, 4)
    stored = _weight("stored", 8, 4, dtype=codes)
    scale, zero = _weight("scale", 4), _weight("zero", 4, dtype=codes)
    rest = [] if op == "Cast" else [scale, zero]
    nodes = [_node(op, [stored, *rest], w), _node("MatMul", [x, w], y)]
    return _model([x], [y], nodes, [stored, *rest])


def test_loaders_fold_what_depends_on_weights_alone() -> None:
    half = _scaled("Cast", DataType.FLOAT16)
    assert stored_bytes(half) == 2 * 32
    assert kept_on_cpu(half).n_bytes == kept_on_gpu(half).n_bytes == 4 * 32
    eight = _scaled("DequantizeLinear", DataType.INT8)
    assert stored_bytes(eight) == 32 + 4 * 4 + 4
    assert kept_on_cpu(eight).n_bytes == stored_bytes(eight)
    assert kept_on_gpu(eight).n_bytes == 4 * 32  # MIGraphX: float again
    four = _scaled("DequantizeLinear", DataType.UINT4)
    assert kept_on_gpu(four).n_bytes == 16 + 4 * 4 + 2


def test_eight_bit_weights_stay_so_where_integers_are_multiplied() -> None:
    model = _scaled("DequantizeLinear", DataType.INT8)
    x, codes, rounded = (
        model.graph.inputs[0],
        _value("c", 2, 8, dtype=DataType.INT8),
        _value("r", 2, 8),
    )
    unit, zero = _weight("unit"), _weight("nought", dtype=DataType.INT8)
    product = model.graph[-1]
    model.graph.insert_before(
        product,
        [
            _node("QuantizeLinear", [x, unit, zero], codes),
            _node("DequantizeLinear", [codes, unit, zero], rounded),
        ],
    )
    for one in (unit, zero):
        model.graph.register_initializer(one)
    product.replace_input_with(0, rounded)
    assert kept_on_gpu(model).n_bytes == 32 + 4 * 4 + 4 + 4 + 1


def test_attention_counts_scores_by_heads_and_operations_by_width() -> None:
    q, k, v = _value("q", 1, 6, 8), _value("k", 1, 5, 8), _value("v", 1, 5, 8)
    node = _node("MultiHeadAttention", [q, k, v], _value("y", 1, 6, 8), num_heads=2)
    assert scores_bytes(node) == 4 * 2 * 6 * 5
    assert flops(node) == 2 * 2 * 6 * 5 * 8  # scores, and values weighed
    assert working_set(node) == 4 * (6 + 5 + 5) * 8
    bias = _value("b", 1, 2, 6, 5)
    biased = _node(
        "MultiHeadAttention", [q, k, v, None, None, bias], _value("z", 1, 6, 8), num_heads=2
    )
    assert working_set(biased) == working_set(node) + scores_bytes(biased)


def test_tables_that_rows_are_looked_up_in_stay_in_their_file() -> None:
    ids = _value("ids", 3, dtype=DataType.INT64)
    table, y = _weight("table", 1000, 8), _value("y", 3, 8)
    found = on_cpu(_model([ids], [y], [_node("Gather", [table, ids], y)], [table]))
    assert found.weight_bytes == 0
    assert found.value_bytes == 3 * 8 + 3 * 8 * 4


def test_a_value_without_a_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="has no static shape"):
        nbytes(ir.Value(name="x", type=ir.TensorType(DataType.FLOAT)))
    with pytest.raises(ValueError, match="has no element type"):
        nbytes(ir.Value(name="x", shape=ir.Shape([1])))
