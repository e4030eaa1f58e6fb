"""Grid and search_scales: the rate-distortion table, slow oracles, and weights that are strange."""

from __future__ import annotations

import itertools
import math
import shutil

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from hbxt_compress.algorithms import scales
from hbxt_compress.algorithms.compiled import Compiled
from hbxt_compress.algorithms.grid import Grid
from hbxt_compress.algorithms.rtn import Rtn
from hbxt_compress.algorithms.scales import search_scales
from hbxt_compress.formats import FORMATS
from hbxt_compress.stats import LayerInputs, LayerStats
from tests.oracles.free_format import FreeFormat

_FORMATS = {
    "int4": FreeFormat(group=32),
    "int4-asym": FreeFormat(group=32, asymmetric=True),
    "int4-row": FreeFormat(group=None),
    "int8": FreeFormat(group=None, n_levels=(127, 127)),
    "int8-g64": FreeFormat(group=64, n_levels=(128, 127)),
    "int8-g64-asym": FreeFormat(group=64, n_levels=(128, 127), asymmetric=True),
}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _gauss(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=_generator(seed))


def _sources(n: int) -> dict[str, Tensor]:
    """Weights of three tails, n / 1024 rows of 1024: exact quantiles in random order."""
    quantiles = (np.arange(n) + 0.5) / n
    found = {}
    for seed, (name, distribution) in enumerate(
        {"gauss": stats.norm, "laplace": stats.laplace, "student-t5": stats.t(5)}.items()
    ):
        values = torch.from_numpy(distribution.ppf(quantiles)).float()
        found[name] = values[torch.randperm(n, generator=_generator(seed))].reshape(-1, 1024)
    return found


_SOURCES = _sources(1 << 19)


def _loss_OG(
    weight_OI: Tensor, grid: Grid, importance_I: Tensor | None = None, norm: float = 2.0
) -> Tensor:
    """Weighted power of the error by group, float64, the slow way: encode, decode, compare."""
    error_OI = (weight_OI - grid.value(grid.levels(weight_OI))).double().abs().pow(norm)
    if importance_I is not None:
        error_OI = error_OI * importance_I.double()
    return error_OI.reshape(len(weight_OI), -1, grid.group).sum(-1)


def _db(weight_OI: Tensor, grid: Grid) -> float:
    lost = (weight_OI - grid.value(grid.levels(weight_OI))).double().square().sum()
    return 10 * math.log10(float(lost / weight_OI.double().square().sum()))


# Measured by others; the row for Laplace again, by a literal search of 2^23 weights.
# amax/7, the largest entry on -8 (ONNX Runtime), searched, min/max with zeros, searched with zeros
_TABLE = {
    ("gauss", 256): (-17.95, -19.10, -19.88, -19.21, -19.94),
    ("gauss", 128): (-18.59, -19.71, -20.29, -19.94, -20.45),
    ("gauss", 64): (-19.35, -20.45, -20.93, -20.81, -21.22),
    ("gauss", 32): (-20.26, -21.32, -21.82, -21.86, -22.28),
    ("gauss", 16): (-21.39, -22.41, -23.03, -23.16, -23.72),
    ("laplace", 64): (-17.03, -18.13, -18.58, -18.99, -19.33),
    ("student-t5", 64): (-16.70, -17.82, -18.28, -19.00, -19.34),
}


@pytest.mark.parametrize(("source", "group"), _TABLE)
def test_the_rate_distortion_table(source: str, group: int) -> None:
    weight = _SOURCES[source]
    symmetric, asymmetric = (FreeFormat(group=group, asymmetric=a) for a in (False, True))
    seven = FreeFormat(group=group, n_levels=(7, 7))
    got = (
        _db(weight, search_scales(weight, seven, thorough=False)),
        _db(weight, search_scales(weight, symmetric, thorough=False)),
        _db(weight, search_scales(weight, symmetric)),
        _db(weight, search_scales(weight, asymmetric, thorough=False)),
        _db(weight, search_scales(weight, asymmetric)),
    )
    differences = [one - table for one, table in zip(got, _TABLE[source, group], strict=True)]
    assert max(differences) <= 0.05
    # Small groups gain from ratios that the table's own search did not try.
    gains = {32: (0.0, 0.05), 16: (0.1, 0.2)}.get(group, (0.0, 0.0))
    assert min(differences[i] for i in (0, 1, 3)) >= -0.05
    assert differences[2] >= -0.05 - gains[0]
    assert differences[4] >= -0.05 - gains[1]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", _FORMATS)
def test_a_grid_holds_what_the_contract_says(name: str, weighted: bool) -> None:
    fmt, weight = _FORMATS[name], _gauss(24, 192, seed=2)
    importance = torch.rand(192, generator=_generator(3)) if weighted else None
    grid = search_scales(weight, fmt, importance)
    size = fmt.group or 192
    assert (grid.group, grid.below, grid.above) == (size, *fmt.n_levels)
    assert grid.scales_OG.shape == (24, 192 // size)
    assert grid.scales_OG.dtype == torch.float32
    assert torch.equal(grid.scales_OG.half().float(), grid.scales_OG)
    assert bool((grid.scales_OG != 0).all())
    assert (grid.zeros_OG is not None) == fmt.asymmetric
    if grid.zeros_OG is not None:
        assert grid.zeros_OG.dtype == torch.float32
        assert torch.equal(grid.zeros_OG, grid.zeros_OG.round())
        assert -fmt.n_levels[0] <= float(grid.zeros_OG.min())
        assert float(grid.zeros_OG.max()) <= fmt.n_levels[1]
        assert bool((grid.scales_OG > 0).all())
    levels = grid.levels(weight)
    assert torch.equal(levels, levels.round())
    assert -grid.below <= float(levels.min())
    assert float(levels.max()) <= grid.above
    assert torch.equal(grid.levels(grid.value(levels)), levels)
    again = search_scales(weight, fmt, importance)
    assert torch.equal(again.scales_OG, grid.scales_OG)


@pytest.mark.parametrize("name", _FORMATS)
def test_columns_in_any_order_are_the_columns_of_the_grid(name: str) -> None:
    fmt, weight = _FORMATS[name], _gauss(8, 192, seed=2)
    grid = search_scales(weight, fmt)
    order = torch.randperm(192, generator=_generator(4))[:77]
    scale, zero = grid.columns(order)
    assert scale.shape == (8, 77)
    zero = torch.zeros_like(scale) if zero is None else zero
    levels = (weight[:, order] / scale).round().add(zero).clamp(-grid.below, grid.above)
    assert torch.equal(levels, grid.levels(weight)[:, order])
    assert torch.equal((levels - zero) * scale, grid.value(grid.levels(weight))[:, order])


@pytest.mark.parametrize("asymmetric", [False, True])
def test_levels_are_the_nearest_of_all(asymmetric: bool) -> None:
    grid = search_scales(_gauss(6, 64, seed=5), FreeFormat(group=32, asymmetric=asymmetric))
    weight = 2 * _gauss(6, 64, seed=6)
    every = torch.stack([grid.value(torch.full((6, 64), float(one))) for one in range(-8, 8)])
    least = (every - weight).abs().amin(0)
    torch.testing.assert_close((grid.value(grid.levels(weight)) - weight).abs(), least)


def _every_scale(asymmetric: bool) -> Tensor:
    """Every float16 between 0.05 and 1, of both signs where signs matter."""
    every = torch.arange(0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    every = every[(every > 0.05) & (every < 1.0)]
    return every if asymmetric else torch.cat([every, -every])


@pytest.mark.parametrize("norm", [2.0, 3.5])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_search_comes_close_to_the_best_of_all_float16_scales(
    norm: float, asymmetric: bool, weighted: bool
) -> None:
    groups = _gauss(12, 32, seed=4)
    importance = torch.exp(2 * _gauss(32, seed=7)) if weighted else torch.ones(32)
    fmt = FreeFormat(group=32, asymmetric=asymmetric)
    found = search_scales(groups, fmt, importance, norm=norm)
    every = _every_scale(asymmetric)[:, None]
    got, least = _loss_OG(groups, found, importance, norm)[:, 0], []
    for row in groups:
        losses = []
        for zero in range(-8, 8) if asymmetric else (0,):
            levels = (row / every).round().add(zero).clamp(-8, 7)
            error = (row - (levels - zero) * every).abs()
            losses.append((error.pow(norm) * importance).sum(1).min())
        least.append(torch.stack(losses).min())
    ratio = (got / torch.stack(least)).pow(2 / norm)
    assert float(ratio.min()) > 1 - 1e-5
    assert float(ratio.max()) < 1.06
    assert float(ratio.mean()) < 1.015


@pytest.mark.parametrize("deepest", [(-8, 5), (-5, 7), (-7, 7), (-6, 6)])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_a_weight_that_lies_on_a_grid_is_found_exactly(
    asymmetric: bool, deepest: tuple[int, int]
) -> None:
    """No ratio that is tried hits most of these scales: sign, ratio and refit must all do so."""
    low, high = deepest
    levels = torch.randint(low, high + 1, (40, 64), generator=_generator(21)).float()
    levels[:, 0], levels[:, 32], levels[:, 1], levels[:, 33] = low, low, high, high
    steps = (torch.rand(40, 2, generator=_generator(22)) + 0.5).half().float()
    steps *= torch.tensor([1.0, -1.0]) * (1 if not asymmetric else -1)
    weight = levels * steps.repeat_interleave(32, dim=1)
    grid = search_scales(weight, FreeFormat(group=32, asymmetric=asymmetric))
    torch.testing.assert_close(grid.value(grid.levels(weight)), weight, rtol=0, atol=0)


def test_the_largest_entry_is_cut_off_where_the_deep_end_suits_the_others_better() -> None:
    weight = torch.randint(-6, 7, (1, 32), generator=_generator(23)).float()
    weight[0, :8] = -8.0
    weight[0, 8] = 8.3
    grid = search_scales(weight, FreeFormat(group=32))
    assert float(grid.scales_OG) == pytest.approx(1, abs=0.02)
    assert grid.levels(weight)[0, :9].tolist() == [-8.0] * 8 + [7.0]


@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_search_never_loses_to_the_range_alone(asymmetric: bool) -> None:
    weight = _SOURCES["student-t5"][:64]
    importance = torch.exp(2 * _gauss(1024, seed=8))
    for group, weights in itertools.product((32, 128), (None, importance)):
        fmt = FreeFormat(group=group, asymmetric=asymmetric)
        searched, plain = (search_scales(weight, fmt, weights, thorough=t) for t in (True, False))
        losses = [_loss_OG(weight, grid, weights) for grid in (searched, plain)]
        assert bool((losses[0] <= losses[1] * (1 + 1e-5)).all())
        assert float(losses[0].sum()) < 0.95 * float(losses[1].sum())


def test_a_higher_norm_cuts_off_less_and_loses_more_squares() -> None:
    weight, fmt = _SOURCES["laplace"], FreeFormat(group=128)
    worst, squares = [], []
    for norm in (2.0, 3.0, 8.0):
        grid = search_scales(weight, fmt, norm=norm)
        error = (weight - grid.value(grid.levels(weight))).double().abs()
        worst.append(float(error.amax(1).mean()))
        squares.append(float(error.square().mean()))
    assert worst[0] > 1.05 * worst[1] > 1.05 * 1.05 * worst[2]
    assert squares[0] < squares[1] < squares[2]


def test_importance_moves_the_error_where_it_costs_little() -> None:
    weight = _SOURCES["gauss"][:256]
    importance = torch.exp(2 * _gauss(1024, seed=9))
    fmt = FreeFormat(group=64)
    blind, seeing = (search_scales(weight, fmt, one) for one in (None, importance))
    cost = [float(_loss_OG(weight, grid, importance).sum()) for grid in (blind, seeing)]
    plain = [float(_loss_OG(weight, grid).sum()) for grid in (blind, seeing)]
    assert 10 * math.log10(cost[0] / cost[1]) > 1
    assert plain[0] < plain[1]
    # Only ratios within a group count, so any factor on a group changes nothing.
    factor = torch.tensor([1e-20, 1.0, 1e20, 3.0]).repeat_interleave(64).repeat(4)
    scaled = search_scales(weight, fmt, importance * factor)
    torch.testing.assert_close(
        _loss_OG(weight, scaled, importance), _loss_OG(weight, seeing, importance)
    )


@pytest.mark.parametrize("name", _FORMATS)
def test_rows_in_chunks_equal_rows_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _gauss(64, 192, seed=5)
    whole = search_scales(weight, _FORMATS[name])
    monkeypatch.setattr(scales, "_WEIGHTS_AT_ONCE", 192 * 5)
    parts = search_scales(weight, _FORMATS[name])
    assert torch.equal(whole.scales_OG, parts.scales_OG)
    assert whole.zeros_OG is None or torch.equal(whole.zeros_OG, parts.zeros_OG)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("thorough", [False, True])
def test_strange_groups_get_a_defined_grid(asymmetric: bool, thorough: bool) -> None:
    fmt = FreeFormat(group=32, asymmetric=asymmetric)
    weight = _gauss(8, 64, seed=10)
    weight[0, :32] = 0  # nothing
    weight[1, 7] = 1e4  # one outlier
    weight[2, :32] = 3e-9  # below what float16 scales reach
    weight[3, 5] = 3e6  # above
    weight[4, :32] = 0.7  # constant
    weight[5, :32] = weight[5, :32].abs() + 1  # one-sided
    importance = torch.ones(64)
    importance[32:] = 0  # a group that does not matter
    for given in (None, importance, torch.zeros(64)):
        grid = search_scales(weight, fmt, given, thorough=thorough)
        decoded = grid.value(grid.levels(weight))
        assert bool(torch.isfinite(decoded).all())
        assert torch.equal(decoded[0, :32], torch.zeros(32))
        assert abs(float(decoded[1, 7]) - 1e4) < 10
        assert torch.equal(decoded[2, :32].abs() > 1e-7, torch.zeros(32, dtype=torch.bool))
        assert float(decoded[3, 5]) >= 65504 * 7
        assert (decoded[4, :32] - 0.7).abs().max() < 1e-3
        assert (decoded[6:] - weight[6:]).square().mean() < 0.02 * weight[6:].square().mean()


def test_an_entry_of_no_importance_sets_no_range() -> None:
    weight = _gauss(4, 64, seed=11)
    weight[:, 3] = 1e4
    importance = torch.ones(64)
    importance[3] = 0
    grid = search_scales(weight, FreeFormat(group=64), importance)
    error = (weight - grid.value(grid.levels(weight))).square()
    assert float((error * importance).mean()) < 0.02


@pytest.mark.parametrize(
    ("weight", "fmt", "importance", "message"),
    [
        (torch.ones(2, 96), FORMATS["int4-g64"], None, "96 input features.* 64.*fits"),
        (torch.ones(2, 64), FORMATS["fp16"], None, "fp16 has no levels"),
        (torch.ones(64), FORMATS["int4-g64"], None, "expected O I"),
        (torch.full((2, 64), math.nan), FORMATS["int4-g64"], None, "weight holds NaN"),
        (torch.full((2, 64), math.inf), FORMATS["int4-g64"], None, "weight holds NaN or inf"),
        (torch.ones(2, 64), FORMATS["int4-g64"], torch.ones(32), "for 64 inputs"),
        (torch.ones(2, 64), FORMATS["int4-g64"], -torch.ones(64), "negative"),
        (torch.ones(2, 64), FORMATS["int4-g64"], torch.full((64,), math.nan), "importance.*NaN"),
    ],
)
def test_bad_input_is_refused(weight, fmt, importance, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search_scales(weight, fmt, importance)


def _inputs(n_in: int, *, takes_bias: bool) -> tuple[LayerInputs, Tensor, Tensor]:
    """Inputs with means and unequal variances, the quantized ones a little off."""
    x = _gauss(2048, n_in, seed=12) * torch.exp(_gauss(n_in, seed=13)) + _gauss(n_in, seed=14)
    y = x + 0.05 * _gauss(2048, n_in, seed=15) + 0.1
    fit = LayerStats.empty(n_in, "moments")
    fit.add(x, y)
    return LayerInputs(fit=fit, held_out=None, takes_bias=takes_bias), x.double(), y.double()


@pytest.mark.parametrize("name", ["int4-g64", "int4-g64-asym", "int8-channel", "int4-g32-r16"])
@pytest.mark.parametrize("takes_bias", [False, True])
def test_weighted_rounding_does_least_harm_to_the_output(name: str, takes_bias: bool) -> None:
    weight, fmt = _gauss(96, 256, seed=16), FORMATS[name]
    inputs, x, y = _inputs(256, takes_bias=takes_bias)
    errors = {}
    for search in ("mse", "weighted"):
        rounded = Rtn(search=search).round(weight, inputs, fmt)
        assert (rounded.shift_O is not None) == (takes_bias and search == "weighted")
        error = x @ weight.double().T - y @ fmt.decode(rounded.payload).double().T
        if rounded.shift_O is not None:
            error = error - rounded.shift_O.double()
            assert error.mean(0).abs().max() < 1e-5  # what a bias can take, it takes
        errors[search] = float(error.square().mean())
    assert errors["weighted"] < errors["mse"]


def test_rounding_without_statistics_needs_no_inputs() -> None:
    weight = _gauss(80, 128, seed=17)
    for search in ("none", "mse"):
        assert Rtn(search=search).need is None
        rounded = Rtn(search=search).round(weight, None, FORMATS["int4-g64"])
        assert rounded.shift_O is None
    assert Rtn(search="weighted").need == "moments"
    with pytest.raises(ValueError, match="calibrate"):
        Rtn(search="weighted").round(weight, None, FORMATS["int4-g64"])


def test_a_norm_without_a_search_is_refused() -> None:
    assert Rtn(search="weighted", norm=3.0).norm == 3
    with pytest.raises(ValueError, match=r"norm 3: without a search no error is minimised"):
        Rtn(search="none", norm=3.0)


def test_a_low_rank_branch_takes_what_is_low_rank() -> None:
    weight = _gauss(96, 128, seed=18) * 0.01 + _gauss(96, 4, seed=19) @ _gauss(4, 128, seed=20)
    errors = []
    for name in ("int4-g64", "int4-g64-r16"):
        decoded = FORMATS[name].decode(Rtn().round(weight, None, FORMATS[name]).payload)
        errors.append(float((weight - decoded).square().mean()))
    assert errors[1] < 1e-3 * errors[0]


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiled code needs a C++ compiler")
@pytest.mark.parametrize(
    ("name", "norm", "weighted"), [("int4-g128", 3.5, False), ("int4-g64-asym", 2.0, True)]
)
def test_compiled_code_finds_what_the_other_finds(
    name: str, norm: float, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for groups with two trials tied to the last bits, each then refitted apart."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(64, 512, generator=generator)
    weight_OI *= torch.exp(torch.randn(64, 1, generator=generator))
    weight_OI[3] = 0
    importance_I = torch.rand(512, generator=generator) if weighted else None
    found = []
    for eager_up_to in (1 << 40, 0):
        monkeypatch.setattr(scales, "_EAGER_UP_TO", eager_up_to)
        found.append(search_scales(weight_OI, FORMATS[name], importance_I, norm=norm))
    plain, compiled = found
    root_I = torch.ones(512) if importance_I is None else importance_I.pow(1 / norm)
    lost = [
        torch.linalg.vector_norm((weight_OI - g.value(g.levels(weight_OI))) * root_I, norm, -1)
        for g in found
    ]
    alike_OG = plain.scales_OG == compiled.scales_OG
    assert (~alike_OG).float().mean() < 0.005
    assert torch.allclose(*(one[alike_OG.all(1)] for one in lost), rtol=1e-6)
    assert torch.allclose(*lost, rtol=1e-3)
    assert torch.equal(compiled.scales_OG, compiled.scales_OG.half().float())


def test_a_machine_without_a_compiler_is_told_what_it_costs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> object:
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(scales, "_CODE", Compiled("scales of large weights are searched"))
    monkeypatch.setattr(scales, "_EAGER_UP_TO", 0)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: refuse)
    weight_OI = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    grid = search_scales(weight_OI, FORMATS["int4-g64"])
    assert "no working C++ compiler" in caplog.text
    monkeypatch.undo()
    assert torch.equal(grid.scales_OG, search_scales(weight_OI, FORMATS["int4-g64"]).scales_OG)
