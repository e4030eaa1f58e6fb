"""Descent and scale refit: exact, never upwards, and as a literal search finds them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hbxt_compress.algorithms.grid import Grid
from hbxt_compress.algorithms.polish import descend, refit_scales
from hbxt_compress.algorithms.scales import search_scales
from hbxt_compress.stats import quadratic
from tests.oracles import gptq_literal
from tests.oracles.free_format import FreeFormat
from tests.oracles.inputs import covariance, normal


def _start(
    n_out: int, n_in: int, *, asymmetric: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor, Grid, Tensor, Tensor]:
    hessian, weight = covariance(n_in, seed=seed), normal(n_out, n_in, seed=seed)
    grid = search_scales(weight, FreeFormat(group=16, asymmetric=asymmetric))
    order = hessian.diagonal().argsort(descending=True, stable=True)
    return weight, hessian, grid, grid.levels(weight).double(), order


def _loss(weight: Tensor, levels: Tensor, grid: Grid, hessian: Tensor) -> Tensor:
    return quadratic(weight - grid.value(levels).double(), hessian)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("n_out", "n_in"), [(3, 32), (1, 144)])
def test_a_sweep_is_that_of_a_literal_search_over_every_level(
    n_out: int, n_in: int, asymmetric: bool
) -> None:
    weight, hessian, grid, levels, order = _start(n_out, n_in, asymmetric=asymmetric)
    moved, gain = descend(weight, levels, grid, hessian, order)
    scales, zeros = grid.columns(torch.arange(n_in))
    literal = gptq_literal.descend(
        weight.double().numpy(),
        levels.numpy(),
        hessian.numpy(),
        scales.double().numpy(),
        (torch.zeros_like(scales) if zeros is None else zeros).double().numpy(),
        (grid.below, grid.above),
        order.tolist(),
    )
    assert torch.equal(moved, torch.from_numpy(literal))
    assert bool((gain > 0).all())
    fell = _loss(weight, levels, grid, hessian) - _loss(weight, moved, grid, hessian)
    torch.testing.assert_close(gain, fell, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_no_step_raises_the_loss_of_any_row(seed: int, asymmetric: bool) -> None:
    weight, hessian, grid, levels, order = _start(24, 160, asymmetric=asymmetric, seed=seed)
    losses = [_loss(weight, levels, grid, hessian)]
    for _ in range(3):
        levels, gained = descend(weight, levels, grid, hessian, order)
        losses.append(_loss(weight, levels, grid, hessian))
        grid, gain = refit_scales(weight, levels, grid, hessian)
        losses.append(_loss(weight, levels, grid, hessian))
        torch.testing.assert_close(losses[-2] - losses[-1], gain, rtol=1e-6, atol=1e-9)
        assert torch.equal(grid.scales_OG, grid.scales_OG.half().float())
        assert torch.equal(losses[-1] < losses[-2], gain > 0)
        torch.testing.assert_close(losses[-3] - losses[-2], gained, rtol=1e-6, atol=1e-9)
    for before, after in itertools.pairwise(losses):
        assert bool((after <= before * (1 + 1e-12)).all())
    assert losses[-1].sum() < 0.8 * losses[0].sum()
    assert -8 <= int(levels.min()) <= int(levels.max()) <= 7


def test_descent_ends_where_no_single_change_helps() -> None:
    weight, hessian, grid, levels, order = _start(4, 48)
    for _ in range(50):
        before = levels
        levels, gain = descend(weight, before, grid, hessian, order)
        if torch.equal(levels, before):
            break
    assert not bool(gain.any())
    least = _loss(weight, levels, grid, hessian)
    for column in range(48):
        for step in (-1, 1):
            trial = levels.clone()
            trial[:, column] = (trial[:, column] + step).clamp(-8, 7)
            assert bool((_loss(weight, trial, grid, hessian) >= least * (1 - 1e-12)).all())


@pytest.mark.parametrize("asymmetric", [False, True])
def test_refit_is_least_squares_in_the_scales(asymmetric: bool) -> None:
    """Against lstsq on the square root of the Hessian, to the rounding of float16."""
    weight, hessian, grid, levels, _ = _start(6, 64, asymmetric=asymmetric)
    fitted, gain = refit_scales(weight, levels, grid, hessian)
    assert bool((gain > 0).all())
    root = torch.linalg.cholesky(hessian)
    zeros = 0 if grid.zeros_OG is None else grid.zeros_OG.repeat_interleave(16, dim=1)
    for row, units in enumerate(levels - zeros):
        blocks = torch.stack([units[g * 16 : g * 16 + 16] @ root[g * 16 : g * 16 + 16]
                              for g in range(4)], dim=1)  # fmt: skip
        wanted = torch.linalg.lstsq(blocks, (weight[row].double() @ root)[:, None]).solution[:, 0]
        torch.testing.assert_close(fitted.scales_OG[row].double(), wanted, rtol=2**-11, atol=0)


def test_a_group_without_levels_keeps_its_scale_and_others_are_refit() -> None:
    weight, hessian, grid, levels, _ = _start(3, 64)
    levels[1, 16:32] = 0
    fitted, _ = refit_scales(weight, levels, grid, hessian)
    assert fitted.scales_OG[1, 1] == grid.scales_OG[1, 1]
    assert bool((fitted.scales_OG[1, [0, 2, 3]] != grid.scales_OG[1, [0, 2, 3]]).any())
    nothing, gain = refit_scales(weight, torch.zeros_like(levels), grid, hessian)
    assert not bool(gain.any())
    assert torch.equal(nothing.scales_OG, grid.scales_OG)


def test_scales_that_float16_cannot_hold_are_not_taken() -> None:
    weight, hessian, grid, levels, _ = _start(2, 32)
    huge, _ = refit_scales(weight * 1e6, levels, grid, hessian)
    assert bool((huge.scales_OG.abs() <= 65504).all())
    tiny, _ = refit_scales(weight * 1e-9, levels, grid, hessian)
    assert bool((tiny.scales_OG.abs() >= 2**-24).all())


def test_the_other_rows_do_not_matter() -> None:
    weight, hessian, grid, levels, order = _start(5, 144)
    moved, _ = descend(weight, levels, grid, hessian, order)
    fitted, _ = refit_scales(weight, moved, grid, hessian)
    one = replace(grid, scales_OG=grid.scales_OG[2:3])
    alone, _ = descend(weight[2:3], levels[2:3], one, hessian, order)
    assert torch.equal(alone, moved[2:3])
    assert torch.equal(
        refit_scales(weight[2:3], alone, one, hessian)[0].scales_OG, fitted.scales_OG[2:3]
    )
