"""Every format: what it stores, what it claims to weigh, and that ONNX Runtime reads the same."""

from __future__ import annotations

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
from hbxt_compress.graph.parity import run_graph
from hbxt_compress.layers import LayerName, LayerSpec

_BYTES = {ir.DataType.FLOAT16: 2, ir.DataType.FLOAT: 4, ir.DataType.INT8: 1, ir.DataType.UINT8: 1}
_QUANTIZING = [name for name in FORMATS if not name.startswith("fp")]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _scales(fmt: WeightFormat, weight_OI: Tensor) -> Tensor:
    """Signed-max scales: negative for about half of the groups of int4."""
    if not isinstance(fmt, Int4):
        return (weight_OI.abs().amax(dim=1) / 127).half()
    grouped = weight_OI.reshape(weight_OI.shape[0], -1, fmt.group)
    at = grouped.abs().argmax(dim=2, keepdim=True)
    return (grouped.gather(2, at)[..., 0] / -8).half()


def _spec(shape: tuple[int, ...], kind: str = "linear") -> LayerSpec:
    return LayerSpec(
        name=LayerName("transformer/x"), kind=kind, shape=shape, dtype="float32", block=None
    )


def _model(fmt: WeightFormat, payload: dict[str, Tensor], x_shape: tuple[int, ...], n_out: int):
    x = ir.Value(name="x", shape=ir.Shape(x_shape), type=ir.TensorType(ir.DataType.FLOAT))
    end = ir.node("Identity", [x])
    graph = ir.Graph([x], [], nodes=[end], opset_imports={"": 18, "com.microsoft": 1}, name="main")
    y = fmt.emit(GraphBuilder(graph, end), "layer", x, payload)
    graph.remove(end)
    y.name = "y"
    assert list(y.shape) == [*x_shape[:-1], n_out]
    graph.outputs.append(y)
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(("n_out", "n_in"), [(48, 256), (33, 128), (1, 384)])
@pytest.mark.parametrize("name", FORMATS)
def test_onnxruntime_multiplies_with_the_decoded_weight(
    name: str, n_out: int, n_in: int, tmp_path: Path
) -> None:
    fmt = FORMATS[name]
    weight = _normal(n_out, n_in)
    payload = fmt.encode(weight, _scales(fmt, weight))
    x = _normal(2, 5, n_in, seed=1)
    model = _model(fmt, dict(payload), tuple(x.shape), n_out)
    write_models(tmp_path, {"model.onnx": model})
    (got,) = run_graph(tmp_path / "model.onnx", {"x": x})
    expected = x @ fmt.decode(payload).T
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    stored = sum(
        _BYTES[v.dtype] * int(np.prod(list(v.shape))) for v in model.graph.initializers.values()
    )
    assert fmt.bytes((n_out, n_in)) == stored


@pytest.mark.parametrize("name", _QUANTIZING)
def test_encode_takes_the_nearest_code(name: str) -> None:
    fmt = FORMATS[name]
    weight = _normal(16, 256, seed=2)
    scales = _scales(fmt, weight)
    payload = fmt.encode(weight, scales)
    step = scales.float().reshape(16, -1)
    step = step.repeat_interleave(256 // step.shape[1], dim=1).abs()
    error = (weight - fmt.decode(payload)).abs()
    # Half a step, but for what float16 scales and the short positive end of int4 clip away.
    inside = weight.abs() < step * (7 if name.startswith("int4") else 126)
    assert bool((error[inside] <= step[inside] / 2 + 1e-6).all())
    again = fmt.encode(fmt.decode(payload), scales)
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


def test_int4_refuses_a_group_that_does_not_divide_and_names_the_remedy() -> None:
    assert FORMATS["int4-g128"].fits(_spec((8, 256))) is None
    assert "int4-g64" in (FORMATS["int4-g128"].fits(_spec((8, 192))) or "")
    assert "int8-channel" in (FORMATS["int4-g128"].fits(_spec((8, 200))) or "")
    assert "200" in (FORMATS["int4-g128"].fits(_spec((8, 200))) or "")
    with pytest.raises(ValueError, match="powers of two"):
        Int4(group=24)


@pytest.mark.parametrize("kind", ["conv2d", "conv3d", "embedding"])
@pytest.mark.parametrize("name", FORMATS)
def test_only_plain_formats_take_convolutions_and_tables(name: str, kind: str) -> None:
    reason = FORMATS[name].fits(_spec((8, 128, 3, 3), kind))
    assert (reason is None) == name.startswith("fp")
    assert reason is None or kind in reason


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
