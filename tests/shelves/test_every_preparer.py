"""Every preparer: each candidate keeps the function, and is made from the fitting rows alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from hbxt_compress.algorithms import INPUT_PREPARERS, PAIR_PREPARERS
from hbxt_compress.algorithms.hadamard import Hadamard
from hbxt_compress.algorithms.permute import Permute
from hbxt_compress.algorithms.rotate import Rotate
from hbxt_compress.algorithms.scale import Scale
from hbxt_compress.algorithms.smooth_quant import SmoothQuant
from hbxt_compress.algorithms.transform import Mixing, Transform
from hbxt_compress.stats import LayerInputs, LayerStats

_WIDTHS = [256, 192, 96]  # blocks of 128 and 64, of 64 alone, and of neither
_HEADS = 4


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _stats(n_inputs: int, seed: int) -> LayerStats:
    stats = LayerStats.empty(n_inputs, "covariance")
    x = _normal(300, n_inputs, seed=seed) @ _normal(n_inputs, n_inputs, seed=50) * 0.1 + 1
    stats.add(x * _normal(n_inputs, seed=51).exp(), x * _normal(n_inputs, seed=51).exp())
    return stats


def _inputs(n_inputs: int, *, takes_bias: bool = True) -> LayerInputs:
    return LayerInputs(fit=_stats(n_inputs, 1), held_out=_stats(n_inputs, 2), takes_bias=takes_bias)


def _transforms(
    name: str, n_inputs: int, inputs: LayerInputs | None = None
) -> tuple[list[Tensor], dict[str, Transform]]:
    weights = [_normal(40, n_inputs, seed=3), 5 * _normal(24, n_inputs, seed=4)]
    found = list(INPUT_PREPARERS[name]().candidates(weights, inputs or _inputs(n_inputs)))
    assert len({label for label, _ in found}) == len(found)
    return weights, dict(found)


def _mixings(
    name: str, width: int, inputs: LayerInputs | None = None, n_heads: int = _HEADS
) -> tuple[Tensor, Tensor, dict[str, Mixing]]:
    first, second = _normal(width, 40, seed=5), _normal(24, width, seed=6)
    preparer = PAIR_PREPARERS[name]()
    found = list(preparer.candidates(first, second, inputs or _inputs(width), n_heads))
    assert len({label for label, _ in found}) == len(found)
    return first, second, dict(found)


@pytest.mark.parametrize("width", _WIDTHS)
@pytest.mark.parametrize("name", INPUT_PREPARERS)
def test_every_transform_keeps_what_its_layers_compute(name: str, width: int) -> None:
    weights, found = _transforms(name, width)
    x = _normal(30, width, seed=7)
    assert bool(found) == (name != "hadamard" or width % 64 == 0)
    for label, transform in found.items():
        assert not transform.is_identity
        for weight in weights:
            expected = x @ weight.T
            largest = expected.abs().max()
            got = transform.apply(x) @ transform.weight(weight).T
            assert (got - expected).abs().max() < 1e-12 * largest, label
            got = transform.apply(x.float()) @ transform.weight(weight.float()).T
            assert (got - expected).abs().max() < 1e-5 * largest, label


@pytest.mark.parametrize("width", _WIDTHS)
@pytest.mark.parametrize("name", PAIR_PREPARERS)
def test_every_mixing_keeps_what_its_pair_computes(name: str, width: int) -> None:
    """Through attention, which mixes the tokens of each head in its own way."""
    first, second, found = _mixings(name, width)
    bias, x = _normal(width, seed=8), _normal(30, 40, seed=9)
    attention = _normal(_HEADS, 30, 30, seed=10).softmax(-1)

    def computed(first: Tensor, bias: Tensor | None, second: Tensor) -> Tensor:
        dtype = first.dtype
        assert bias is not None
        heads = (x.to(dtype) @ first.T + bias).unflatten(-1, (_HEADS, -1)).transpose(0, 1)
        return (attention.to(dtype) @ heads).transpose(0, 1).flatten(1) @ second.T

    expected = computed(first, bias, second)
    assert found
    for label, mixing in found.items():
        got = computed(*mixing.first(first, bias), mixing.second(second))
        assert (got - expected).abs().max() < 1e-12 * expected.abs().max(), label
        halves = mixing.first(first.float(), bias.float())
        got = computed(*halves, mixing.second(second.float()))
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max(), label


def test_hidden_features_may_be_sorted_across_heads() -> None:
    first, second, found = _mixings("permute", 192, n_heads=1)
    by_weight = found["sorted 0"].second(second)
    assert bool((by_weight.abs().amax(0).diff() <= 0).all())
    x = _normal(30, 40, seed=9)
    for mixing in found.values():
        got = torch.tanh(x @ mixing.first(first, None)[0].T) @ mixing.second(second).T
        expected = torch.tanh(x @ first.T) @ second.T
        assert (got - expected).abs().max() < 1e-12 * expected.abs().max()
    kinds = [tuple(mixing.order_F.tolist()) for mixing in found.values()]
    assert len(set(kinds)) == len(kinds)


def _same(one: Mapping[str, Transform | Mixing], two: Mapping[str, Transform | Mixing]) -> bool:
    x = _normal(3, 192, seed=11)
    assert one.keys() == two.keys()
    return all(torch.equal(one[label].apply(x), two[label].apply(x)) for label in one)


@pytest.mark.parametrize("name", [*INPUT_PREPARERS, *PAIR_PREPARERS])
def test_candidates_are_deterministic_and_do_not_look_at_held_out_rows(name: str) -> None:
    make = _transforms if name in INPUT_PREPARERS else _mixings
    inputs = _inputs(192)
    reference = make(name, 192, inputs)[-1]
    assert _same(make(name, 192, inputs)[-1], reference)
    assert _same(make(name, 192, replace(inputs, held_out=_stats(192, 77)))[-1], reference)
    if name != "hadamard" and name != "permute":
        changed = make(name, 192, replace(inputs, fit=_stats(192, 77)))[-1]
        assert not _same(changed, reference)


@pytest.mark.parametrize("takes_bias", [True, False])
@pytest.mark.parametrize("name", [*INPUT_PREPARERS, *PAIR_PREPARERS])
def test_dead_channels_and_weights_of_zero_give_finite_maps(name: str, takes_bias: bool) -> None:
    make = _transforms if name in INPUT_PREPARERS else _mixings
    alive = _inputs(192, takes_bias=takes_bias)
    half_dead = Transform.scaling(torch.ones(192)).stats(alive.fit)
    for tensor in (half_dead.shift_I, half_dead.total_x_I, half_dead.total_y_I):
        tensor[:60] = 0
    half_dead.squares_y_I[:60] = 0
    for products in (half_dead.products_yy_II, half_dead.products_xy_II):
        assert products is not None
        products[:60] = 0
        products[:, :60] = 0
    dead = LayerStats.empty(192, "covariance")
    zeros = torch.zeros(10, 192)
    dead.add(zeros, zeros)
    x = _normal(5, 192)
    for stats in (half_dead, dead):
        for map_ in make(name, 192, replace(alive, fit=stats))[-1].values():
            assert bool(torch.isfinite(map_.apply(x)).all())
    nothing = torch.zeros(192, 192)
    if name in INPUT_PREPARERS:
        found = dict(INPUT_PREPARERS[name]().candidates([nothing], alive))
    else:
        found = dict(PAIR_PREPARERS[name]().candidates(nothing, nothing, alive, 1))
    for map_ in found.values():
        assert bool(torch.isfinite(map_.apply(x)).all())


def test_the_scale_is_the_formula_of_the_layers_channels() -> None:
    weights, found = _transforms("scale", 96)
    inputs = _inputs(96)
    scale = found["scale 0.3 0.5"].scale_I
    assert scale is not None
    strength = inputs.fit.hessian(centred=True).diagonal().sqrt()
    largest = torch.stack([w.abs().amax(0) / w.square().mean().sqrt() for w in weights]).amax(0)
    wanted = largest.sqrt() / strength**0.3
    ratio = scale.double() / wanted
    assert float(ratio.max() / ratio.min()) < 1.002  # float16
    assert float(scale.max() * scale.min()) == pytest.approx(1, rel=2e-3)
    uncentred = dict(Scale().candidates(weights, _inputs(96, takes_bias=False)))
    assert uncentred["scale 0.3 0.5"].scale_I is not None
    assert not torch.equal(uncentred["scale 0.3 0.5"].scale_I, scale)


def test_layers_of_one_input_count_alike_in_its_scale() -> None:
    weights, inputs = [_normal(40, 96, seed=3), _normal(24, 96, seed=4)], _inputs(96)
    found = dict(Scale().candidates(weights, inputs))
    louder = dict(Scale().candidates([weights[0], 1000 * weights[1]], inputs))
    for label, transform in found.items():
        assert transform.scale_I is not None
        assert torch.allclose(transform.scale_I, louder[label].scale_I, rtol=1e-3)


def test_bad_input_is_refused_by_name() -> None:
    inputs = _inputs(96)
    with pytest.raises(ValueError, match="NaN"):
        list(Scale().candidates([torch.full((2, 96), torch.nan)], inputs))
    for preparer in (Rotate(), Permute()):
        with pytest.raises(ValueError, match="multiple of the heads"):
            list(preparer.candidates(torch.ones(96, 4), torch.ones(4, 96), inputs, 5))
        with pytest.raises(ValueError, match="90 features into 96 columns"):
            list(preparer.candidates(torch.ones(90, 4), torch.ones(4, 96), inputs, 2))


@pytest.mark.parametrize("name", [*INPUT_PREPARERS, *PAIR_PREPARERS])
def test_a_preparer_can_be_written_in_a_recipe(name: str) -> None:
    kind = {**INPUT_PREPARERS, **PAIR_PREPARERS}[name]
    preparer = kind()
    assert kind.model_validate_json(preparer.model_dump_json()) == preparer
    assert preparer.need == "covariance"
    assert kind.VERSION >= 1


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Scale, '{"alphas": [1.5]}'),
        (SmoothQuant, '{"alphas": [0]}'),
        (Hadamard, '{"blocks": [48]}'),
        (Hadamard, '{"scales": [[0.4]]}'),
        (Rotate, '{"kinds": ["pca"]}'),
        (Rotate, '{"damping": 0}'),
        (Permute, '{"powers": [-1]}'),
    ],
)
def test_settings_out_of_range_are_refused(kind: type[Scale], text: str) -> None:
    with pytest.raises(ValidationError):
        kind.model_validate_json(text)
