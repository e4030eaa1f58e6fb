"""Every activation format: ONNX Runtime computes what torch says, with integers, on any token."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from hbxt_compress.formats.activations import ACTIVATIONS, Int8Tensor, Int8Token
from hbxt_compress.formats.int8 import Int8
from hbxt_compress.graph.builder import GraphBuilder
from hbxt_compress.graph.external import write_models
from hbxt_compress.graph.naming import name_everything
from hbxt_compress.graph.obeyed import check_component
from hbxt_compress.graph.parity import run_graph
from hbxt_compress.graph.passes import clean_up

_BYTES = {ir.DataType.FLOAT16: 2, ir.DataType.FLOAT: 4, ir.DataType.INT8: 1, ir.DataType.UINT8: 1}
_SHAPES = [((2, 5, 256), 48), ((1, 1, 67), 33), ((3, 67), 1), ((1, 7, 1), 5), ((2, 3, 4, 31), 17)]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _uneven(*shape: int, seed: int = 1) -> Tensor:
    """Gaussian tokens of very different sizes, so that a mix-up of steps shows."""
    size = 10 ** (2 * _normal(*shape[:-1], 1, seed=seed + 1))
    return _normal(*shape, seed=seed) * size.clamp(1e-2, 1e3)


def _payload(name: str, weight_OI: Tensor, x: Tensor) -> dict[str, Tensor]:
    payload = Int8().encode(weight_OI, weight_OI.abs().amax(1, keepdim=True) / 127)
    return {**payload, **ACTIVATIONS[name].payload(x.abs().flatten(0, -2).amax(0))}


def _model(
    name: str, payloads: Sequence[Mapping[str, Tensor]], x_shapes: Sequence[tuple[int, ...]]
) -> ir.Model:
    """A layer for each payload; layers of equal x_shapes read the same input; biases as Adds."""
    inputs = {
        shape: ir.Value(name=f"x{i}", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        for i, shape in enumerate(dict.fromkeys(x_shapes))
    }
    end = ir.node("Identity", [next(iter(inputs.values()))])
    graph = ir.Graph(list(inputs.values()), [], nodes=[end], opset_imports={"": 18}, name="main")
    builder = GraphBuilder(graph, end)
    for i, (payload, shape) in enumerate(zip(payloads, x_shapes, strict=True)):
        y = ACTIVATIONS[name].emit(builder, f"layer{i}", inputs[shape], payload)
        n_out = payload["codes"].shape[0]
        assert builder.shape_of(y) == (*shape[:-1], n_out)
        bias = builder.initializer(f"layer{i}.bias", torch.zeros(n_out))
        y = builder.node("Add", [y, bias], shape=builder.shape_of(y))
        y.name = f"y{i}"
        graph.outputs.append(y)
    graph.remove(end)
    model = ir.Model(graph, ir_version=10)
    clean_up(model)
    name_everything(model)
    return model


def _run(name: str, payload: Mapping[str, Tensor], x: Tensor, folder: Path) -> Tensor:
    write_models(folder, {"model.onnx": _model(name, [payload], [tuple(x.shape)])})
    return run_graph(folder / "model.onnx", {"x0": x})[0]


def _operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def _fused(folder: Path) -> Counter[str]:
    """Operators of what ONNX Runtime makes of the graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(folder / "model.onnx", options)
    proto = onnx.load(folder / "optimized.onnx", load_external_data=False)
    return Counter(node.op_type for node in proto.graph.node)


@pytest.mark.parametrize(("shape", "n_out"), _SHAPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_onnxruntime_multiplies_the_rounded_input_with_the_decoded_weight(
    name: str, shape: tuple[int, ...], n_out: int, tmp_path: Path
) -> None:
    x, weight = _uneven(*shape), _normal(n_out, shape[-1])
    payload = _payload(name, weight, x)
    got = _run(name, payload, x, tmp_path)
    rounded, decoded = ACTIVATIONS[name].apply(x, payload), Int8().decode(payload)
    expected = rounded.double() @ decoded.double().T
    # float32 sums of up to 256 products of either side, in units of what is summed.
    summed = rounded.double().abs() @ decoded.double().abs().T
    assert bool(((got - expected).abs() <= 1e-6 * summed).all())


@pytest.mark.parametrize(("shape", "n_out"), _SHAPES)
def test_a_token_times_a_channel_is_one_exact_integer_sum(
    shape: tuple[int, ...], n_out: int, tmp_path: Path
) -> None:
    """Element by element: only the last few float32 products may round."""
    x, weight = _uneven(*shape), _normal(n_out, shape[-1])
    payload = _payload("int8-token", weight, x)
    got = _run("int8-token", payload, x, tmp_path)
    step = x.abs().amax(-1, keepdim=True).numpy() * np.float32(1 / 127)
    codes = np.rint(x.numpy() / step).astype(np.int64)
    assert abs(codes).max() == 127
    sums = codes @ payload["codes"].numpy().astype(np.int64).T
    expected = sums * step.astype(np.float64) * payload["scales"].double().numpy()
    np.testing.assert_allclose(got.numpy(), expected, rtol=5e-7, atol=0)


def test_one_huge_token_leaves_the_others_alone(tmp_path: Path) -> None:
    x = _normal(1, 6, 128)
    payload = _payload("int8-token", _normal(32, 128, seed=2), x)
    alone = _run("int8-token", payload, x, tmp_path)
    x[0, 3] *= 1e20
    beside = _run("int8-token", payload, x, tmp_path)
    others = [0, 1, 2, 4, 5]
    torch.testing.assert_close(beside[:, others], alone[:, others], rtol=1e-6, atol=0)
    torch.testing.assert_close(beside[:, 3], alone[:, 3] * 1e20, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_zeros_and_nearly_zeros_give_zeros(name: str, tmp_path: Path) -> None:
    x = _normal(1, 4, 64)
    payload = _payload(name, _normal(8, 64, seed=3), x)
    x[0, 1] = 0
    x[0, 2] = 1e-8
    got = _run(name, payload, x, tmp_path)
    assert torch.equal(got[0, 1:3], torch.zeros(2, 8))
    assert bool(torch.isfinite(got).all())
    everywhere = _run(name, payload, torch.zeros_like(x), tmp_path)
    assert torch.equal(everywhere, torch.zeros(1, 4, 8))


def test_a_constant_token_is_exact(tmp_path: Path) -> None:
    weight = _normal(16, 96, seed=4)
    payload = _payload("int8-token", weight, weight)
    x = torch.tensor([3.7, -0.02]).reshape(1, 2, 1).expand(1, 2, 96).contiguous()
    got = _run("int8-token", payload, x, tmp_path)
    expected = x.double() @ Int8().decode(payload).double().T
    assert (got - expected).abs().max() <= 1e-6 * 3.7 * 96 * Int8().decode(payload).abs().max()


@pytest.mark.parametrize("n_in", [256, 1024, 8960])
def test_gaussian_tokens_lose_what_theory_says(n_in: int) -> None:
    """Noise is step^2 / 12 with the step set by each token's own largest value."""
    x = _uneven(512, n_in)
    weight = _normal(64, n_in, seed=5)
    decoded = Int8().decode(_payload("int8-token", weight, x))
    product, exact = Int8Token().apply(x) @ decoded.T, x.double() @ weight.double().T

    def lost_db(rounded: Tensor, whole: Tensor) -> float:
        noise = (rounded - whole.double()).square().mean(1) / whole.double().square().mean(1)
        return 10 * math.log10(float(noise.mean()))

    def theory(whole: Tensor) -> float:
        step = whole.double().abs().amax(1) / 127
        return float((step.square() / 12 / whole.double().square().mean(1)).mean())

    assert lost_db(Int8Token().apply(x), x) == pytest.approx(10 * math.log10(theory(x)), abs=0.05)
    assert lost_db(Int8Token().apply(x), x) <= -40
    both = 10 * math.log10(theory(x) + theory(weight))
    assert lost_db(product, exact) == pytest.approx(both, abs=0.2)


def test_token_steps_follow_the_token() -> None:
    x = _uneven(32, 80)
    rounded = Int8Token().apply(x)
    for factor in (2.0**-3, 2.0**9):  # exact in float32
        assert torch.equal(Int8Token().apply(x * factor), rounded * factor)
    assert torch.equal(Int8Token().apply(-x), -rounded)
    torch.testing.assert_close(rounded.abs().amax(1), x.abs().amax(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(Int8Token().apply(rounded), rounded, rtol=1e-6, atol=0)


def test_a_static_step_clips_what_calibration_never_saw(tmp_path: Path) -> None:
    fmt = Int8Tensor()
    payload = {
        **_payload("int8-tensor", torch.eye(4), torch.ones(1, 4)),
        **fmt.payload(torch.ones(4)),
    }
    x = torch.tensor([[0.5, -1.0, 5.0, -5.0]])
    expected = torch.tensor([[64 / 127, -1.0, 1.0, -128 / 127]])
    torch.testing.assert_close(fmt.apply(x, payload), expected)
    got = _run("int8-tensor", payload, x, tmp_path)
    torch.testing.assert_close(
        got, expected, rtol=1e-3, atol=0
    )  # the weight 1 is 127 float16 steps


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_layers_that_share_an_input_round_it_once(name: str, tmp_path: Path) -> None:
    x, other = _uneven(1, 9, 64), _uneven(1, 9, 32)
    payloads = [_payload(name, _normal(48, 64, seed=s), x) for s in range(3)]
    payloads.append(_payload(name, _normal(48, 32), other))
    shapes = [tuple(x.shape)] * 3 + [tuple(other.shape)]
    model = _model(name, payloads, shapes)
    assert _operators(model)["QuantizeLinear"] == 2
    assert _operators(model)["Abs"] == (2 if name == "int8-token" else 0)
    assert _operators(model)["MatMulInteger"] == (4 if name == "int8-token" else 0)
    write_models(tmp_path, {"model.onnx": model})
    got = run_graph(tmp_path / "model.onnx", {"x0": x, "x1": other})
    for y, payload, source in zip(got, payloads, (x, x, x, other), strict=True):
        expected = ACTIVATIONS[name].apply(source, payload) @ Int8().decode(payload).T
        # Row by row: the smallest token is five orders below the largest.
        assert bool(((y - expected).abs() <= 1e-5 * expected.abs().amax(-1, keepdim=True)).all())


def test_onnxruntime_keeps_to_integer_kernels_also_where_an_input_is_shared(
    tmp_path: Path,
) -> None:
    x = _uneven(1, 9, 64)
    payloads = [_payload("int8-token", _normal(48, 64, seed=s), x) for s in range(3)]
    model = _model("int8-token", payloads, [tuple(x.shape)] * 3)
    write_models(tmp_path, {"model.onnx": model})
    operators = _fused(tmp_path)
    assert operators["MatMulIntegerToFloat"] == 3
    assert not {"MatMul", "Gemm", "DequantizeLinear", "MatMulNBits"} & set(operators)


def test_onnxruntime_runs_a_static_layer_with_a_bias_on_integers(tmp_path: Path) -> None:
    x = _normal(1, 9, 64)
    payload = _payload("int8-tensor", _normal(48, 64), x)
    write_models(tmp_path, {"model.onnx": _model("int8-tensor", [payload], [tuple(x.shape)])})
    operators = _fused(tmp_path)
    assert operators["MatMulIntegerToFloat"] == 1
    assert not {"MatMul", "Gemm", "DequantizeLinear", "MatMulNBits"} & set(operators)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_graphs_obey_the_target_and_leave_the_codes_as_they_are(name: str, tmp_path: Path) -> None:
    x = _normal(1, 9, 80)
    payload = _payload(name, _normal(33, 80), x)
    before = {key: tensor.clone() for key, tensor in payload.items()}
    model = _model(name, [payload], [tuple(x.shape)])
    write_models(tmp_path, {"model.onnx": model})
    assert check_component(tmp_path) == ()
    assert all(torch.equal(payload[key], before[key]) for key in before)
    stored = model.graph.initializers["layer0.codes"].const_value
    assert stored is not None
    np.testing.assert_array_equal(stored.numpy(), payload["codes"].T.numpy())
    own = [
        value
        for key, value in model.graph.initializers.items()
        if key.startswith(("layer0.", "activation.times")) and not key.endswith("bias")
    ]
    n_bytes = sum(_BYTES[v.dtype] * math.prod(v.shape.numpy()) for v in own)
    assert n_bytes == Int8().bytes((33, 80)) + ACTIVATIONS[name].extra_bytes((33, 80))


def test_what_cannot_be_is_refused() -> None:
    payload = _payload("int8-token", _normal(4, 8), _normal(3, 8))
    for name in ACTIVATIONS:
        with pytest.raises(ValueError, match=r"layer0: .*\(1, 7\).* 8 input features"):
            _model(name, [{**payload, "input_step": torch.tensor(0.1)}], [(1, 7)])
    for absmax in (None, torch.tensor([1.0, math.nan]), torch.tensor([math.inf])):
        with pytest.raises(ValueError, match="calibrate"):
            Int8Tensor().payload(absmax)
    for step in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="input_step must be one positive number"):
            Int8Tensor().apply(torch.ones(2), {"input_step": torch.tensor(step)})


def test_each_format_is_known_by_its_name() -> None:
    assert list(ACTIVATIONS) == [fmt.name for fmt in ACTIVATIONS.values()]
    assert [fmt.name for fmt in ACTIVATIONS.values() if fmt.calibrated] == ["int8-tensor"]
    assert ACTIVATIONS["int8-token"].payload() == {}
