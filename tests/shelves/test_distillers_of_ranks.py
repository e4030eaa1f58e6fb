"""Two ranks train the student of one, go on where they were killed, and stop together."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hbxt_compress.algorithms.training import Training
from hbxt_compress.errors import CalibrationError, RankLost
from hbxt_compress.ranks import Ranks
from hbxt_compress.stages.checkpoints import Checkpoints
from hbxt_compress.store import Store
from tests.ranked import play
from tests.shelves import test_every_distiller as alone

pytestmark = pytest.mark.timeout(300)
_HOW = Training(
    n_steps=8,
    batch=4,
    rate=1e-4,
    judge_every=4,
    average=0.5,
    warmup=2,
    precision="float32",
    compiled=False,
)
NAMES = ["guidance", "trajectory", "dmd"]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {n: alone.SMALL[n].model_copy(update={"train": _HOW}) for n in NAMES}
    monkeypatch.setattr(alone, "SMALL", small)
    monkeypatch.setattr("hbxt_compress.algorithms.training._SAVE_EVERY", 3)


def _weights(root: Path) -> dict[str, torch.Tensor]:
    (path,) = root.glob("distill/*/student/transformer/*.safetensors")
    return load_file(path)


def _measured(root: Path) -> dict[str, float]:
    (path,) = root.glob("distill/*/distilled.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_train_the_student_of_one(name: str, micro_wan: Path, tmp_path: Path) -> None:
    def part(ranks: Ranks) -> object:
        return alone.made(Store(tmp_path / "two", ranks), micro_wan, name).digest

    alone.made(Store(tmp_path / "one"), micro_wan, name)
    digests = play(2, tmp_path, part)
    assert digests[0] == digests[1]
    one, two = _weights(tmp_path / "one"), _weights(tmp_path / "two")
    started = load_file(micro_wan / "transformer" / "diffusion_pytorch_model.safetensors")
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-5)
    assert max(float((one[k] - started[k]).abs().max()) for k in one) > 1e-4
    assert _measured(tmp_path / "two") == pytest.approx(_measured(tmp_path / "one"), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_go_on_to_the_bit(name: str, micro_wan: Path, tmp_path: Path) -> None:
    def part(ranks: Ranks) -> object:
        return alone.made(Store(tmp_path / "whole", ranks), micro_wan, name).digest

    def killed(ranks: Ranks) -> object:
        class Killed(BaseException):
            pass

        told = Checkpoints.step

        def step(self: Checkpoints, done: int, total: int, values: dict[str, float]) -> None:
            told(self, done, total, values)
            if done == 5:
                raise Killed

        Checkpoints.step = step  # type: ignore[method-assign]
        with pytest.raises(Killed):
            alone.made(Store(tmp_path / "killed", ranks), micro_wan, name)
        return None

    def again(ranks: Ranks) -> object:
        return alone.made(Store(tmp_path / "killed", ranks), micro_wan, name).digest

    whole = play(2, tmp_path, part)
    play(2, tmp_path, killed)
    assert list(tmp_path.glob("killed/distill/*.partial/unfinished/state.checkpoint"))
    assert play(2, tmp_path, again) == whole


def test_one_rank_goes_on_where_two_were_killed(micro_wan: Path, tmp_path: Path) -> None:
    def killed(ranks: Ranks) -> object:
        class Killed(BaseException):
            pass

        told = Checkpoints.judged

        def judged(self: Checkpoints, done: int, score: float) -> None:
            told(self, done, score)
            if done == 8:
                raise Killed

        Checkpoints.judged = judged  # type: ignore[method-assign]
        with pytest.raises(Killed):
            alone.made(Store(tmp_path / "two", ranks), micro_wan, "trajectory")
        return None

    alone.made(Store(tmp_path / "one"), micro_wan, "trajectory")
    play(2, tmp_path, killed)
    alone.made(Store(tmp_path / "two"), micro_wan, "trajectory")
    one, two = _weights(tmp_path / "one"), _weights(tmp_path / "two")
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-5)


def test_a_rank_that_is_killed_is_named(micro_wan: Path, tmp_path: Path) -> None:
    def part(ranks: Ranks) -> object:
        told = Checkpoints.step

        def step(self: Checkpoints, done: int, total: int, values: dict[str, float]) -> None:
            told(self, done, total, values)
            if done == 2 and ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        Checkpoints.step = step  # type: ignore[method-assign]
        with pytest.raises(RankLost, match="rank 1 of 2 is gone"):
            alone.made(Store(tmp_path / "store", ranks), micro_wan, "trajectory")
        return True

    assert play(2, tmp_path, part) == [True, None]


def test_what_is_not_finite_on_one_rank_stops_both(micro_wan: Path, tmp_path: Path) -> None:
    def part(ranks: Ranks) -> object:
        from hbxt_compress.stages.distill import FullModel

        answer = FullModel.velocity

        def broken(self: FullModel, x: torch.Tensor, timestep: object, *rest: object) -> object:
            found = answer(self, x, timestep, *rest)  # type: ignore[arg-type]
            half = torch.is_tensor(timestep) and len(x) == 2 and ranks.rank == 1
            return found * float("nan") if half else found

        FullModel.velocity = broken  # type: ignore[assignment,method-assign]
        with pytest.raises(CalibrationError) as told:
            alone.made(Store(tmp_path / "store", ranks), micro_wan, "guidance")
        return str(told.value)

    first, second = play(2, tmp_path, part)
    assert first == second
    assert "step 0: loss nan, norm nan" in str(first)
    kept = sorted(p.name for p in tmp_path.glob("store/distill/*/unfinished/batch-0.*"))
    assert kept == ["batch-0.0.checkpoint", "batch-0.1.checkpoint"]
    batches = [load_file(p) for p in sorted(tmp_path.glob("store/distill/*/unfinished/batch-0.*"))]
    assert [len(one["x"]) for one in batches] == [2, 2]


def test_a_batch_that_ranks_cannot_share_is_refused(micro_wan: Path, tmp_path: Path) -> None:
    def part(ranks: Ranks) -> object:
        how = alone.SMALL["trajectory"]
        odd = how.train.model_copy(update={"batch": 3})  # type: ignore[union-attr]
        alone.SMALL["trajectory"] = how.model_copy(update={"train": odd})
        with pytest.raises(CalibrationError, match="a batch of 3 is no multiple of 2 ranks"):
            alone.made(Store(tmp_path / "store", ranks), micro_wan, "trajectory")
        return None

    play(2, tmp_path, part)
