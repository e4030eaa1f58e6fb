"""Runs that go on where others stopped see what whole runs see, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hbxt_compress.chain as chain_module
from hbxt_compress.chain import layer_at, watch
from hbxt_compress.models import family_of
from hbxt_compress.stages.memo import Memo
from hbxt_compress.stages.side_by_side import SideBySide
from hbxt_compress.stages.walk import Station, walk
from hbxt_compress.trajectories import load_trajectories
from tests.observed import observed, source_of


class _Counted(nn.Linear):
    def __init__(self, name: str, called: list[str]) -> None:
        super().__init__(4, 4)
        self.name, self.called = name, called

    def forward(self, x: Tensor) -> Tensor:
        self.called.append(self.name)
        return super().forward(x)


class _Pair(nn.Module):
    """Calls `one`, then `twice` two times, then `end`; notes what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []
        made = [_Counted(name, self.called) for name in ("one.0", "one.2", "twice", "end")]
        self.one = nn.Sequential(made[0], nn.ReLU(), made[1])
        self.twice, self.end = made[2:]

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.end(self.twice(y) + self.twice(2 * y))


def test_what_was_passed_is_not_computed_again_but_for_modules_called_twice() -> None:
    torch.manual_seed(0)
    pair, memo, x = _Pair(), Memo(largest=8), torch.randn(2, 4)
    expected = pair(x)
    pair.called.clear()
    with memo.used(pair):
        watch({"2": pair.one[2]}, lambda: pair(x))
    assert pair.called == ["one.0"]
    with memo.used(pair):
        watch({"end": pair.end}, lambda: pair(x))
    assert pair.called == ["one.0", "one.2", "twice", "twice"]
    assert list(memo._known) == ["one"]
    with memo.used(pair):
        assert torch.equal(pair(x), expected)
    assert pair.called[4:] == ["twice", "twice", "end"]
    assert torch.equal(pair(x), expected)
    assert pair.called[7:9] == ["one.0", "one.2"]


def test_larger_outputs_are_computed_again() -> None:
    pair, memo, x = _Pair(), Memo(largest=7), torch.randn(2, 4)
    for _ in range(2):
        with memo.used(pair):
            pair(x)
        assert memo._known == {}
    assert pair.called[5:] == pair.called[:5]


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
        assert len(sides._memos) == 2 * len(sides.batches)
        _coarse(sides, module)
    for module in modules[1:]:
        whole = sides.inputs("001", [modules[0], module], "covariance")[module]
        for name in ("total_x_I", "total_y_I", "products_yy_II", "products_xy_II"):
            assert torch.equal(getattr(seen[module].fit, name), getattr(whole.fit, name)), module
    sides.begin_anew(sides.full)
    assert len(sides._memos) == len(sides.batches)
    sides.advance("001")
    assert not sides._memos
    resumed, sides._carries = sides._carries, before
    sides.advance("001")
    for one, other in zip(resumed, sides._carries, strict=True):
        assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(one, other, strict=True))
        assert not torch.equal(one[0].hidden, one[1].hidden)
