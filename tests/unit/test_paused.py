"""Runs that stand still: they see what whole runs see, and change nothing by standing still."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hbxt_compress.chain as chain_module
from hbxt_compress.chain import layer_at
from hbxt_compress.models import family_of
from hbxt_compress.stages.paused import Paused
from hbxt_compress.stages.side_by_side import SideBySide
from hbxt_compress.stages.walk import Station, walk
from hbxt_compress.trajectories import load_trajectories
from tests.observed import observed, source_of


def _two() -> tuple[nn.Linear, nn.Linear, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(4, 4), nn.Linear(4, 4), torch.randn(2, 4)


def test_a_run_waits_before_each_module_and_takes_its_new_weights() -> None:
    one, two, x = _two()
    run = Paused(lambda: two(one(x)))
    assert run.until(one) is x
    one.weight.data = one.weight.data * 2
    assert torch.equal(run.until(two), one(x))
    two.weight.data = two.weight.data - 1
    assert torch.equal(run.result(), two(one(x)))


def test_runs_do_not_stop_each_other() -> None:
    one, two, x = _two()
    runs = [Paused(lambda i=i: two(one(x + i))) for i in range(3)]  # type: ignore[misc]
    for module in (one, two):
        given = [run.until(module) for run in runs]
    assert [torch.equal(g, one(x + i)) for i, g in enumerate(given)] == [True] * 3
    assert torch.equal(two(one(x)), runs[0].result())
    for run in runs[1:]:
        run.abandon()
        assert not run._thread.is_alive()


def test_what_a_run_raises_reaches_its_owner() -> None:
    one, two, x = _two()
    broken = Paused(lambda: two(one(x[:, :3])))
    broken.until(one)
    with pytest.raises(RuntimeError, match="shapes"):
        broken.until(two)
    late = Paused(lambda: one(x))
    with pytest.raises(RuntimeError, match="Linear is not called any more"):
        late.until(two)
    with pytest.raises(RuntimeError, match="ended"):
        late.until(two)
    Paused(lambda: one(x)).abandon()


@pytest.fixture
def station(
    micro_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Station, list[str]]:
    """The second block of a large transformer, and its groups' first modules."""
    monkeypatch.setattr(chain_module, "LARGE", 0)
    source = source_of(micro_wan)
    seen = load_trajectories(observed(source, tmp_path / "seen").folder)
    for at in walk(source, seen, 1, torch.device("cpu")):
        if (at.component, at.piece) == ("transformer", "001"):
            specs = family_of(source).layers(source)
            own = [s.module for s in specs if s.component == "transformer" and s.block == 1]
            return at, [group[0] for group in at.sides.groups("001", own)]
    raise AssertionError


def _coarse(sides: SideBySide, module: str) -> None:
    layer = layer_at(sides.half.module, module)
    layer.weight.data = (layer.weight.data * 8).round() / 8


def test_statistics_are_those_of_runs_from_the_start(station: tuple[Station, list[str]]) -> None:
    """To the last bit: a killed run goes on by whole runs."""
    at, modules = station
    sides, before = at.sides, list(at.sides._carries)
    assert len(modules) > 4
    seen = {}
    for module in modules:
        seen[module] = sides.inputs("001", [module], "covariance")[module]
        assert len(sides._paused) == 2 * len(sides.batches)
        _coarse(sides, module)
    for module in modules[1:]:
        whole = sides.inputs("001", [modules[0], module], "covariance")[module]
        for name in ("total_x_I", "total_y_I", "products_yy_II", "products_xy_II"):
            assert torch.equal(getattr(seen[module].fit, name), getattr(whole.fit, name)), module
    sides.begin_anew(sides.full)
    assert len(sides._paused) == len(sides.batches)
    sides.advance("001")
    assert not sides._paused
    paused, sides._carries = sides._carries, before
    sides.advance("001")
    for one, other in zip(paused, sides._carries, strict=True):
        assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(one, other, strict=True))
        assert not torch.equal(one[0].hidden, one[1].hidden)
