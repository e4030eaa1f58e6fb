"""SmoothQuant against its formula written out, and against an error worked out again in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hbxt_compress.algorithms.choose import IDENTITY, choose_transform
from hbxt_compress.algorithms.smooth_quant import SmoothQuant, smooth_scale
from hbxt_compress.algorithms.transform import Transform
from hbxt_compress.formats import FORMATS
from hbxt_compress.formats.activations import ACTIVATIONS
from hbxt_compress.stats import LayerInputs, LayerStats


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _outliers(n: int = 256, n_in: int = 96) -> Tensor:
    """Rows of which two channels are sixty times larger than the rest."""
    x = _normal(n, n_in, seed=1)
    x[:, [5, 40]] *= 60
    return x


def _error_db(x: Tensor, weights: list[Tensor], scale: Tensor, *, static: bool = False) -> float:
    """Relative error of the rounded product, in double precision, row by row."""
    total = 0.0
    for weight in weights:
        scaled = weight.double().numpy() / scale.double().numpy()
        step_O = np.float16(np.abs(scaled).max(1) / 127).astype(np.float64)
        rounded = np.stack([np.rint(row / s) * s for row, s in zip(scaled, step_O, strict=True)])
        inputs = x.double().numpy() * scale.double().numpy()
        step_N = np.abs(inputs).max(1) / 127
        step_N = np.full_like(step_N, step_N.max()) if static else step_N
        got = np.stack([np.rint(row / s) * s for row, s in zip(inputs, step_N, strict=True)])
        exact = x.double().numpy() @ weight.double().numpy().T
        total += np.square(got @ rounded.T - exact).sum() / np.square(exact).sum()
    return 10 * math.log10(total)


def test_the_scale_is_the_formula_up_to_a_common_factor() -> None:
    absmax, weights = _normal(12).abs() * 3, [_normal(7, 12, seed=2), _normal(5, 12, seed=3)]
    for alpha in (0.3, 0.5, 1.0):
        got = smooth_scale(absmax, weights, alpha)
        expected = []
        for j in range(12):
            largest = max(abs(float(w[i, j])) for w in weights for i in range(w.shape[0]))
            expected.append(largest ** (1 - alpha) / float(absmax[j]) ** alpha)
        ratio = got.double().numpy() / np.array(expected)
        assert ratio == pytest.approx(ratio[0], rel=2e-3)  # float16
        assert float(got.double().log().mean()) == pytest.approx(0, abs=1e-3)
        assert got.dtype == torch.float16


def test_alpha_one_evens_out_the_input_and_zero_does_nothing() -> None:
    x, weights = _outliers(), [_normal(32, 96, seed=4)]
    absmax = x.abs().amax(0)
    even = absmax * smooth_scale(absmax, weights, 1.0).float()
    assert float(even.max() / even.min()) == pytest.approx(1, abs=2e-3)
    assert torch.equal(smooth_scale(absmax, weights, 0.0), torch.ones(96, dtype=torch.float16))


@pytest.mark.parametrize("alpha", SmoothQuant().alphas)
def test_the_layer_still_computes_the_same(alpha: float) -> None:
    x, weight = _outliers().double(), _normal(32, 96, seed=4).double()
    scale = smooth_scale(x.abs().amax(0), [weight], alpha).double()
    exact = x @ weight.T
    assert ((x * scale) @ (weight / scale).T - exact).abs().max() <= 1e-12 * exact.abs().max()


def _inputs(x: Tensor) -> LayerInputs:
    """Every fourth row held out; a tensor a row, so that all are kept as examples."""
    sides = []
    for rows in (x[torch.arange(len(x)) % 4 > 0], x[::4]):
        sides.append(LayerStats.empty(x.shape[1], "covariance"))
        for row in rows:
            sides[-1].add(row[None], row[None])
    return LayerInputs(fit=sides[0], held_out=sides[1], takes_bias=False)


def _chosen(
    x: Tensor, weights: list[Tensor], activation: str = "int8-token", least_gain_db: float = 0.3
) -> tuple[str, Tensor, float]:
    inputs, fmts = _inputs(x), [FORMATS["int8-channel"]] * len(weights)
    name, transform, gain_db = choose_transform(
        weights,
        inputs,
        fmts,
        SmoothQuant().candidates(weights, inputs),
        least_gain_db,
        activation=ACTIVATIONS[activation],
    )
    scale = torch.ones(x.shape[1]) if transform.scale_I is None else transform.scale_I
    return name, scale, gain_db


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outlier_channels_are_helped(activation: str) -> None:
    x, weights = _outliers(), [_normal(48, 96, seed=5), _normal(32, 96, seed=6)]
    name, scale, claimed_db = _chosen(x, weights, activation)
    assert name.startswith("smooth")
    static = activation == "int8-tensor"
    plain_db = _error_db(x, weights, torch.ones(96), static=static)
    gain_db = plain_db - _error_db(x, weights, scale, static=static)
    assert gain_db > 6
    assert claimed_db == pytest.approx(gain_db, abs=1.5)


def test_the_choice_is_the_best_of_all() -> None:
    x, weights = _outliers(), [_normal(48, 96, seed=5), _normal(32, 96, seed=6)]
    candidates = dict(SmoothQuant().candidates(weights, _inputs(x)))
    errors = {name: _error_db(x, weights, t.scale_I) for name, t in candidates.items()}
    name, scale, _ = _chosen(x, weights)
    assert errors[name] <= min(errors.values()) + 0.1
    assert torch.equal(scale, candidates[name].scale_I)
    assert _chosen(x, weights, least_gain_db=60)[0] == IDENTITY


def test_even_inputs_are_left_alone() -> None:
    x, weights = _normal(256, 96, seed=7), [_normal(48, 96, seed=8)]
    name, scale, _ = _chosen(x, weights)
    assert name == IDENTITY
    assert torch.equal(scale, torch.ones(96))


def test_dead_channels_and_columns_get_a_finite_scale() -> None:
    x, weight = _outliers(), _normal(16, 96, seed=9)
    x[:, 3], weight[:, 7] = 0, 0
    x[:, 11], weight[:, 11] = 0, 0
    for alpha in (0.3, 0.5, 1.0):
        scale = smooth_scale(x.abs().amax(0), [weight], alpha).float()
        Transform(scale_I=scale.half())  # refuses what is out of range
        assert bool(((scale >= 1e-3) & (scale <= 1e3)).all())
    assert _chosen(x, [weight])[0].startswith("smooth")
    for case in ((torch.zeros(8, 96), [weight]), (x, [torch.zeros(4, 96)])):
        assert _chosen(*case)[0] == IDENTITY
        assert not list(SmoothQuant().candidates(case[1], _inputs(case[0])))


def test_what_cannot_be_is_refused() -> None:
    weight = _normal(4, 8)
    with pytest.raises(ValueError, match=r"alpha 1\.5"):
        smooth_scale(torch.ones(8), [weight], 1.5)
    with pytest.raises(ValueError, match="9 input channels"):
        smooth_scale(torch.ones(9), [weight], 0.5)
    with pytest.raises(ValueError, match="8 input channels"):
        smooth_scale(torch.ones(8), [], 0.5)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            smooth_scale(torch.tensor([1.0] * 7 + [bad]), [weight], 0.5)
        with pytest.raises(ValueError, match="NaN or infinity"):
            smooth_scale(torch.ones(8), [weight * bad], 0.5)
