"""Training: exact resumption, guards, averages, and when it stops."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from hbxt_compress.algorithms.training import Diverged, Net, Training, drawn, train
from hbxt_compress.ranks import ALONE, Ranks

HOW = Training(
    n_steps=250, batch=16, rate=1e-2, warmup=5, precision="float32", judge_every=50, average=0.9
)


class Stopped(Exception):
    pass


class Memory:
    """Keeps checkpoints in memory, and stops like a kill before step `until`."""

    ranks = ALONE

    def __init__(self, until: int | None = None) -> None:
        self.kept: dict[str, dict[str, Tensor]] = {}
        self.until, self.losses, self.scores = until, [], []
        self.batches: dict[int, Mapping[str, Tensor]] = {}

    def step(self, done: int, total: int, values: Mapping[str, float]) -> None:
        self.losses.append(values["loss"])
        if done == self.until:
            raise Stopped

    def judged(self, done: int, score: float) -> None:
        self.scores.append((done, score))

    def save(self, name: str, state: Mapping[str, Tensor]) -> None:
        self.kept[name] = {key: value.clone() for key, value in state.items()}

    def load(self, name: str) -> Mapping[str, Tensor] | None:
        return self.kept.get(name)

    def keep_batch(self, step: int, batch: Mapping[str, Tensor]) -> str:
        self.batches[step] = batch
        return f"batch-{step}"


def _made(how: Training = HOW, *, poison: int | None = None):
    """A small net that learns a function, its turn and its judge; `poison`: a batch with a nan."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
    net = Net(module, how)

    def loss_of(x: Tensor) -> Tensor:
        return (module(x) - x.square().sum(1, keepdim=True)).square().mean()

    def turn(k: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        x = torch.randn(how.batch, 4, generator=drawn(how.seed, k))
        if k == poison:
            x[0, 0] = math.nan
        loss = loss_of(x)
        norm = net.descend(loss, k / how.n_steps)
        return {"loss": float(loss.detach()), "norm": norm}, {"x": x}

    @torch.no_grad()
    def judge() -> float:
        return float(loss_of(torch.randn(256, 4, generator=drawn(99, 0))))

    return net, turn, judge


def _weights(net: Net) -> list[Tensor]:
    return [p.detach().clone() for p in net.chosen.values()]


def test_the_loss_falls_and_the_best_average_stays() -> None:
    net, turn, judge = _made()
    watch = Memory()
    before, after = train({"student": net}, HOW, turn, judge, watch)
    assert after < 0.4 * before
    assert judge() == after == min(score for _, score in watch.scores)
    assert [done for done, _ in watch.scores] == [0, 50, 100, 150, 200, 250]


@pytest.mark.parametrize("until", [1, 99, 100, 101, 149, 150, 151, 249])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(until: int) -> None:
    net, turn, judge = _made()
    whole = Memory()
    scores = train({"student": net}, HOW, turn, judge, whole)
    expected = _weights(net)
    net, turn, judge = _made()
    watch = Memory(until)
    with pytest.raises(Stopped):
        train({"student": net}, HOW, turn, judge, watch)
    net, turn, judge = _made()  # another process
    watch.until, first = None, len(watch.losses)
    assert train({"student": net}, HOW, turn, judge, watch) == scores
    assert all(torch.equal(a, b) for a, b in zip(_weights(net), expected, strict=True))
    begun = (until - 1) // 100 * 100  # a step is told before it is saved
    assert watch.losses[first:] == whole.losses[begun:]


def test_two_nets_are_resumed_together() -> None:
    def made():
        first, turn, judge = _made()
        second, other, _ = _made(Training(**{**HOW.model_dump(), "seed": 5}))

        def both(k: int):
            values, batch = turn(k)
            return {**values, "critic": other(k)[0]["loss"]}, batch

        return {"student": first, "critic": second}, both, judge

    nets, turn, judge = made()
    train(nets, HOW, turn, judge, Memory())
    expected = _weights(nets["critic"])
    nets, turn, judge = made()
    watch = Memory(170)
    with pytest.raises(Stopped):
        train(nets, HOW, turn, judge, watch)
    nets, turn, judge = made()
    watch.until = None
    train(nets, HOW, turn, judge, watch)
    assert all(torch.equal(a, b) for a, b in zip(_weights(nets["critic"]), expected, strict=True))


def test_a_loss_that_is_not_finite_stops_before_a_weight_is_touched() -> None:
    net, turn, judge = _made(poison=120)
    watch = Memory()
    with pytest.raises(Diverged, match=r"step 120: loss nan, norm nan; its batch is in batch-120"):
        train({"student": net}, HOW, turn, judge, watch)
    assert torch.isnan(watch.batches[120]["x"]).any()
    assert all(bool(torch.isfinite(p).all()) for p in _weights(net))
    assert int(watch.kept["state"]["done"]) == 100


def test_a_net_that_one_of_several_ranks_trains_alone_is_refused() -> None:
    net, turn, judge = _made()
    watch = Memory()
    watch.ranks = Ranks(0, 2)
    with pytest.raises(ValueError, match="one of 2 ranks trains alone: give Net the pupil's"):
        train({"student": net}, HOW, turn, judge, watch)


def test_it_stops_when_nothing_gets_better() -> None:
    how = Training(**{**HOW.model_dump(), "patience": 2, "rate": 1e-9})
    net, turn, _ = _made(how)
    watch, n_judged = Memory(), 0

    def worse() -> float:
        nonlocal n_judged
        n_judged += 1
        return float(n_judged)

    before = _weights(net)
    assert train({"student": net}, how, turn, worse, watch) == (1.0, 1.0)
    assert len(watch.losses) == 100
    assert all(torch.equal(a, b) for a, b in zip(_weights(net), before, strict=True))


def test_the_average_is_the_literal_one() -> None:
    how = Training(**{**HOW.model_dump(), "average": 0.9})
    net, turn, _ = _made(how)
    mean = _weights(net)
    for k in range(40):
        turn(k)
        decay = min(0.9, (k + 1) / (k + 10))
        mean = [decay * m + (1 - decay) * p for m, p in zip(mean, _weights(net), strict=True)]
    own = _weights(net)
    with net.averaged():
        for a, b in zip(_weights(net), mean, strict=True):
            torch.testing.assert_close(a, b)
    assert all(torch.equal(a, b) for a, b in zip(_weights(net), own, strict=True))


def test_draws_differ_by_seed_step_and_number() -> None:
    found = {
        float(torch.rand(1, generator=drawn(*key)))
        for key in [(0, 0), (0, 1), (1, 0), (0, 0, 1), (0, 1, 1), (0, 0, 2)]
    }
    assert len(found) == 6
    assert torch.rand(1, generator=drawn(3, 4)) == torch.rand(1, generator=drawn(3, 4))
