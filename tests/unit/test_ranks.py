"""Ranks: sums, objects and tasks of several processes, one that dies, and devices."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hbxt_compress.errors import RankLost, StoreError, UsageError
from hbxt_compress.journal import Journal
from hbxt_compress.ranks import ALONE, Ranks
from hbxt_compress.stages.together import sum_up
from hbxt_compress.stats import LayerStats
from hbxt_compress.store import Store, Work
from tests.ranked import play

VERSION, FACTS = 1, ()


def test_alone_everything_is_ones_own_and_nothing_is_started() -> None:
    ranks = Ranks.joined({})
    assert ranks is ALONE
    assert Ranks.joined({"WORLD_SIZE": "1", "RANK": "0"}) is ALONE
    one = torch.tensor([1.0])
    assert ranks.sum(one) is one
    assert ranks.largest(one) is one
    assert ranks.gathered(one) == [one]
    assert ranks.broadcast(one) is one
    assert ranks.by_first(lambda: one) is one
    assert ranks.spread([lambda: 1, lambda: 2]) == [1, 2]
    assert ranks.share([1, 2, 3]) == [1, 2, 3]
    assert ranks.lost() is None
    assert ranks.first_to_tell()


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1"},
        {"WORLD_SIZE": "two", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
    ],
)
def test_half_an_environment_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="start them with torchrun"):
        Ranks.joined(environment)


def test_every_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert Ranks().device("cpu") == "cpu"
    assert Ranks().device("cuda") == "cuda:0"
    assert Ranks().device("cuda:1") == "cuda:1"
    assert Ranks(5, 8, 1).device("cuda") == "cuda:1"
    assert taken == [0, 1, 1]
    with pytest.raises(UsageError, match="rank 6 needs GPU 2, this machine has 2"):
        Ranks(6, 8, 2).device("cuda")
    with pytest.raises(UsageError, match="every rank takes its own"):
        Ranks(0, 2, 0).device("cuda:0")
    with pytest.raises(UsageError, match="asks for GPU 2"):
        Ranks().device("cuda:2")
    with pytest.raises(UsageError, match="no such device"):
        Ranks().device("abacus")


@pytest.mark.parametrize("world", [2, 3])
def test_what_ranks_give_each_other(world: int, tmp_path: Path) -> None:
    def part(ranks: Ranks) -> object:
        own = torch.arange(5.0, dtype=torch.float64) * 10.0**ranks.rank
        total, most = ranks.sum(own.clone()), ranks.largest(-own)
        return (
            total.tolist(),
            most.tolist(),
            ranks.gathered("ab"[: ranks.rank]),
            [ranks.broadcast({"of": ranks.rank, "t": own}, k)["of"] for k in range(world)],
            ranks.by_first(lambda: os.getpid()),
            ranks.spread([lambda i=i: (i, ranks.rank) for i in range(4)]),  # type: ignore[misc]
        )

    played = play(world, tmp_path, part)
    assert played == [played[0]] * world
    total, most, gathered, broadcast, _, spread = played[0]  # type: ignore[misc]
    assert total == [k * sum(10.0**r for r in range(world)) for k in range(5)]
    assert most == [-k for k in range(5)]
    assert gathered == ["", "a", "ab"][:world]
    assert broadcast == list(range(world))
    assert spread == [(i, i % world) for i in range(4)]


def test_a_rank_that_dies_is_named_by_the_others_wherever_they_wait(tmp_path: Path) -> None:
    def part(ranks: Ranks) -> object:
        ranks.barrier()
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(RankLost) as told:
            ranks.barrier()
        return str(told.value), time.monotonic() - began, ranks.first_to_tell()

    first, dead, last = play(3, tmp_path, part)
    assert dead is None
    for message, seconds, _ in (first, last):  # type: ignore[misc]
        assert message.startswith("rank 1 of 3 is gone")
        assert "any number of ranks" in message
        assert seconds < 20
    assert sorted([first[2], last[2]]) == [False, True]  # type: ignore[index]


def test_a_rank_that_has_told_its_error_ends_the_others_without_a_word(tmp_path: Path) -> None:
    def part(ranks: Ranks) -> object:
        if ranks.rank == 1:
            told = ranks.first_to_tell()
            ranks.end()
            return told
        with pytest.raises(RankLost):
            ranks.barrier()
        return ranks.lost() is None, ranks.first_to_tell()

    assert play(2, tmp_path, part) == [(True, False), True]


def test_statistics_of_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    source = torch.Generator().manual_seed(3)
    tensors = [torch.randn(7, 6, generator=source) + 2 for _ in range(5)]
    shift_I = tensors[0].double().mean(0)

    def summed(batches: list[Tensor]) -> LayerStats:
        stats = LayerStats.empty(6, "covariance")
        stats.shift_I = shift_I
        for x in batches:
            stats.add(x, x * 1.1, 0.5, shift_I=shift_I)
        return stats

    def part(ranks: Ranks) -> object:
        stats = summed(ranks.share(tensors))
        sum_up(ranks, stats, [(False, place) for place in ranks.share(range(5))])
        return stats

    alone = summed(tensors)
    both = play(2, tmp_path, part)
    for stats in both:
        assert isinstance(stats, LayerStats)
        assert (stats.n, stats.weight) == (alone.n, alone.weight)
        for name in ("shift_I", "total_x_I", "total_y_I", "squares_y_I", "absmax_I"):
            found, expected = getattr(stats, name), getattr(alone, name)
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
        for name in ("products_yy_II", "products_xy_II"):
            found, expected = getattr(stats, name), getattr(alone, name)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        assert all(map(torch.equal, stats.examples, alone.examples))
    assert torch.equal(both[0].products_yy_II, both[1].products_yy_II)  # type: ignore[attr-defined]


def shared(work: Work, n: int) -> None:
    """A stage of n pieces, each owned by one rank, and one that all make."""
    work.expect(n + 1)
    for i in range(n):
        if work.ranks.owns(i):
            work.piece(f"piece-{i}", lambda path, i=i: path.write_text(f"{i}"))  # type: ignore[misc]
    work.joint_piece(
        "all", lambda: sum(work.ranks.gathered(1)) > 0, lambda path, yes: path.write_text(f"{yes}")
    )


def test_a_result_is_the_same_whoever_made_it_and_goes_on_with_other_ranks(tmp_path: Path) -> None:
    alone = Store(tmp_path / "alone").result(shared, n=5)

    def part(ranks: Ranks) -> object:
        made = Store(tmp_path / "three", ranks).result(shared, n=5)
        return made.digest, sorted(path.name for path in made.folder.iterdir())

    names = ["all", *(f"piece-{i}" for i in range(5))]
    assert play(3, tmp_path, part) == [(alone.digest, names)] * 3

    def dies(ranks: Ranks) -> object:
        def stage(work: Work, n: int) -> None:
            if work.ranks.rank == 1:
                work.piece("piece-1", lambda path: path.write_text("1"))
                os.kill(os.getpid(), signal.SIGKILL)
            shared(work, n)

        stage.__name__, stage.__module__ = shared.__name__, shared.__module__
        with pytest.raises(RankLost) as told:
            Store(tmp_path / "killed", ranks).result(stage, n=5)
        return told.value.__notes__

    notes, dead = play(2, tmp_path, dies)
    partial = tmp_path / "killed" / "shared" / f"{alone.folder.name}.partial"
    assert dead is None
    assert notes == [f"4 of 6 pieces are finished under {partial}"]
    assert sorted(path.name for path in partial.glob("journal*")) == [
        "journal.1.jsonl", "journal.jsonl",
    ]  # fmt: skip
    kept = {path: path.stat().st_ino for path in partial.glob("piece-*")}
    assert len(kept) == 4
    resumed = Store(tmp_path / "killed").result(shared, n=5)
    assert resumed.digest == alone.digest
    for path, inode in kept.items():
        assert (resumed.folder / path.name).stat().st_ino == inode


def test_ranks_that_ask_for_different_results_are_stopped(tmp_path: Path) -> None:
    def part(ranks: Ranks) -> object:
        try:
            Store(tmp_path / "store", ranks).result(shared, n=ranks.rank)
        except (StoreError, RankLost) as error:
            ranks.end()
            return str(error)
        return ""

    first, other = play(2, tmp_path, part)
    assert "rank 1 asks for another result than rank 0" in str(other)
    assert first


def test_a_rank_reads_what_all_have_noted_and_the_first_takes_it_in(tmp_path: Path) -> None:
    for rank in (0, 1):
        piece = tmp_path / f"piece-{rank}"
        piece.write_text("x")
        Journal(tmp_path, rank).add(piece.name, piece, 0.0)
    assert Journal(tmp_path, 1).vouches_for("piece-0")
    first = Journal(tmp_path)
    assert first.vouches_for("piece-1")
    assert first.files().keys() == {"piece-0", "piece-1"}
    first.merge()
    assert [path.name for path in tmp_path.glob("journal*")] == ["journal.jsonl"]
    assert Journal(tmp_path).vouches_for("piece-1")
    (tmp_path / "piece-1").write_text("y")
    assert not Journal(tmp_path).vouches_for("piece-1")
