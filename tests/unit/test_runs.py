"""Runs of columns: compiled and not they are the same, and they are what their definition says."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from hbxt_compress.algorithms import runs
from hbxt_compress.algorithms.runs import RUN, feed, move

_WIDE, _NARROW = 4096, 64  # inputs of the layer: compiled, or not


def _given(n_rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    one_RO, other_RO = torch.randn(2, RUN, n_rows, generator=generator).unbind()
    square_RR = torch.randn(RUN, RUN, generator=generator)
    scale_RO = 0.1 + torch.rand(RUN, n_rows, generator=generator)
    scale_RO[::3] *= -1
    low_RO = -torch.randint(2, 9, (RUN, n_rows), generator=generator).float()
    return one_RO, other_RO, square_RR @ square_RR.T / RUN, (scale_RO, low_RO, low_RO + 15)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiled code needs a C++ compiler")
@pytest.mark.parametrize("function", [feed, move])
@pytest.mark.parametrize("n_rows", [1, 2, 48, 131])
def test_compiled_runs_are_those_of_single_steps(function, n_rows: int) -> None:  # type: ignore[no-untyped-def]
    one_RO, other_RO, square_RR, grid = _given(n_rows)
    square_RR = square_RR.T  # not contiguous, as part of a factor
    wide, narrow = (
        function(one_RO.clone(), other_RO.round(), square_RR, grid, n) for n in (_WIDE, _NARROW)
    )
    for got, expected in zip(wide, narrow, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(wide[0], narrow[0])


def test_only_wide_layers_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(runs._CODE, "of", lambda key, *_: asked.append(key))
    one_RO, other_RO, square_RR, grid = _given(4)
    for n_inputs in (_NARROW, 2048, _WIDE):
        feed(one_RO.clone(), other_RO, square_RR, grid, n_inputs)
    assert len(asked) == 1
    few = (one_RO[:5].clone(), other_RO[:5], square_RR[:5, :5], [one[:5] for one in grid])
    feed(*few, _WIDE)
    assert len(asked) == 1, "the last run of a layer may be short"


def test_feeding_passes_each_error_on_to_later_columns() -> None:
    """Literally: column by column, number by number."""
    one_RO, goal_RO, unit_RR, (scale_RO, low_RO, high_RO) = _given(5, seed=3)
    found = feed(one_RO.clone(), goal_RO, unit_RR, (scale_RO, low_RO, high_RO), _NARROW)
    for o in range(5):
        work = one_RO[:, o].clone()
        for j in range(RUN):
            scale = scale_RO[j, o]
            unit = min(max(torch.round(work[j] / scale), low_RO[j, o]), high_RO[j, o])
            assert found.units_RO[j, o] == unit
            error = goal_RO[j, o] - unit * scale
            torch.testing.assert_close(found.errors_RO[j, o], error)
            torch.testing.assert_close(found.away_RO[j, o], work[j] - unit * scale)
            work[j + 1 :] += unit_RR[j, j + 1 :] * error


def test_moving_gains_what_the_loss_falls_by() -> None:
    """e H e^T before and after, for rows whose errors begin at random."""
    error_RO, units_RO, own_RR, grid = _given(6, seed=5)
    own_RR = own_RR + torch.eye(RUN)
    units_RO = (4 * units_RO).round().clamp(grid[1], grid[2])
    found = move((own_RR @ error_RO).clone(), units_RO, own_RR, grid, _NARROW)
    after_RO = error_RO - found.moves_RO
    torch.testing.assert_close(found.moves_RO, (found.units_RO - units_RO) * grid[0])
    fell_O = (error_RO * (own_RR @ error_RO)).sum(0) - (after_RO * (own_RR @ after_RO)).sum(0)
    torch.testing.assert_close(found.gain_O, fell_O, rtol=1e-4, atol=1e-4)
    assert bool((found.gain_O >= 0).all())
    assert bool(found.gain_O.any())
