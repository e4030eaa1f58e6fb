"""Error feedback against the paper's double loop, and Gptq against what its objective promises."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hbxt_compress.algorithms import gptq as gptq_module
from hbxt_compress.algorithms.feedback import factorise, feed_back
from hbxt_compress.algorithms.gptq import Gptq
from hbxt_compress.algorithms.grid import Grid
from hbxt_compress.algorithms.objective import Judge, Moments
from hbxt_compress.algorithms.polish import descend
from hbxt_compress.algorithms.scales import search_scales
from hbxt_compress.stats import LayerInputs, quadratic
from tests.oracles import gptq_literal
from tests.oracles.free_format import FreeFormat
from tests.oracles.inputs import (
    correlated,
    covariance,
    exact,
    inputs_of,
    normal,
    stats_of,
)

_INT4 = FreeFormat(group=16)
_PLAIN = Gptq(damping=(1e-3,), correct=(0.0,), polish=0)


def _orders(hessian_II: Tensor) -> dict[str, Tensor]:
    by_activity = hessian_II.diagonal().argsort(descending=True, stable=True)
    return {"activation": by_activity, "natural": torch.arange(len(hessian_II))}


def _db(ratio: float) -> float:
    return 10 * math.log10(ratio)


def _true_error(
    weight: Tensor, decoded: Tensor, shift: Tensor | None, x: Tensor, y: Tensor | None = None
) -> float:
    """E||W x - Q y - b||^2 / E||W x - mean||^2, from the rows themselves."""
    wanted = x.double() @ weight.double().T
    got = (x if y is None else y).double() @ decoded.double().T
    got = got if shift is None else got + shift.double()
    return float((wanted - got).square().mean(0).sum() / wanted.var(0).sum())


def _rounded(rounder: Gptq, weight: Tensor, inputs: LayerInputs, fmt: FreeFormat):
    rounded = rounder.round(weight, inputs, fmt)
    return fmt.decode(rounded.payload), rounded


@pytest.mark.parametrize("order", ["activation", "natural"])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("n_out", "n_in"), [(9, 48), (3, 272)])
def test_codes_are_those_of_the_literal_double_loop(
    n_out: int, n_in: int, asymmetric: bool, order: str
) -> None:
    hessian, weight = covariance(n_in, seed=n_in), normal(n_out, n_in)
    fmt = FreeFormat(group=16, n_levels=(4, 3), asymmetric=asymmetric)  # coarse, so that it clips
    grid = search_scales(weight, fmt)
    order_I = _orders(hessian)[order]
    factor = factorise(hessian, order_I)
    assert factor is not None
    fed = feed_back(weight, factor, grid)
    scales, zeros = grid.columns(torch.arange(n_in))
    zeros = torch.zeros_like(scales) if zeros is None else zeros
    literal = gptq_literal.gptq(
        weight.double().numpy(),
        hessian.numpy(),
        scales.double().numpy(),
        zeros.double().numpy(),
        fmt.n_levels,
        order_I.tolist(),
    )
    assert torch.equal(fed.levels_OI, torch.from_numpy(literal).double())
    assert not torch.equal(fed.levels_OI, grid.levels(weight).double())


def test_the_sum_over_pivots_is_the_quadratic_loss_clipping_included() -> None:
    """LDL identity: tr(E H E^T) = sum of pivots times the squared error of adjusted columns."""
    hessian, weight = covariance(160), normal(12, 160)
    grid = search_scales(weight, FreeFormat(group=16, n_levels=(2, 1)))
    grid = replace(grid, scales_OG=grid.scales_OG / 4)
    for order_I in _orders(hessian).values():
        factor = factorise(hessian, order_I)
        assert factor is not None
        fed = feed_back(weight, factor, grid)
        loss = quadratic(weight.double() - grid.value(fed.levels_OI).double(), hessian)
        assert fed.n_drifted > 0
        torch.testing.assert_close(fed.loss_O, loss, rtol=1e-9, atol=0)
        assert float(factor.pivots_I.log().sum()) == pytest.approx(float(hessian.logdet()))


def test_a_factor_solves_and_refuses_what_is_not_positive_definite() -> None:
    hessian, rows = covariance(50), normal(4, 50).double()
    factor = factorise(hessian, _orders(hessian)["activation"])
    assert factor is not None
    torch.testing.assert_close(factor.solve(rows @ hessian), rows, rtol=1e-9, atol=1e-9)
    assert factorise(torch.diag(torch.tensor([1.0, -1.0])), torch.arange(2)) is None
    assert factorise(torch.full((2, 2), torch.nan), torch.arange(2)) is None


@pytest.mark.parametrize("order", ["activation", "natural"])
def test_uncorrelated_inputs_leave_nothing_to_feed_back(order: str) -> None:
    weight = normal(8, 64)
    for variance in (torch.full((64,), 3.0), torch.linspace(0.1, 9, 64)):
        hessian = torch.diag(variance).double()
        rounder = _PLAIN.model_copy(update={"order": order})
        _, rounded = _rounded(rounder, weight, exact(hessian), _INT4)
        damped = variance.double() + 1e-3 * variance.double().mean()
        nearest = search_scales(weight, _INT4, damped)
        assert torch.equal(rounded.payload["levels"], nearest.levels(weight))


def test_feedback_helps_on_average_and_rows_it_hurts_are_rounded_to_nearest() -> None:
    worse, losses = 0, torch.zeros(2, dtype=torch.float64)
    for seed in range(40):
        hessian, weight = covariance(6, seed=seed), normal(20, 6, seed=seed)
        fmt = FreeFormat()
        moments = Moments.of(exact(hessian).fit, centred=True)
        problem = moments.problem(1e-3)
        grid = search_scales(weight, fmt, problem.factor.pivots_I)
        nearest = problem.loss(weight - grid.value(grid.levels(weight)))
        fed = feed_back(weight, problem.factor, grid).loss_O
        worse += int((fed > nearest).sum())
        losses += torch.stack([fed.sum(), nearest.sum()])
        shipped, _ = _rounded(_PLAIN, weight, exact(hessian), fmt)
        assert bool((problem.loss(weight - shipped) <= nearest * (1 + 1e-12)).all())
    assert losses[0] < losses[1]
    assert worse > 0  # or the choice by row would be idle


def test_against_every_code_there_is() -> None:
    """All 16^4 codes of four weights: optimum <= descent <= feedback, and Babai's bound."""
    every = torch.cartesian_prod(*[torch.arange(-8, 8, dtype=torch.float64)] * 4)
    ratios, unpolished = [], []
    for seed in range(40):
        hessian, weight = covariance(4, seed=seed, power=4), normal(1, 4, seed=seed)
        grid = search_scales(weight, FreeFormat())
        order_I = _orders(hessian)["activation"]
        factor = factorise(hessian, order_I)
        assert factor is not None
        scale = float(grid.scales_OG[0, 0])
        optimum = float(quadratic(weight - every * scale, hessian).min())
        fed = feed_back(weight, factor, grid)
        levels = fed.levels_OI
        for _ in range(4):
            levels, _ = descend(weight, levels, grid, hessian, order_I)
        polished = float(quadratic(weight - grid.value(levels), hessian)[0])
        assert optimum <= polished * (1 + 1e-9)
        assert polished <= float(fed.loss_O[0]) * (1 + 1e-9)
        if int(levels.min()) > -8 and int(levels.max()) < 7:
            bound = scale**2 / 4 * float(factor.pivots_I.sum())
            assert float(fed.loss_O[0]) <= bound * (1 + 1e-9)
        ratios.append(polished / optimum)
        unpolished.append(float(fed.loss_O[0]) / optimum)
    assert sorted(ratios)[len(ratios) // 2] == pytest.approx(1, abs=1e-9)
    assert max(unpolished) > 1.1  # or there would be nothing to polish


def test_the_target_is_the_weight_when_nothing_upstream_is_quantized() -> None:
    x, weight = correlated(400, 32), normal(8, 32).double()
    for centred in (True, False):
        problem = Moments.of(stats_of(x), centred=centred).problem(0.01)
        torch.testing.assert_close(problem.target(weight, 1.0), weight, rtol=1e-9, atol=1e-9)


def test_the_target_undoes_an_invertible_change_of_the_inputs() -> None:
    x, weight = correlated(4000, 24), normal(8, 24)
    mix = torch.eye(24) + 0.1 * normal(24, 24, seed=9)
    y = x @ mix.T + 0.5
    wanted = weight.double() @ torch.linalg.inv(mix.double())
    problem = Moments.of(stats_of(x, y), centred=True).problem(1e-9)
    got = problem.target(weight, 1.0)
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()
    half = problem.target(weight, 0.5)
    torch.testing.assert_close(half, (weight.double() + got) / 2)
    # End to end, on a grid too fine to matter: the layer's output is restored, bias included.
    fine = FreeFormat(n_levels=(32767, 32767))
    rounder = Gptq(damping=(1e-6,), correct=(0.0, 0.5, 1.0))
    decoded, rounded = _rounded(rounder, weight, inputs_of(x, y), fine)
    assert rounded.notes["correct"] == 1.0
    assert _true_error(weight, decoded, rounded.shift_O, x, y) < 1e-5
    assert _true_error(weight, weight, None, x, y) > 1e-2


def test_correction_is_refused_where_the_relation_of_x_and_y_is_not_learnt() -> None:
    x = correlated(90, 64)
    y = x + 0.3 * normal(90, 64, seed=5)
    rounder = Gptq(damping=(1e-3,), correct=(0.0, 1.0))
    _, rounded = _rounded(rounder, normal(32, 64), inputs_of(x, y, held=0.3), _INT4)
    assert rounded.notes["correct"] == 0.0


def test_damping_grows_when_rows_are_few() -> None:
    weight, chosen = normal(32, 64), {}
    for rows in (100, 20000):
        inputs = inputs_of(correlated(rows, 64))
        rounder = Gptq(damping=(1e-4, 1e-1), correct=(0.0,))
        chosen[rows] = rounder.round(weight, inputs, _INT4).notes["damping"]
    assert chosen == {100: 1e-1, 20000: 1e-4}


def test_the_judge_ranks_as_the_rows_do() -> None:
    """Its loss differs from the true error of held-out rows by what does not depend on Q."""
    x, weight = correlated(600, 24), normal(6, 24)
    y = x + 0.1 * normal(600, 24, seed=2) + 0.2
    for bias in (True, False):
        inputs = inputs_of(x, y, bias=bias)
        assert inputs.held_out is not None
        fit = Moments.of(inputs.fit, centred=bias)
        judge = Judge(fit=fit, held_out=inputs.held_out)
        offsets = []
        for seed in range(3):
            candidate = (weight + 0.3 * normal(6, 24, seed=seed)).double()
            held_x, held_y = x[480:].double(), y[480:].double()
            error = held_x @ weight.double().T - held_y @ candidate.T
            error = error - fit.shift(weight, candidate)
            truth = float(error.square().mean(0).sum())
            offsets.append(truth - judge.loss(weight, candidate))
        # Statistics are sums of float32 products; the offsets themselves differ by far more.
        assert offsets == pytest.approx([offsets[0]] * 3, rel=1e-6)


def test_a_bias_that_takes_the_mean_never_costs() -> None:
    x, weight = correlated(2000, 64, mean=3.0), normal(32, 64)
    inputs = inputs_of(x, held=0)
    decoded, rounded = _rounded(Gptq(), weight, inputs, _INT4)
    assert rounded.shift_O is not None
    assert rounded.shift_O.dtype == torch.float32
    mean = inputs.fit.mean_x_I
    wanted = weight.double() @ mean - decoded.double() @ mean
    torch.testing.assert_close(rounded.shift_O.double(), wanted, rtol=1e-5, atol=1e-6)
    with_bias = _true_error(weight, decoded, rounded.shift_O, x)
    assert with_bias <= _true_error(weight, decoded, None, x)
    # and codes found for centred inputs beat codes that have to hold the mean as well
    without = replace(inputs, takes_bias=False)
    held, none = _rounded(Gptq(), weight, without, _INT4)
    assert none.shift_O is None
    assert _db(with_bias) < _db(_true_error(weight, held, None, x)) - 0.3


def test_all_rows_are_used_once_damping_and_correction_are_chosen() -> None:
    x, weight = correlated(600, 32), normal(8, 32)
    one = _PLAIN.round(weight, inputs_of(x, held=0.5), _INT4)
    all_rows = _PLAIN.round(weight, inputs_of(x, held=0), _INT4)
    half = _PLAIN.round(weight, inputs_of(x[:300], held=0), _INT4)
    assert torch.equal(one.payload["levels"], all_rows.payload["levels"])
    assert not torch.equal(one.payload["levels"], half.payload["levels"])


def test_dead_inputs_are_rounded_to_nearest_and_disturb_nobody() -> None:
    x, weight = correlated(800, 64), normal(16, 64)
    x[:, 7], x[:, 20] = 0.0, 2.5  # silent, and constant
    decoded, rounded = _rounded(_PLAIN, weight, inputs_of(x, held=0), _INT4)
    assert rounded.notes["dead_inputs"] == 2
    step = rounded.payload["scales"].float().repeat_interleave(16, dim=1)
    nearest = (weight / step).round().clamp(-8, 7) * step
    assert torch.equal(decoded[:, [7, 20]], nearest[:, [7, 20]])
    # Their weights do not matter to the levels of other groups, nor to the output.
    other = weight.clone()
    other[:, 7] += 0.2
    again, _ = _rounded(_PLAIN, other, inputs_of(x, held=0), _INT4)
    assert torch.equal(again[:, 16:], decoded[:, 16:])
    assert _true_error(weight, decoded, rounded.shift_O, x) < 0.01
    uncentred, counted = _rounded(_PLAIN, weight, inputs_of(x, held=0, bias=False), _INT4)
    assert counted.notes["dead_inputs"] == 1
    assert _true_error(weight, uncentred, None, x) < 0.05


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group", [16, None])
@pytest.mark.parametrize(
    "case", ["silent", "one row", "few rows", "twins", "outlier", "zero row", "tiny", "one output"]
)
def test_no_inputs_make_it_worse_than_rounding_to_nearest(
    case: str, group: int | None, asymmetric: bool
) -> None:
    x, weight = correlated(200, 64), normal(6, 64)
    if case == "silent":
        x = torch.zeros(200, 64)
    elif case == "one row":
        x = x[:1]
    elif case == "few rows":
        x = x[:20]
    elif case == "twins":
        x = torch.cat([x[:, :32], x[:, :32]], dim=1)
    elif case == "outlier":
        weight[2, 5] = 1e4
    elif case == "zero row":
        weight[3] = 0
    elif case == "tiny":
        weight, x = weight * 1e-6, x * 1e-6
    elif case == "one output":
        weight = weight[:1]
    fmt = FreeFormat(group=group, asymmetric=asymmetric)
    for held in (0.0, 0.25):
        if case == "one row" and held:
            continue
        inputs = inputs_of(x, held=held)
        decoded, rounded = _rounded(Gptq(polish=1), weight, inputs, fmt)
        assert bool(torch.isfinite(decoded).all())
        assert rounded.shift_O is not None
        assert bool(torch.isfinite(rounded.shift_O).all())
        # Nearest rounding of the same target on the first grid bounds the loss, row by row.
        moments = Moments.of(inputs.everything(), centred=True)
        problem = moments.problem(float(rounded.notes["damping"]))
        target = problem.target(weight, float(rounded.notes["correct"]))
        grid = search_scales(target.float(), fmt, problem.factor.pivots_I)
        nearest = problem.loss(target - grid.value(grid.levels(target.float())))
        assert bool((problem.loss(target - decoded) <= nearest * (1 + 1e-9)).all())
        if case == "zero row":
            assert not bool(decoded[3].any())
        if case == "outlier":
            assert float(decoded[2, 5]) == pytest.approx(1e4, rel=0.07)
            assert _true_error(weight, decoded, rounded.shift_O, x) < 0.1


def test_what_cannot_be_rounded_is_refused_with_a_reason() -> None:
    weight, inputs = normal(4, 32), inputs_of(correlated(100, 32), held=0)
    with pytest.raises(ValueError, match="calibrate"):
        Gptq().round(weight, None, _INT4)
    with pytest.raises(ValueError, match=r"\(4, 16\) and statistics of 32 inputs"):
        Gptq().round(weight[:, :16], inputs, _INT4)
    with pytest.raises(ValueError, match="weight holds NaN"):
        Gptq().round(weight * torch.nan, inputs, _INT4)
    broken = replace(
        inputs, fit=replace(inputs.fit, products_yy_II=torch.full((32, 32), torch.nan))
    )
    with pytest.raises(ValueError, match="covariance holds NaN"):
        Gptq().round(weight, broken, _INT4)
    moments = replace(inputs, fit=replace(inputs.fit, products_yy_II=None, products_xy_II=None))
    with pytest.raises(ValueError, match="without products"):
        Gptq().round(weight, moments, _INT4)
    with pytest.raises(ValueError, match="not positive definite"):
        Moments.of(
            exact(torch.eye(4) - 99 * torch.ones(4, 4).fill_diagonal_(0)).fit, centred=True
        ).problem(1e-9)


def test_a_covariance_that_does_not_factor_is_damped_ten_times_more() -> None:
    hessian = torch.eye(8).double()
    hessian[0, 1] = hessian[1, 0] = 1.005  # not a covariance by half a percent
    problem = Moments.of(exact(hessian).fit, centred=True).problem(1e-4)
    assert problem.damping == pytest.approx(1e-2)


@pytest.mark.parametrize(
    "changed",
    [{}, {"order": "natural", "refit": False}, {"scale_weights": "ones", "polish": 0}],
)
def test_the_same_layer_gives_the_same_codes_in_any_row_chunks(
    changed: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, inputs = normal(20, 64), inputs_of(correlated(400, 64))
    whole = Gptq(**changed).round(weight, inputs, _INT4)
    again = Gptq(**changed).round(weight, inputs, _INT4)
    monkeypatch.setattr(gptq_module, "_ROWS_AT_ONCE", 11)
    parts = Gptq(**changed).round(weight, inputs, _INT4)
    for other in (again, parts):
        assert torch.equal(whole.payload["levels"], other.payload["levels"])
        assert torch.equal(whole.payload["scales"], other.payload["scales"])
    assert whole.notes == again.notes


def _vanilla(weight: Tensor, hessian: Tensor, group: int) -> Grid:
    largest = weight.reshape(len(weight), -1, group).abs().amax(2) / 7
    return Grid(scales_OG=largest.half().float(), zeros_OG=None, group=group, below=8, above=7)


@pytest.mark.parametrize(("power", "least_db"), [(1.0, 5.0), (1.5, 3.0)])
def test_each_ingredient_earns_its_place_on_a_realistic_layer(
    power: float, least_db: float
) -> None:
    """Correlated inputs, log-normal channel gains, int4 in groups of 64: decibels, cumulative."""
    fmt, weight = FreeFormat(group=64), normal(192, 256)
    x = correlated(5120, 256, power=power, gain=1.0 if power == 1.0 else 0.5)
    inputs = inputs_of(x)
    hessian = stats_of(x).hessian(centred=True)
    full = float(quadratic(weight, hessian).sum())

    def loss(decoded: Tensor) -> float:
        return _db(float(quadratic(weight - decoded, hessian).sum()) / full)

    mse = search_scales(weight, fmt)
    vanilla = _vanilla(weight, hessian, 64)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(256, dtype=torch.float64)
    factor = factorise(damped, torch.arange(256))
    assert factor is not None
    steps = {
        "nearest, largest entry": loss(vanilla.value(vanilla.levels(weight))),
        "nearest, searched": loss(mse.value(mse.levels(weight))),
        "gptq as others ship it": loss(vanilla.value(feed_back(weight, factor, vanilla).levels_OI)),
        "no polish": loss(_rounded(Gptq(polish=0), weight, inputs, fmt)[0]),
        "all": loss(_rounded(Gptq(), weight, inputs, fmt)[0]),
    }
    for worse, better in itertools.pairwise(steps):
        assert steps[better] < steps[worse] - 0.03, steps
    assert steps["all"] < steps["gptq as others ship it"] - least_db, steps
