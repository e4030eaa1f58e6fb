"""Student: it computes what its codes stand for, and only what is not a weight may move."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hbxt_compress.algorithms.scales import search_scales
from hbxt_compress.algorithms.transform import Transform
from hbxt_compress.formats import FORMATS
from hbxt_compress.layers import LayerName
from hbxt_compress.models import family_of
from hbxt_compress.quantized import Loss, QuantizedModel, QuantizedWeight, save_block
from hbxt_compress.stages.student import QuantizedLinear, free_parameters, make_student, tuned
from hbxt_compress.stages.walk import effective_weight, set_weights
from tests.observed import source_of

_FMTS = ["int8-channel", "int4-g64", "int4-g32-asym", "int4-g64-r16"]
_TRANSFORMS = ["none", "scale", "scale and rotation"]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _transform(kind: str, n_in: int) -> Transform:
    if kind == "none":
        return Transform()
    return Transform.scaling(_normal(n_in, seed=9).exp(), block=64 * ("rotation" in kind))


def _quantized(
    weight_OI: Tensor, name: str, kind: str = "none", bias_O: Tensor | None = None
) -> QuantizedWeight:
    fmt, transform = FORMATS[name], _transform(kind, weight_OI.shape[1])
    within = transform.weight(weight_OI)
    grid, low_rank = search_scales(within, fmt), None
    if fmt.rank:
        n_out, n_in = weight_OI.shape
        low_rank = 0.1 * _normal(fmt.rank, n_in, seed=5), 0.1 * _normal(n_out, fmt.rank, seed=6)
    payload = fmt.store(grid.levels(within), grid.scales_OG, grid.zeros_OG, low_rank=low_rank)
    return QuantizedWeight(
        format=name,
        payload={**payload, **transform.payload()},
        shape=tuple(weight_OI.shape),
        loss=Loss(error=0.01),
        bias_O=bias_O,
    )


def _shaken(layer: QuantizedLinear, size: float = 0.1) -> QuantizedLinear:
    """With every parameter moved."""
    for i, p in enumerate(layer.parameters()):
        p.data += size * _normal(*p.shape, seed=20 + i)
    return layer


@pytest.mark.parametrize("kind", _TRANSFORMS)
@pytest.mark.parametrize("name", _FMTS)
def test_it_computes_what_the_stored_layer_computes(name: str, kind: str) -> None:
    """Against the graph's order of operations: transform the input, multiply, add the branch."""
    bias, x = _normal(96, seed=3), _normal(7, 128, seed=4)
    weight = _quantized(_normal(96, 128), name, kind, bias)
    layer = QuantizedLinear(weight, bias)
    assert torch.equal(layer(x), F.linear(x, effective_weight(weight), bias))
    moved = _transform(kind, 128).apply(x.double())
    expected = moved @ FORMATS[name].decode(weight.payload).double().T + bias.double()
    assert (layer(x) - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("kind", _TRANSFORMS)
@pytest.mark.parametrize("name", _FMTS)
def test_gradients_match_finite_differences(name: str, kind: str) -> None:
    """Of every gain, and of some entries of factors and bias."""
    weight, x = _quantized(_normal(72, 128), name, kind, _normal(72)), _normal(5, 128, seed=4)
    layer = _shaken(QuantizedLinear(weight, weight.bias_O), 0.05)
    down = _normal(5, 72, seed=7).double()

    @torch.no_grad()
    def exact() -> float:  # float32 sums would drown the small differences
        out = x.double() @ layer.weight.double().T
        return float(((out if layer.bias is None else out + layer.bias.double()) * down).sum())

    (layer(x).double() * down).sum().backward()
    for p in layer.parameters():
        assert p.grad is not None
        flat, grad = p.data.view(-1), p.grad.view(-1)
        largest = float(grad.abs().max())
        assert largest > 0
        for i in range(0, len(flat), max(1, len(flat) // 40)):
            before, sides = float(flat[i]), []
            for step in (1e-2, -1e-2):
                flat[i] = before + step
                sides.append(exact())
            flat[i] = before
            slope = (sides[0] - sides[1]) / 2e-2
            assert slope == pytest.approx(float(grad[i]), rel=2e-4, abs=2e-4 * largest)


@pytest.mark.parametrize("name", _FMTS)
def test_nothing_tuned_is_stored_as_it_was(name: str) -> None:
    weight = _quantized(_normal(96, 128), name, "scale and rotation")
    stored = QuantizedLinear(weight, None).snapped()
    assert stored.bias_O is None
    assert stored.payload.keys() == weight.payload.keys()
    for key, tensor in weight.payload.items():
        assert stored.payload[key].dtype == tensor.dtype
        assert torch.equal(stored.payload[key], tensor)


@pytest.mark.parametrize("name", _FMTS)
def test_what_is_tuned_is_stored_in_float16_beside_the_same_codes(name: str) -> None:
    weight = _quantized(_normal(96, 128), name, "scale", _normal(96))
    layer = _shaken(QuantizedLinear(weight, weight.bias_O))
    stored = layer.snapped()
    for key, tensor in weight.payload.items():
        tunes = key in ("scales", "down", "up")
        assert stored.payload[key].dtype == tensor.dtype
        assert torch.equal(stored.payload[key], tensor) is not tunes, key
    gain = layer.gain_OG.detach().double().exp()
    expected = weight.payload["scales"].double() * gain
    assert torch.allclose(stored.payload["scales"].double(), expected, rtol=2**-10)
    assert stored.payload["scales"].dtype == torch.float16
    assert stored.bias_O is not None
    assert torch.equal(stored.bias_O, layer.bias)
    assert stored.bias_O.dtype == torch.float32
    difference = effective_weight(stored) - layer.weight
    assert difference.abs().max() < 2**-9 * layer.weight.abs().max()


def test_scales_that_float16_cannot_hold_stay_as_they_were() -> None:
    weight = _quantized(_normal(6, 128), "int4-g64")
    weight.payload["scales"][5] = 0  # a group of zeros
    layer = QuantizedLinear(weight, None)
    layer.gain_OG.data[0], layer.gain_OG.data[1], layer.gain_OG.data[2] = 100.0, -100.0, torch.nan
    stored = layer.snapped().payload["scales"]
    assert torch.equal(stored, weight.payload["scales"])


@pytest.mark.parametrize("kind", _TRANSFORMS)
@pytest.mark.parametrize("name", ["int4-g64", "int4-g32-asym", "int4-g64-r16"])
def test_thawed_codes_pass_on_the_gradient_of_the_code_they_are_nearest_to(
    name: str, kind: str
) -> None:
    """Every code is a number of its own: the slope is that of the layer in which it is one."""
    weight, x = _quantized(_normal(48, 64), name, kind), _normal(5, 64, seed=4)
    layer, down = QuantizedLinear(weight, None), _normal(5, 48, seed=7)
    before = layer(x)
    codes_OI = layer.thaw()
    assert codes_OI is not None
    assert layer.thaw() is codes_OI
    codes_OI.data += 0.98 * (torch.rand(48, 64, generator=torch.Generator().manual_seed(1)) - 0.5)
    assert torch.equal(layer(x), before)
    (layer(x) * down).sum().backward()
    fmt, whole_OI = FORMATS[name], weight.payload["codes"].float().requires_grad_()
    decoded = fmt.decode({**weight.payload, "codes": whole_OI})
    (F.linear(x, _transform(kind, 64).undo(decoded)) * down).sum().backward()
    assert codes_OI.grad is not None
    assert whole_OI.grad is not None
    torch.testing.assert_close(codes_OI.grad, whole_OI.grad)


def test_thawed_codes_stay_in_range_and_are_stored_as_what_they_are_nearest_to() -> None:
    weight = _quantized(_normal(48, 64), "int4-g64")
    layer = QuantizedLinear(weight, None)
    codes_OI = layer.thaw()
    assert codes_OI is not None
    codes_OI.data += 3 * _normal(48, 64, seed=2)
    stored = layer.snapped()
    assert stored.payload["codes"].dtype == torch.uint8
    expected = codes_OI.detach().round().clamp(0, 15)
    assert torch.equal(stored.payload["codes"].float(), expected)
    assert float((codes_OI < 0).float().mean()) > 0.01
    assert torch.equal(effective_weight(stored), layer.weight)


def test_codes_of_8_bits_are_never_thawed() -> None:
    layer = QuantizedLinear(_quantized(_normal(48, 64), "int8-channel"), None)
    assert layer.thaw() is None
    assert free_parameters(nn.Sequential(layer), codes=True)["codes"] == []


@pytest.fixture(scope="module")
def module(micro_wan: Path) -> nn.Module:
    source = source_of(micro_wan)
    return family_of(source).load(source, "transformer")


@pytest.fixture(scope="module")
def weights(module: nn.Module) -> dict[LayerName, QuantizedWeight]:
    """Every linear of the blocks, in all formats and under all transforms."""
    linears = {
        name: layer for name, layer in module.blocks.named_modules() if isinstance(layer, nn.Linear)
    }
    return {
        LayerName(f"transformer/blocks.{name}"): _quantized(
            layer.weight.data,
            _FMTS[i % len(_FMTS)],
            _TRANSFORMS[i % len(_TRANSFORMS)],
            None if i % 3 else layer.bias.data + 0.01,
        )
        for i, (name, layer) in enumerate(linears.items())
    }


def _velocity(module: nn.Module) -> Tensor:
    inputs = _normal(1, 4, 2, 4, 4), torch.tensor([500.0]), _normal(1, 16, 128, seed=1)
    with torch.no_grad():
        return module(*inputs, return_dict=False)[0]


def test_the_student_is_the_model_with_its_quantized_weights_in_it(
    module: nn.Module, weights: dict[LayerName, QuantizedWeight]
) -> None:
    expected, kept = _velocity(module), {n: p.clone() for n, p in module.named_parameters()}
    other = {LayerName("text_encoder/blocks.0"): next(iter(weights.values()))}
    student = make_student(module, "transformer", {**weights, **other})
    assert all(torch.equal(p, kept[n]) for n, p in module.named_parameters())
    assert torch.equal(_velocity(module), expected)
    assert not any(p.requires_grad for p in student.parameters())
    assert sum(isinstance(m, QuantizedLinear) for m in student.modules()) == len(weights)
    plain = make_student(module, "transformer", {})
    assert torch.allclose(_velocity(plain), expected, rtol=1e-5, atol=1e-6)
    set_weights(plain, "transformer", weights)
    assert torch.allclose(_velocity(student), _velocity(plain), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(_velocity(student), expected, rtol=1e-5, atol=1e-6)


def test_free_parameters_hold_no_weight_matrix_and_all_else_once(
    module: nn.Module, weights: dict[LayerName, QuantizedWeight]
) -> None:
    student = make_student(module, "transformer", weights)
    kinds = free_parameters(student)
    listed = [p for group in kinds.values() for p in group]
    assert len({id(p) for p in listed}) == len(listed)
    named = {id(p): name for name, p in student.named_parameters()}
    names = {kind: {named[id(p)] for p in group} for kind, group in kinds.items()}
    n_ranked = sum("down" in weight.payload for weight in weights.values())
    assert {kind: len(group) for kind, group in names.items()} == {
        "scales": len(weights),
        "factors": 2 * n_ranked,
        "biases": len(weights),
        "norms": len(names["norms"]),
        "codes": 0,
    }
    original = dict(module.named_parameters())
    matrices = {
        f"{path}.weight"
        for path, one in module.named_modules()
        if isinstance(one, (nn.Linear, nn.Conv3d, nn.Embedding))
    }
    assert not set().union(*names.values()) & matrices
    assert names["norms"] == {
        name for name in original if ".norm" in name or name.endswith("scale_shift_table")
    }
    assert "scale_shift_table" in names["norms"]
    assert "blocks.1.attn2.norm_k.weight" in names["norms"]


def test_what_was_tuned_survives_a_file(
    module: nn.Module, weights: dict[LayerName, QuantizedWeight], tmp_path: Path
) -> None:
    student = make_student(module, "transformer", weights)
    before = _velocity(student)
    for i, group in enumerate(free_parameters(student).values()):
        for j, p in enumerate(group):
            p.data += 0.02 * _normal(*p.shape, seed=100 * i + j)
    saved, floats = tuned(student, "transformer")
    assert saved.keys() == weights.keys()
    save_block(tmp_path / "transformer.safetensors", saved, floats)
    loaded = QuantizedModel.load(tmp_path)
    assert loaded.floats.keys() == floats.keys()
    for name, tensor in floats.items():
        assert name.startswith("transformer/")
        assert torch.equal(loaded.floats[name], tensor)
        assert tensor.dtype == torch.float32
    for name, weight in saved.items():
        again = loaded.weights[name]
        assert (again.format, again.shape, again.loss) == (weight.format, weight.shape, weight.loss)
        for key, tensor in weight.payload.items():
            assert torch.equal(again.payload[key], tensor), (name, key)
        assert (again.bias_O is None) == (weight.bias_O is None)
    read = make_student(module, "transformer", loaded.weights)
    for name, tensor in loaded.floats.items():
        read.get_parameter(name.removeprefix("transformer/")).data.copy_(tensor)
    after = _velocity(student)
    assert (after - before).norm() > 0.01 * before.norm()
    assert (_velocity(read) - after).norm() < 1e-3 * after.norm()  # float16 scales and factors
    save_block(tmp_path / "again.safetensors", *tuned(read, "transformer"))
    first = (tmp_path / "transformer.safetensors").read_bytes()
    assert (tmp_path / "again.safetensors").read_bytes() == first
