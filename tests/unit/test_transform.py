"""Transforms and mixings: statistics carried over, nodes against torch, and what gets chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from hbxt_compress.algorithms.choose import (
    IDENTITY,
    UNJUDGED,
    choose_mixing,
    choose_transform,
    output_error,
)
from hbxt_compress.algorithms.feedback import factorise
from hbxt_compress.algorithms.hadamard import Hadamard
from hbxt_compress.algorithms.permute import Permute
from hbxt_compress.algorithms.rotate import Rotate, level_turns
from hbxt_compress.algorithms.scale import Scale
from hbxt_compress.algorithms.scales import search_scales
from hbxt_compress.algorithms.transform import Mixing, Transform, hadamard_matrix
from hbxt_compress.formats import FORMATS, WeightFormat
from hbxt_compress.graph.builder import GraphBuilder
from hbxt_compress.graph.external import write_models
from hbxt_compress.graph.parity import run_graph
from hbxt_compress.graph.passes import clean_up
from hbxt_compress.graph.transform import emit_transform
from hbxt_compress.stats import LayerInputs, LayerStats

_INT4 = FORMATS["int4-g64"]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _stats(x: Tensor, y: Tensor | None = None, weight: float = 1.0) -> LayerStats:
    """A literal oracle of LayerStats.add in float64, shifted by the first row."""
    y = x if y is None else y
    d_x, d_y = x - x[0], y - x[0]
    return LayerStats(
        n=len(x),
        weight=weight * len(x),
        shift_I=x[0].clone(),
        total_x_I=weight * d_x.sum(0),
        total_y_I=weight * d_y.sum(0),
        squares_y_I=weight * d_y.square().sum(0),
        absmax_I=y.abs().amax(0),
        products_yy_II=weight * d_y.T @ d_y,
        products_xy_II=weight * d_x.T @ d_y,
    )


def _inputs(x: Tensor, *, takes_bias: bool = True) -> LayerInputs:
    """Every fourth row held out."""
    held_out = torch.arange(len(x)) % 4 == 0
    return LayerInputs(
        fit=_stats(x[~held_out]), held_out=_stats(x[held_out]), takes_bias=takes_bias
    )


def _scale(n: int, seed: int = 0) -> Tensor:
    return _normal(n, seed=seed).exp()


def _turns(n_heads: int, size: int) -> Tensor:
    return torch.linalg.qr(_normal(n_heads, size, size, seed=5)).Q


_TRANSFORMS = {
    "identity": Transform(),
    "scale": Transform.scaling(_scale(128)),
    "hadamard": Transform(block=32),
    "both": Transform.scaling(_scale(128), 64),
}
_MIXINGS = {
    "identity": Mixing(),
    "order": Mixing(order_F=torch.randperm(128, generator=torch.Generator().manual_seed(1))),
    "turn": Mixing(turn_NDD=_turns(4, 32)),
}


@pytest.mark.parametrize("name", _TRANSFORMS)
def test_a_transform_survives_its_payload_and_is_undone_by_its_weight(name: str) -> None:
    transform = _TRANSFORMS[name]
    again = Transform.of(transform.payload())
    x, weight = _normal(7, 128), _normal(5, 128, seed=1)
    assert torch.equal(again.apply(x), transform.apply(x))
    assert (x @ weight.T - again.apply(x) @ again.weight(weight).T).abs().max() < 1e-12
    assert (again.undo(again.weight(weight)) - weight).abs().max() < 1e-13
    assert transform.is_identity == (not transform.payload()) == (name == "identity")
    scales = transform.payload().get("input_scale", torch.empty(0, dtype=torch.float16))
    assert transform.bytes == scales.numel() * scales.element_size()


@pytest.mark.parametrize("map_", [*_TRANSFORMS.values(), *_MIXINGS.values()])
def test_carried_statistics_are_those_of_the_mapped_rows(map_: Transform | Mixing) -> None:
    x = _normal(300, 128) * _scale(128, seed=2) + _normal(128, seed=3)
    y = x + 0.1 * _normal(300, 128, seed=4)
    carried = map_.stats(_stats(x, y, weight=0.7))
    measured = _stats(map_.apply(x), map_.apply(y), weight=0.7)
    assert (carried.n, carried.weight) == (measured.n, measured.weight)
    for of in (
        lambda s: s.mean_x_I,
        lambda s: s.mean_y_I,
        lambda s: s.mean_square_I,
        lambda s: s.hessian(centred=True),
        lambda s: s.hessian(centred=False),
        lambda s: s.cross(centred=True),
        lambda s: s.cross(centred=False),
    ):
        assert (of(carried) - of(measured)).abs().max() <= 1e-9 * of(measured).abs().max()
    assert bool((carried.absmax_I >= measured.absmax_I * (1 - 1e-12)).all())
    exact = not (getattr(map_, "block", 0) or getattr(map_, "turn_NDD", None) is not None)
    assert torch.allclose(carried.absmax_I, measured.absmax_I, rtol=1e-12) == exact
    merged = carried.merged(map_.stats(_stats(x[:50], y[:50])))  # as LayerInputs.everything does
    whole = map_.stats(_stats(x, y, weight=0.7).merged(_stats(x[:50], y[:50])))
    assert torch.allclose(merged.hessian(centred=True), whole.hessian(centred=True), rtol=1e-9)


def test_moments_alone_can_be_scaled_and_reordered_but_not_rotated() -> None:
    moments = LayerStats.empty(128, "moments")
    x = _normal(50, 128).float()
    moments.add(x, x)
    for map_ in (_TRANSFORMS["scale"], _MIXINGS["order"]):
        expected = map_.apply(x.double()).square().mean(0)
        assert torch.allclose(map_.stats(moments).mean_square_I, expected, rtol=1e-9)
    for rotating in (_TRANSFORMS["both"], _MIXINGS["turn"]):
        with pytest.raises(ValueError, match="without products"):
            rotating.stats(moments)


def test_inputs_without_held_out_rows_stay_without() -> None:
    alone = LayerInputs(fit=_stats(_normal(9, 128)), held_out=None, takes_bias=False)
    for map_ in (_TRANSFORMS["both"], _MIXINGS["turn"]):
        assert map_.inputs(alone).held_out is None
        assert not map_.inputs(alone).takes_bias


@pytest.mark.parametrize("size", [2, 16, 128])
def test_the_hadamard_matrix_is_sylvesters(size: int) -> None:
    matrix = hadamard_matrix(size)
    assert torch.equal(matrix, matrix.T)
    assert (matrix @ matrix - torch.eye(size)).abs().max() < 1e-14
    half = hadamard_matrix(size // 2) * math.sqrt(0.5)
    assert torch.allclose(
        matrix, torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])
    )


def test_scales_are_clipped_to_what_float16_holds_well_and_nonsense_is_refused() -> None:
    made = Transform.scaling(torch.tensor([0.0, 1e-9, 0.3, 1e9])).scale_I
    assert made is not None
    assert made.dtype == torch.float16
    assert bool(((made >= 1e-3) & (made <= 1e3)).all())
    with pytest.raises(ValueError, match="NaN"):
        Transform.scaling(torch.tensor([1.0, math.nan]))
    for bad in (torch.zeros(2).half(), torch.ones(2), torch.full((2,), math.nan).half()):
        with pytest.raises(ValueError, match="float16 vector"):
            Transform(scale_I=bad)
    for block in (1, 24, -8):
        with pytest.raises(ValueError, match="power of two"):
            Transform(block=block)
    with pytest.raises(ValueError, match="does not divide 96"):
        Transform(block=64).apply(torch.ones(96))
    with pytest.raises(ValueError, match="every feature once"):
        Mixing(order_F=torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="orthogonal"):
        Mixing(turn_NDD=torch.ones(1, 2, 2, dtype=torch.float64))


def test_a_permutation_is_exact_to_the_bit_and_a_pair_computes_the_same() -> None:
    first, bias, second = (
        _normal(*s, seed=i).float() for i, s in enumerate([(128, 48), (128,), (9, 128)])
    )
    x = _normal(20, 48, seed=8).float()
    expected = torch.tanh(x @ first.T + bias) @ second.T  # elementwise between: only orders pass
    order = _MIXINGS["order"]
    new_first, new_bias = order.first(first, bias)
    assert torch.equal(new_first.sort(0).values, first.sort(0).values)
    assert torch.equal(new_first, first[order.order_F])
    got = torch.tanh(x @ new_first.T + new_bias) @ order.second(second).T
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_turn_inside_each_head_passes_through_attention() -> None:
    value, bias, output = _normal(128, 48), _normal(128, seed=1), _normal(9, 128, seed=2)
    x, attention = _normal(20, 48, seed=3), _normal(4, 20, 20, seed=4).softmax(-1)

    def computed(value: Tensor, bias: Tensor, output: Tensor) -> Tensor:
        heads = (x @ value.T + bias).unflatten(-1, (4, 32)).transpose(0, 1)
        return (attention @ heads).transpose(0, 1).flatten(1) @ output.T

    turn = _MIXINGS["turn"]
    expected = computed(value, bias, output)
    new_value, new_bias = turn.first(value, bias)
    assert new_bias is not None
    got = computed(new_value, new_bias, turn.second(output))
    assert (got - expected).abs().max() < 1e-12 * expected.abs().max()
    assert (new_value - value).abs().max() > 0.1


def _model(payloads: Sequence[dict[str, Tensor]], shape: tuple[int, ...]) -> ir.Model:
    """One output for each payload, all of one input."""
    x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    ends = [ir.node("Identity", [x]) for _ in payloads]
    graph = ir.Graph([x], [], nodes=ends, opset_imports={"": 18}, name="main")
    for number, (end, payload) in enumerate(zip(ends, payloads, strict=True)):
        out = emit_transform(GraphBuilder(graph, end), f"layer{number}", x, payload)
        assert tuple(out.shape) == shape
        end.replace_input_with(0, out)
        end.outputs[0].name = f"y{number}"
        end.outputs[0].shape, end.outputs[0].type = out.shape, out.type
        graph.outputs.append(end.outputs[0])
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("shape", [(1, 128), (2, 3, 128)])
@pytest.mark.parametrize("name", _TRANSFORMS)
def test_onnxruntime_transforms_as_torch_does(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    transform = _TRANSFORMS[name]
    model = _model([dict(transform.payload())], shape)
    write_models(tmp_path, {"model.onnx": model})
    x = _normal(*shape, seed=6).float()
    (got,) = run_graph(tmp_path / "model.onnx", {"x": x})
    expected = transform.apply(x.double())
    assert (got - expected).abs().max() < 1e-6 * expected.abs().max()
    if name == "identity":
        assert torch.equal(got, x)


def test_layers_that_share_a_transform_compute_it_once(tmp_path: Path) -> None:
    shared, other = dict(_TRANSFORMS["both"].payload()), dict(_TRANSFORMS["hadamard"].payload())
    copied = {key: tensor.clone() for key, tensor in shared.items()}
    model = _model([shared, copied, other], (2, 3, 128))
    clean_up(model)
    counted = [node.op_type for node in model.graph]
    # Two transforms: one Cast and one Mul, a MatMul and a Reshape on either side of it for each.
    assert [counted.count(op) for op in ("Cast", "Mul", "MatMul", "Reshape")] == [1, 1, 2, 4]
    write_models(tmp_path, {"model.onnx": model})
    x = _normal(2, 3, 128, seed=6).float()
    first, second, third = run_graph(tmp_path / "model.onnx", {"x": x})
    assert torch.equal(first, second)
    assert (third - _TRANSFORMS["hadamard"].apply(x)).abs().max() < 1e-6 * x.abs().max() * 8


def test_a_payload_that_does_not_fit_names_the_layer() -> None:
    with pytest.raises(ValueError, match=r"layer0: .*64.* 128"):
        _model([{"input_scale": torch.ones(64).half()}], (2, 128))
    with pytest.raises(ValueError, match=r"layer0: .*128 features in blocks of 256"):
        _model([{"rotation": torch.tensor(256, dtype=torch.int32)}], (2, 128))


def test_levelled_pivots_are_equal_and_their_geometric_mean() -> None:
    """Against a Cholesky of each head's turned covariance, the last feature first."""
    x = _normal(400, 3, 16) @ (_normal(3, 16, 16, seed=1) * _scale(16, seed=2) ** 2).unsqueeze(0)[
        0
    ].mean(0)
    covariance = torch.stack([torch.cov(x[:, head].T) for head in range(3)])
    covariance[2] = 0.0  # a dead head
    turn = level_turns(covariance, damping=0.01)
    assert (turn @ turn.mT - torch.eye(16)).abs().max() < 1e-12
    for head in range(2):
        damped = covariance[head] + 0.01 * covariance[head].diagonal().mean() * torch.eye(
            16, dtype=torch.float64
        )
        turned = (turn[head] @ damped @ turn[head].T).flip(0, 1)
        pivots = torch.linalg.cholesky(turned).diagonal().square()
        geometric_mean = torch.linalg.slogdet(damped).logabsdet.div(16).exp()
        assert torch.allclose(pivots, geometric_mean.expand(16), rtol=1e-9)


def _rounded_in_full(weight: Tensor, inputs: LayerInputs, fmt: WeightFormat) -> float:
    """Literal error feedback from the fitting rows, judged on the held-out rows."""
    hessian = inputs.fit.hessian(centred=inputs.takes_bias)
    order = hessian.diagonal().argsort(descending=True)
    factor = factorise(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(order)), order)
    assert factor is not None
    grid = search_scales(weight.float(), fmt, factor.pivots_I.float())
    goal, scale = weight.double()[:, order], grid.columns(order)[0].double()
    error, rounded = torch.zeros_like(goal), torch.empty_like(weight, dtype=torch.float64)
    for j in range(len(order)):
        target = goal[:, j] + error[:, :j] @ factor.unit_II[:j, j]
        level = (target / scale[:, j]).round().clamp(-grid.below, grid.above)
        rounded[:, order[j]] = level * scale[:, j]
        error[:, j] = goal[:, j] - level * scale[:, j]
    return output_error(weight, rounded, inputs)


def _white(n_rows: int = 4000, width: int = 256, seed: int = 20) -> Tensor:
    return _normal(n_rows, width, seed=seed)


def _correlated(n_rows: int = 4000, width: int = 256) -> Tensor:
    """Heads of 64 channels whose covariance has a spectrum of 1 / k, and channel gains."""
    spectrum = torch.arange(1, 65, dtype=torch.float64).rsqrt()
    turns = torch.linalg.qr(_normal(width // 64, 64, 64, seed=21)).Q
    heads = (_normal(n_rows, width // 64, 1, 64, seed=22) * spectrum) @ turns
    return heads.flatten(1) * (0.5 * _normal(width, seed=23)).exp()


def _all_candidates(weights: Sequence[Tensor], inputs: LayerInputs) -> list[tuple[str, Transform]]:
    return [*Scale().candidates(weights, inputs), *Hadamard().candidates(weights, inputs)]


@pytest.mark.parametrize("name", _TRANSFORMS)
def test_sixteen_bits_and_back_is_the_weight(name: str) -> None:
    weight = _normal(32, 128, seed=30)
    mapped = _TRANSFORMS[name].weight(weight)
    step = mapped.abs().amax(1, keepdim=True) / 32767
    rounded = (mapped / step).round() * step
    lost = (_TRANSFORMS[name].undo(rounded) - weight).square().mean() / weight.square().mean()
    assert float(lost) < 1e-6


@pytest.mark.parametrize("finish", [None, _rounded_in_full])
def test_nothing_is_chosen_on_white_gaussian_data(finish) -> None:
    weights, inputs = [_normal(256, 256, seed=31), _normal(128, 256, seed=32)], _inputs(_white())
    candidates = _all_candidates(weights, inputs)
    chosen = choose_transform(weights, inputs, [_INT4, _INT4], candidates, finish=finish)
    assert (chosen[0], chosen[1].is_identity, chosen[2]) == (IDENTITY, True, 0.0)
    first, second = _normal(512, 256, seed=33), _normal(256, 512, seed=34)
    of_second = _inputs(_white(width=512))
    mixings = list(Rotate().candidates(first, second, of_second, 8))
    name, mixing, gain = choose_mixing(
        first, second, inputs, of_second, (_INT4, _INT4), mixings, finish=finish
    )
    assert (name, mixing.turn_NDD, gain) == (IDENTITY, None, 0.0)


def test_a_rotation_helps_against_an_outlier_channel_as_much_as_it_claims() -> None:
    weight, inputs = _normal(128, 256, seed=35), _inputs(_white())
    weight[:, [5, 100, 170, 230]] *= 12
    candidates = list(Hadamard(scales=()).candidates([weight], inputs))
    name, transform, claimed = choose_transform([weight], inputs, [_INT4], candidates)
    assert name.startswith("hadamard")
    assert claimed > 2
    in_full = [
        _rounded_in_full(t.weight(weight), t.inputs(inputs), _INT4)
        for t in (Transform(), transform)
    ]
    assert 10 * math.log10(in_full[0] / in_full[1]) == pytest.approx(claimed, abs=0.4)


def test_a_scaling_helps_against_a_spread_of_channel_gains_under_feedback() -> None:
    weight = _normal(128, 256, seed=36)
    inputs = _inputs(_white() * _normal(256, seed=37).exp())
    candidates = list(Scale().candidates([weight], inputs))
    name, chosen, gain = choose_transform(
        [weight], inputs, [_INT4], candidates, finish=_rounded_in_full
    )
    assert name.startswith("scale")
    plain, scaled = (
        _rounded_in_full(t.weight(weight), t.inputs(inputs), _INT4) for t in (Transform(), chosen)
    )
    assert gain == pytest.approx(10 * math.log10(plain / scaled))


def test_levelled_pivots_beat_every_other_mixing_where_inputs_are_correlated() -> None:
    first, second = _normal(256, 128, seed=38), _normal(128, 256, seed=39)
    inputs, of_first = _inputs(_correlated()), _inputs(_white(width=128))
    candidates = [
        *Rotate().candidates(first, second, inputs, 4),
        *Permute().candidates(first, second, inputs, 4),
    ]
    both = (_INT4, _INT4)
    estimated = choose_mixing(first, second, of_first, inputs, both, candidates)
    name, mixing, _ = choose_mixing(
        first, second, of_first, inputs, both, candidates, finish=_rounded_in_full
    )
    assert name == estimated[0] == "level"
    plain, mixed = (
        _rounded_in_full(m.second(second), m.inputs(inputs), _INT4) for m in (Mixing(), mixing)
    )
    assert 10 * math.log10(plain / mixed) > 0.5


def test_a_sorted_second_layer_gains_where_columns_differ_and_the_first_has_no_say() -> None:
    first, second = _normal(256, 128, seed=40), _normal(128, 256, seed=41)
    second *= (0.7 * _normal(256, seed=42)).exp()
    inputs, of_first = _inputs(_white()), _inputs(_white(width=128))
    candidates = list(Permute().candidates(first, second, inputs))
    name, mixing, gain = choose_mixing(
        first, second, of_first, inputs, (FORMATS["fp16"], _INT4), candidates
    )
    assert name.startswith("sorted")
    assert gain > 0.5
    assert mixing.order_F is not None
    both = choose_mixing(first, second, of_first, inputs, (_INT4, _INT4), candidates)
    assert both[0] == name == "sorted 0.5"  # "sorted 1" makes the same groups: the earlier one
    assert 0.05 < both[2] < gain  # the mean over two layers, one of which is as before


def test_what_wins_on_fitting_rows_and_loses_on_held_out_ones_is_not_chosen() -> None:
    weight = _normal(64, 128, seed=43)
    gains = _normal(128, seed=37).exp()
    fit, held_out = _stats(_white(width=128) * gains), _stats(_white(width=128, seed=44) / gains)
    agreeing = LayerInputs(fit=fit, held_out=fit, takes_bias=True)
    candidates = list(Scale(alphas=(0.2,), betas=(0.0,)).candidates([weight], agreeing))
    assert choose_transform([weight], agreeing, [_INT4], candidates)[0] == "scale 0.2 0"
    for finish in (None, _rounded_in_full):
        differing = LayerInputs(fit=fit, held_out=held_out, takes_bias=True)
        name, _, _ = choose_transform([weight], differing, [_INT4], candidates, finish=finish)
        assert name == IDENTITY


def test_the_estimate_foretells_the_full_rounding() -> None:
    weight, inputs = _normal(128, 256, seed=45), _inputs(_correlated())
    candidates = _all_candidates([weight], inputs)
    for label, transform in candidates[::5]:
        # With one candidate and no threshold, the gain is the estimate itself, if there is one.
        name, _, gain = choose_transform([weight], inputs, [_INT4], [(label, transform)], 0.0)
        errors = [
            _rounded_in_full(t.weight(weight), t.inputs(inputs), _INT4)
            for t in (Transform(), transform)
        ]
        true_gain = 10 * math.log10(errors[0] / errors[1])
        assert gain == pytest.approx(max(true_gain, 0.0), abs=0.4), label
        assert (name == label) == (gain > 0)


def test_the_best_two_are_finished_and_their_full_rounding_decides() -> None:
    weight, inputs = _normal(64, 128, seed=46), _inputs(_white(width=128))
    weight[:, [5, 100]] *= 12
    found = {block: Transform(block=block) for block in (2, 64, 128)}
    candidates = [("bad", Transform.scaling(torch.linspace(1, 30, 128)))]
    candidates += [(str(block), transform) for block, transform in found.items()]
    best = choose_transform([weight], inputs, [_INT4], candidates)[0]
    second = {"64": "128", "128": "64"}[best]
    errors = {"0": 0.5, second: 0.1}
    asked: list[str] = []

    def finish(mapped: Tensor, seen: LayerInputs, fmt: WeightFormat) -> float:
        assert (fmt, seen.takes_bias) == (_INT4, True)
        maps = {0: Transform()} | found
        asked.append(next(str(b) for b, t in maps.items() if torch.equal(t.weight(weight), mapped)))
        assert torch.equal(seen.fit.squares_y_I, maps[int(asked[-1])].stats(inputs.fit).squares_y_I)
        return errors.get(asked[-1], 0.4)

    name, transform, gain = choose_transform([weight], inputs, [_INT4], candidates, finish=finish)
    assert (name, str(transform.block)) == (second, second)
    assert gain == pytest.approx(10 * math.log10(5))
    assert sorted(asked) == ["0", "128", "64"]
    worse = choose_transform([weight], inputs, [_INT4], candidates, finish=lambda *_: 0.3)
    assert worse[0] == IDENTITY


def test_layers_of_one_input_count_alike_whatever_their_size() -> None:
    inputs = _inputs(_correlated())
    weights = [_normal(64, 256, seed=47), _normal(64, 256, seed=48)]
    gains = []
    for loud in (1, 1000):
        scaled = [weights[0], loud * weights[1]]
        candidates = [("h", Transform(block=64))]
        name, _, gain = choose_transform(scaled, inputs, [_INT4, _INT4], candidates)
        gains.append((name, round(gain, 2)))
    assert gains[0] == gains[1]
    assert gains[0][1] > 0.3


def test_without_held_out_rows_codes_or_output_it_is_the_identity() -> None:
    weight, inputs = _normal(64, 128, seed=49), _inputs(_white(width=128))
    weight[:, 5] *= 20
    candidates = [("h", Transform(block=128))]
    mixings = [("o", Mixing(order_F=torch.arange(128).flip(0)))]
    alone = LayerInputs(fit=inputs.fit, held_out=None, takes_bias=True)
    assert choose_transform([weight], inputs, [_INT4], candidates)[0] == "h"
    assert choose_transform([weight], alone, [_INT4], candidates)[0] == UNJUDGED
    assert choose_transform([weight], inputs, [FORMATS["fp16"]], candidates)[0] == IDENTITY
    assert choose_transform([0 * weight], inputs, [_INT4], candidates)[0] == IDENTITY
    silent = _inputs(torch.zeros(40, 128, dtype=torch.float64))
    assert choose_transform([weight], silent, [_INT4], candidates)[0] == IDENTITY
    pair = (torch.eye(128), weight)
    both = (_INT4, _INT4)
    assert choose_mixing(*pair, inputs, alone, both, mixings)[0] == UNJUDGED
    assert choose_mixing(*pair, alone, inputs, both, mixings)[0] == UNJUDGED
    plain = (FORMATS["fp16"], FORMATS["fp16"])
    assert choose_mixing(*pair, inputs, inputs, plain, mixings)[0] == IDENTITY
    assert choose_mixing(*pair, None, silent, both, mixings)[0] == IDENTITY


def test_statistics_that_are_not_numbers_are_refused() -> None:
    broken = _inputs(_white(width=128))
    assert broken.fit.products_yy_II is not None
    broken.fit.products_yy_II[3, 3] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        choose_transform([_normal(64, 128)], broken, [_INT4], [])


def test_few_rows_are_enough_to_choose_with() -> None:
    weight, inputs = _normal(64, 128, seed=50), _inputs(_white(n_rows=40, width=128))
    name, _, gain = choose_transform([weight], inputs, [_INT4], _all_candidates([weight], inputs))
    assert math.isfinite(gain)
    assert name == IDENTITY or gain >= 0.3
