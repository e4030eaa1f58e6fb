"""A Watch for tests of algorithms, in memory; and trainings that are killed on their way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
from torch import Tensor

from hbxt_compress.ranks import ALONE
from hbxt_compress.stages.checkpoints import Checkpoints

__all__ = ["Silent", "killed_at"]


class _Killed(BaseException):
    """Nobody catches it by mistake."""


@contextmanager
def killed_at(until: int) -> Iterator[None]:
    """Whatever trains with checkpoints meanwhile is killed after that step, and must come to it."""
    told = Checkpoints.step

    def step(self: Checkpoints, done: int, total: int, values: Mapping[str, float]) -> None:
        told(self, done, total, values)
        if done == until:
            raise _Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "step", step)
        with pytest.raises(_Killed):
            yield


class Silent:
    """Remembers checkpoints, losses and judgements."""

    ranks = ALONE

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Tensor]] = {}
        self.losses: list[Mapping[str, float]] = []
        self.scores: list[float] = []
        self.searches: list[float] = []

    def step(self, done: int, total: int, values: Mapping[str, float]) -> None:
        self.losses.append(values)

    def judged(self, done: int, score: float) -> None:
        self.scores.append(score)

    def samples(self, done: int, students: Tensor, teachers: Tensor) -> None:
        assert students.shape == teachers.shape

    def searched(self, done: int, most: int, error_db: float) -> None:
        self.searches.append(error_db)

    def save(self, name: str, state: Mapping[str, Tensor]) -> None:
        self.kept[name] = {key: one.detach().clone() for key, one in state.items()}

    def load(self, name: str) -> Mapping[str, Tensor] | None:
        return self.kept.get(name)

    def keep_batch(self, step: int, batch: Mapping[str, Tensor]) -> str:
        self.save(f"batch-{step}", batch)
        return f"batch-{step}"
