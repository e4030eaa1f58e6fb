"""Every format: what it stores, what it claims to weigh, and that ONNX Runtime reads the same."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from hbxt_compress.formats import FORMATS, WeightFormat
from hbxt_compress.formats.int4 import Int4
from hbxt_compress.graph.builder import GraphBuilder
from hbxt_compress.graph.external import write_models
from hbxt_compress.graph.naming import name_everything
from hbxt_compress.graph.obeyed import check_component
from hbxt_compress.graph.parity import run_graph
from hbxt_compress.graph.passes import clean_up
from hbxt_compress.layers import LayerName, LayerSpec

Add = Callable[[GraphBuilder, ir.Value], ir.Value]
_BYTES = {ir.DataType.FLOAT16: 2, ir.DataType.FLOAT: 4, ir.DataType.INT8: 1, ir.DataType.UINT8: 1}
_QUANTIZING = [name for name in FORMATS if not name.startswith("fp")]
_LOOKED_UP_ONLY = [name for name in FORMATS if "-row" in name]
_TABLES = ["fp16", "fp32", *_LOOKED_UP_ONLY]
_MULTIPLIED = [name for name in FORMATS if name not in _LOOKED_UP_ONLY]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _random(fmt: WeightFormat, n_out: int, n_in: int, seed: int = 0) -> dict[str, Tensor]:
    """A payload of random levels; scales of both signs, zeros that include both ends."""
    generator = torch.Generator().manual_seed(seed)

    def whole(*shape: int) -> Tensor:
        below, above = fmt.n_levels
        return torch.randint(-below, above + 1, shape, generator=generator)

    if not any(fmt.n_levels):
        return dict(fmt.encode(_normal(n_out, n_in, seed=seed), torch.ones(())))
    n_groups = n_in // (fmt.group or n_in)
    scales = torch.rand(n_out, n_groups, generator=generator) + 0.5
    if not fmt.asymmetric:
        scales *= torch.randn(n_out, n_groups, generator=generator).sign()
    zeros = None
    if fmt.asymmetric:
        zeros = whole(n_out, n_groups)
        zeros[0, 0], zeros[-1, -1] = -fmt.n_levels[0], fmt.n_levels[1]
    low_rank = None
    if fmt.rank:
        shapes = (fmt.rank, n_in), (n_out, fmt.rank)
        down, up = (torch.randn(shape, generator=generator) for shape in shapes)
        low_rank = down.half(), up.half()
    levels = whole(n_out, n_in)
    return dict(fmt.store(levels, scales.half(), zeros, low_rank=low_rank))


def _scales(fmt: WeightFormat, weight_OI: Tensor) -> Tensor:
    """Signed-max scales: negative for about half of the groups of symmetric int4."""
    if fmt.group is None:
        return (weight_OI.abs().amax(dim=1, keepdim=True) / 127).half()
    grouped = weight_OI.reshape(weight_OI.shape[0], -1, fmt.group)
    at = grouped.abs().argmax(dim=2, keepdim=True)
    signed = (grouped.gather(2, at)[..., 0] / -8).half()
    return signed.abs() if fmt.asymmetric else signed


def _spec(shape: tuple[int, ...], kind: str = "linear") -> LayerSpec:
    return LayerSpec(
        name=LayerName("transformer/x"), kind=kind, shape=shape, dtype="float32", block=None
    )


def _graph(x_shape: tuple[int, ...], dtype: ir.DataType, add: Add) -> ir.Model:
    """The model whose only output y is what `add` returns, given x."""
    x = ir.Value(name="x", shape=ir.Shape(x_shape), type=ir.TensorType(dtype))
    end = ir.node("Identity", [x])
    graph = ir.Graph([x], [], nodes=[end], opset_imports={"": 18, "com.microsoft": 1}, name="main")
    y = add(GraphBuilder(graph, end), x)
    graph.remove(end)
    y.name = "y"
    graph.outputs.append(y)
    return ir.Model(graph, ir_version=10)


def _model(fmt: WeightFormat, payload: dict[str, Tensor], x_shape: tuple[int, ...], n_out: int):
    model = _graph(
        x_shape, ir.DataType.FLOAT, lambda builder, x: fmt.emit(builder, "layer", x, payload)
    )
    assert list(model.graph.outputs[0].shape) == [*x_shape[:-1], n_out]
    return model


def _stored_bytes(model: ir.Model) -> int:
    """Of initializers of the layer's name, `layer.codes`; constants are called `layer/...`."""
    return sum(
        _BYTES[v.dtype] * int(np.prod(list(v.shape)))
        for name, v in model.graph.initializers.items()
        if name.startswith("layer.")
    )


@pytest.mark.parametrize(("n_out", "n_in"), [(64, 256), (33, 128), (1, 384)])
@pytest.mark.parametrize("name", _MULTIPLIED)
def test_onnxruntime_multiplies_with_the_decoded_weight(
    name: str, n_out: int, n_in: int, tmp_path: Path
) -> None:
    """384 inputs are 3, 6 or 12 blocks: rows of an odd number are padded in the zero points."""
    fmt = FORMATS[name]
    payload = _random(fmt, n_out, n_in)
    x = _normal(2, 5, n_in, seed=1)
    model = _model(fmt, payload, tuple(x.shape), n_out)
    write_models(tmp_path, {"model.onnx": model})
    (got,) = run_graph(tmp_path / "model.onnx", {"x": x})
    expected = x.double() @ fmt.decode(payload).double().T
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert fmt.bytes((n_out, n_in)) == _stored_bytes(model)


@pytest.mark.parametrize("name", FORMATS)
def test_the_graph_of_every_format_obeys_the_target(name: str, tmp_path: Path) -> None:
    fmt = FORMATS[name]
    payload = _random(fmt, 33, 384)
    if name in _LOOKED_UP_ONLY:
        model = _looked_up(fmt, payload, (2, 5), 384)
    else:
        model = _model(fmt, payload, (2, 5, 384), 33)
    clean_up(model)
    name_everything(model)
    write_models(tmp_path, {"model.onnx": model})
    assert check_component(tmp_path) == ()


@pytest.mark.parametrize("name", _QUANTIZING)
def test_what_is_stored_is_decoded_by_the_formula(name: str) -> None:
    """w = (level - zero) * scale + up @ down, one weight at a time."""
    fmt = FORMATS[name]
    generator = torch.Generator().manual_seed(6)
    below, above = fmt.n_levels
    n_groups = 256 // (fmt.group or 256)
    levels = torch.randint(-below, above + 1, (3, 256), generator=generator)
    scales = torch.randn(3, n_groups, generator=generator).half()
    zeros = torch.randint(-below, above + 1, (3, n_groups), generator=generator)
    down, up = _normal(fmt.rank, 256).half(), _normal(3, fmt.rank).half()
    payload = fmt.store(
        levels.double(),  # any dtype, as long as they are whole
        scales.float(),
        zeros.float() if fmt.asymmetric else None,
        low_rank=(down, up) if fmt.rank else None,
    )
    decoded = fmt.decode(payload)
    assert decoded.dtype == torch.float32
    for o, i in itertools.product(range(3), range(0, 256, 17)):
        g = i // (fmt.group or 256)
        zero = int(zeros[o, g]) if fmt.asymmetric else 0
        value = (int(levels[o, i]) - zero) * float(scales[o, g])
        value += float(up[o].double() @ down[:, i].double())
        assert float(decoded[o, i]) == pytest.approx(value, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", _QUANTIZING)
def test_store_refuses_what_it_cannot_hold(name: str) -> None:
    fmt = FORMATS[name]
    scales = torch.ones(2, 128 // (fmt.group or 128)).half()
    low_rank = (torch.zeros(fmt.rank, 128), torch.zeros(2, fmt.rank)) if fmt.rank else None
    levels = torch.zeros(2, 128)
    fmt.store(levels, scales, low_rank=low_rank)
    below, above = fmt.n_levels
    for wrong in (above + 1.0, -below - 1.0, 0.5, math.nan):
        broken = levels.clone()
        broken[1, 7] = wrong
        with pytest.raises(ValueError, match=f"-{below} to {above}"):
            fmt.store(broken, scales, low_rank=low_rank)
    if not fmt.asymmetric:
        with pytest.raises(ValueError, match="no room for zero points"):
            fmt.store(levels, scales, torch.ones_like(scales), low_rank=low_rank)
    other = None if fmt.rank else (torch.zeros(16, 128), torch.zeros(2, 16))
    with pytest.raises(ValueError, match=r"factors|low-rank"):
        fmt.store(levels, scales, low_rank=other)


def test_plain_formats_have_no_levels() -> None:
    with pytest.raises(ValueError, match="fp16 has no levels"):
        FORMATS["fp16"].store(torch.zeros(2, 128), torch.ones(2, 1))


@pytest.mark.parametrize("name", _QUANTIZING)
def test_encode_takes_the_nearest_level(name: str) -> None:
    fmt = FORMATS[name]
    weight = _normal(16, 256, seed=2)
    scales = _scales(fmt, weight)
    zeros = None
    if fmt.asymmetric:
        zeros = torch.randint(-3, 4, scales.shape, generator=torch.Generator().manual_seed(3))
    payload = fmt.encode(weight, scales, zeros)
    size = fmt.group or 256
    step = scales.float().repeat_interleave(size, dim=1)
    shift = torch.zeros_like(step) if zeros is None else zeros.repeat_interleave(size, dim=1)
    below, above = fmt.n_levels
    every = torch.stack([(level - shift) * step for level in range(-below, above + 1)])
    least = (every - weight).abs().amin(0)
    torch.testing.assert_close((weight - fmt.decode(payload)).abs(), least, rtol=0, atol=1e-6)
    again = fmt.encode(fmt.decode(payload), scales, zeros)
    assert all(torch.equal(again[key], payload[key]) for key in payload)


def test_a_negative_scale_puts_the_largest_weight_on_the_wide_end() -> None:
    weight = torch.zeros(1, 128)
    weight[0, :3] = torch.tensor([8.0, -7.0, 1.0])
    payload = Int4(group=128).encode(weight, torch.tensor([[-1.0]]))
    assert payload["codes"][0, :3].tolist() == [0, 15, 7]
    assert torch.equal(Int4(group=128).decode(payload), weight)


def test_a_group_of_zeros_under_a_zero_scale_stays_zero() -> None:
    for fmt, scales in (
        (Int4(group=32), torch.zeros(2, 2)),
        (FORMATS["int8-channel"], torch.zeros(2)),
    ):
        payload = fmt.encode(torch.zeros(2, 64), scales)
        assert torch.equal(fmt.decode(payload), torch.zeros(2, 64))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_packing_keeps_the_first_code_in_the_low_bits_and_unpacks_exactly(group: int) -> None:
    codes = torch.randint(16, (7, 256), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    fmt = Int4(group=group)
    packed = fmt.pack({"codes": codes})
    assert packed.shape == (7, 256 // group, group // 2)
    assert packed.dtype == torch.uint8
    assert int(packed[0, 0, 0]) == int(codes[0, 0]) + 16 * int(codes[0, 1])
    assert torch.equal(fmt.unpack(packed), codes)


def test_zero_points_are_packed_two_a_byte_and_each_row_is_padded_with_the_default() -> None:
    fmt = Int4(group=32, asymmetric=True)
    zeros = torch.tensor([[-8.0, 7.0, 1.0], [0.0, -1.0, 7.0]])
    payload = fmt.store(torch.zeros(2, 96), torch.ones(2, 3), zeros)
    assert payload["zeros"].tolist() == [[0, 15, 9], [8, 7, 15]]
    packed = fmt.pack_zeros(payload)
    assert packed.tolist() == [0 + 16 * 15, 9 + 16 * 8, 8 + 16 * 7, 15 + 16 * 8]
    assert packed.dtype == torch.uint8


def test_names_say_what_is_stored() -> None:
    assert FORMATS.keys() >= {"int4-g128", "int4-g64-asym", "int4-g64-r16", "int4-g32-asym-r32"}
    for name, fmt in FORMATS.items():
        assert fmt.name == name
        assert fmt.asymmetric == ("asym" in name)
        rank = re.search(r"-r(\d+)", name)
        assert fmt.rank == (int(rank[1]) if rank else 0)


def test_bits_a_weight_of_a_large_layer() -> None:
    """Codes 4, scales 16 a group, zeros 4 a group, factors 16 R (1 / O + 1 / I)."""
    expected = {"int4-g64": 4.25, "int4-g64-asym": 4.3125, "int4-g128-asym": 4.15625}
    expected |= {"int4-g64-r32": 4.25 + 0.25, "int8-channel": 8 + 24 / 4096, "fp16": 16}
    expected |= {"int8-row": 8 + 16 / 4096, "int4-row-g128": 4.125}
    for name, bits in expected.items():
        assert FORMATS[name].bytes((4096, 4096)) * 8 / 4096**2 == bits


def test_int4_refuses_a_group_that_does_not_divide_and_names_the_remedy() -> None:
    assert FORMATS["int4-g128"].fits(_spec((8, 256))) is None
    assert "int4-g64" in (FORMATS["int4-g128"].fits(_spec((8, 192))) or "")
    assert "int8-channel" in (FORMATS["int4-g128"].fits(_spec((8, 200))) or "")
    assert "200" in (FORMATS["int4-g128"].fits(_spec((8, 200))) or "")
    with pytest.raises(ValueError, match="powers of two"):
        Int4(group=24)


def test_a_branch_must_be_small_against_the_weight() -> None:
    fmt = FORMATS["int4-g64-asym-r16"]
    assert fmt.fits(_spec((65, 128))) is None
    for shape in ((64, 128), (512, 64)):
        reason = fmt.fits(_spec(shape)) or ""
        assert "rank 16" in reason
        assert reason.endswith("use int4-g64-asym")


@pytest.mark.parametrize("kind", ["conv2d", "conv3d", "embedding"])
@pytest.mark.parametrize("name", FORMATS)
def test_who_takes_convolutions_and_tables(name: str, kind: str) -> None:
    """Plain formats take everything, int8-channel also convolutions, int4 only linears.

    -row formats take tables, no others do.
    """
    reason = FORMATS[name].fits(_spec((8, 128, 3, 3), kind))
    takes = name.startswith("fp") or (name == "int8-channel" and kind != "embedding")
    takes |= "-row" in name and kind == "embedding"
    assert (reason is None) == takes
    assert reason is None or kind in reason
    if kind == "embedding" and not takes:
        remedy = re.search(r"use (.*)$", reason or "")
        assert remedy is not None
        assert FORMATS[remedy[1]].fits(_spec((8, 128), kind)) is None


@pytest.mark.parametrize("name", _LOOKED_UP_ONLY)
def test_tables_are_for_looking_up(name: str) -> None:
    fmt, linear = FORMATS[name], _spec((8, 128))
    assert "a linear" in (fmt.fits(linear) or "")
    with pytest.raises(ValueError, match=f"layer: {name} .*looked up"):
        _model(fmt, _random(fmt, 8, 128), (1, 128), 8)
    reason = fmt.fits(_spec((8, 100), "embedding"))
    assert (reason is None) == (fmt.group is None)
    assert reason is None or reason.endswith(
        f"100 features are not a multiple of {fmt.group}: use int8-row"
    )


def _looked_up(
    fmt: WeightFormat, payload: dict[str, Tensor], shape: tuple[int, ...], n_in: int
) -> ir.Model:
    model = _graph(
        shape, ir.DataType.INT64, lambda builder, ids: fmt.rows(builder, "layer", ids, payload)
    )
    assert list(model.graph.outputs[0].shape) == [*shape, n_in]
    return model


@pytest.mark.parametrize("shape", [(7,), (1, 12), (2, 3, 2)])
@pytest.mark.parametrize("name", _TABLES)
def test_onnxruntime_looks_up_the_decoded_rows(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """To the bit; in the table as it is stored: nothing but the rows that are found is decoded."""
    fmt, payload = FORMATS[name], _random(FORMATS[name], 33, 384)
    ids = torch.randint(33, shape, generator=torch.Generator().manual_seed(3))
    ids.flatten()[:2] = torch.tensor([0, 32])
    model = _looked_up(fmt, payload, shape, 384)
    assert fmt.bytes((33, 384)) == _stored_bytes(model)
    for node in model.graph:
        if any(value.name.startswith("layer.") for value in node.inputs if value.name):
            assert node.op_type == "Gather"
    write_models(tmp_path, {"model.onnx": model})
    (got,) = run_graph(tmp_path / "model.onnx", {"x": ids})
    assert torch.equal(got, torch.nn.functional.embedding(ids, fmt.decode(payload)))


@pytest.mark.parametrize("name", _TABLES)
def test_a_small_table_is_decoded_whole(name: str, tmp_path: Path) -> None:
    fmt, payload = FORMATS[name], _random(FORMATS[name], 6, 128)

    def add(builder: GraphBuilder, ids: ir.Value) -> ir.Value:
        weight = fmt.weight(builder, "layer", payload, (6, 128))
        assert builder.shape_of(weight) == (6, 128)
        return builder.node("Gather", [weight, ids], shape=(1, 9, 128))

    model = _graph((1, 9), ir.DataType.INT64, add)
    assert fmt.bytes((6, 128)) == _stored_bytes(model)
    write_models(tmp_path, {"model.onnx": model})
    ids = torch.arange(9).remainder(6)[None]
    (got,) = run_graph(tmp_path / "model.onnx", {"x": ids})
    assert torch.equal(got, fmt.decode(payload)[ids])


@pytest.mark.parametrize("name", _TABLES)
def test_a_part_of_a_table_is_stored_as_that_part(name: str) -> None:
    """Rows of the payload give those rows of every matrix, and decode to those of the table."""
    fmt, payload = FORMATS[name], _random(FORMATS[name], 12, 128)
    part = {key: tensor[3:8] for key, tensor in payload.items()}
    assert torch.equal(fmt.decode(part), fmt.decode(payload)[3:8])
    whole, some = (_looked_up(fmt, one, (1, 2), 128).graph.initializers for one in (payload, part))
    assert whole.keys() == some.keys()
    for key in whole:
        expected, got = (values[key].const_value.numpy() for values in (whole, some))
        assert np.array_equal(got, expected[3:8] if key.startswith("layer.") else expected)


@pytest.mark.parametrize("name", [n for n in FORMATS if n not in _TABLES])
def test_other_formats_look_nothing_up(name: str) -> None:
    with pytest.raises(ValueError, match=f"layer: {name} stores no tables"):
        _looked_up(FORMATS[name], _random(FORMATS[name], 8, 128), (1, 2), 128)


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (8, 6, 1, 1), (7, 4, 3, 1, 3)])
@pytest.mark.parametrize("name", ["fp16", "fp32", "int8-channel"])
def test_onnxruntime_convolves_with_the_decoded_weight(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    fmt = FORMATS[name]
    weight = _normal(*shape)
    payload = fmt.encode(weight, weight.flatten(1).abs().amax(1, keepdim=True) / 127)
    decoded = fmt.decode(payload).reshape(shape)
    assert (decoded - weight).abs().max() < 0.02
    x_shape = (2, shape[1], *[6] * (len(shape) - 2))
    x = ir.Value(name="x", shape=ir.Shape(x_shape), type=ir.TensorType(ir.DataType.FLOAT))
    end = ir.node("Identity", [x])
    graph = ir.Graph([x], [], nodes=[end], opset_imports={"": 18}, name="main")
    builder = GraphBuilder(graph, end)
    stored = fmt.weight(builder, "layer", payload, shape)
    assert builder.shape_of(stored) == shape
    given = _normal(*x_shape, seed=1)
    convolve = torch.nn.functional.conv2d if len(shape) == 4 else torch.nn.functional.conv3d
    expected = convolve(given, decoded)
    y = builder.node("Conv", [x, stored], shape=tuple(expected.shape))
    graph.remove(end)
    y.name = "y"
    graph.outputs.append(y)
    model = ir.Model(graph, ir_version=10)
    write_models(tmp_path, {"model.onnx": model})
    (got,) = run_graph(tmp_path / "model.onnx", {"x": given})
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert fmt.bytes(shape) == _stored_bytes(model)


def test_int4_has_no_weight_without_its_multiplication() -> None:
    fmt = FORMATS["int4-g64"]
    payload = _random(fmt, 4, 64)
    graph = ir.Graph([], [], nodes=[end := ir.node("Identity", [])], name="main")
    with pytest.raises(ValueError, match="only linear weights"):
        fmt.weight(GraphBuilder(graph, end), "layer", payload, (4, 64))


def test_the_int8_kernel_rounds_activations_unless_told_not_to(tmp_path: Path) -> None:
    """Why manifests carry SESSION_OPTIONS: onnxruntime's default is not what we quantized for."""
    fmt = FORMATS["int8-channel"]
    weight = _normal(64, 256)
    payload = fmt.encode(weight, _scales(fmt, weight))
    x = _normal(1, 16, 256, seed=4)
    write_models(tmp_path, {"model.onnx": _model(fmt, dict(payload), tuple(x.shape), 64)})
    expected = x @ fmt.decode(payload).T
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    default = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    (ours,) = run_graph(tmp_path / "model.onnx", {"x": x})
    assert (ours - expected).abs().max() < 1e-4
    if onnxruntime.__version__ >= "1.27":
        assert (default - expected).abs().max() > 1e-2
