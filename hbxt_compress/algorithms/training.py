"""Training: networks taken towards falling losses, resumable to the bit.

Everything random in a step comes from generators seeded with its number, so a run that was killed
goes on as if nothing had happened. An average of the weights is what gets judged and kept. A loss
that is not finite stops the run before it touches a weight, and the batch is saved.
"""

from __future__ import annotations

import logging
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from hbxt_compress.strict import Settings

__all__ = ["Diverged", "Net", "Training", "Watch", "drawn", "train"]

_SAVE_EVERY = 100
log = logging.getLogger(__name__)


class Training(Settings):
    """How long, on how much at once, and how fast."""

    n_steps: Annotated[int, Field(ge=1)] = 2000
    batch: Annotated[int, Field(ge=1)] = 32
    rate: Annotated[float, Field(gt=0)] = 3.0e-4
    """largest learning rate of AdamW; it rises over `warmup` steps, then falls by a cosine"""
    warmup: Annotated[int, Field(ge=0)] = 50
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(gt=0)] = 1.0
    """largest norm of the gradient"""
    average: Annotated[float, Field(ge=0, lt=1)] = 0.995
    """decay of the average over steps"""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """of products; weights, sums and the optimizer are float32"""
    compiled: bool = True
    """by torch.compile, where there is a compiler: about 1.5 times as fast after a minute"""
    judge_every: Annotated[int, Field(ge=1)] = 250
    patience: Annotated[int, Field(ge=1)] = 8
    """judgements without a better one after which it stops"""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @contextmanager
    def autocast(self, device: torch.device) -> Iterator[None]:
        """Meanwhile products are in the training's precision."""
        lower = self.precision == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=lower), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Mismatch dtype")  # norms stay exact, that is meant
            yield

    def compile(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function as compiled code, if that is wanted and to be had."""
        if not self.compiled:
            return function
        if shutil.which("g++") is None and not torch.cuda.is_available():
            log.warning("no g++ found: training runs uncompiled, about 1.5 times slower")
            return function
        return torch.compile(function)


class Watch(Protocol):
    """Who keeps checkpoints and tells how a training goes."""

    def step(self, done: int, total: int, values: Mapping[str, float]) -> None: ...

    def judged(self, done: int, score: float) -> None: ...

    def searched(self, done: int, most: int, error_db: float) -> None: ...

    def save(self, name: str, state: Mapping[str, Tensor]) -> None: ...

    def load(self, name: str) -> Mapping[str, Tensor] | None: ...

    def keep_batch(self, step: int, batch: Mapping[str, Tensor]) -> str: ...


class Diverged(Exception):
    """A loss is not finite; the message says at which step, and where its batch lies."""


class Net:
    """A network that is being trained: its optimizer and the average of its weights."""

    def __init__(self, module: nn.Module, how: Training, rate: float | None = None) -> None:
        self.module, self._how = module, how
        self._rate = how.rate if rate is None else rate
        self.chosen = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._adam = torch.optim.AdamW(
            self.chosen.values(), lr=self._rate, betas=how.betas, weight_decay=how.weight_decay
        )
        self._average = {name: p.detach().clone() for name, p in self.chosen.items()}
        self._n_updates = 0

    def descend(self, loss: Tensor, done: float) -> float:
        """One step down; the gradient's norm before clipping. done: share of the training, 0..1.

        Where loss or gradient are not finite nothing is changed.
        """
        if not bool(torch.isfinite(loss)):
            return math.nan
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.chosen.values(), self._how.clip))
        if math.isfinite(norm):
            warm = min(1.0, (self._n_updates + 1) / max(1, self._how.warmup))
            fall = 0.5 * (1 + math.cos(math.pi * done))
            for group in self._adam.param_groups:
                group["lr"] = self._rate * warm * (0.02 + 0.98 * fall)
            self._adam.step()
            self._n_updates += 1
            decay = min(self._how.average, self._n_updates / (self._n_updates + 9))
            with torch.no_grad():
                for name, p in self.chosen.items():
                    self._average[name].lerp_(p.detach(), 1 - decay)
        self._adam.zero_grad(set_to_none=True)
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The module with the averages in place of its weights."""
        own = {name: p.detach().clone() for name, p in self.chosen.items()}
        self.put(self._average)
        try:
            yield
        finally:
            self.put(own)

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Replaces weights, by name."""
        for name, p in self.chosen.items():
            p.copy_(values[name])

    def average(self) -> dict[str, Tensor]:
        return dict(self._average)

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on."""
        found = {"n_updates": torch.tensor(self._n_updates)}
        for name, p in self.chosen.items():
            found |= {f"value.{name}": p.detach(), f"average.{name}": self._average[name]}
            found |= {f"{key}.{name}": one for key, one in self._adam.state[p].items()}
        return found

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave."""
        self._n_updates = int(state["n_updates"])
        for name, p in self.chosen.items():
            p.copy_(state[f"value.{name}"])
            self._average[name].copy_(state[f"average.{name}"])
            self._adam.state[p] = {
                key: state[f"{key}.{name}"].to("cpu" if key == "step" else p.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}.{name}" in state
            }


def drawn(seed: int, step: int, *numbers: int) -> torch.Generator:
    """The generator of a step's random numbers."""
    mixed = (seed * 1_000_003 + step) * 1_000_003 + sum(n * 7919**i for i, n in enumerate(numbers))
    return torch.Generator().manual_seed(mixed % 2**63)


def train(
    nets: Mapping[str, Net],
    how: Training,
    turn: Callable[[int], tuple[Mapping[str, float], Mapping[str, Tensor]]],
    judge: Callable[[], float],
    watch: Watch,
) -> tuple[float, float]:
    """Runs turns until all are done or nothing gets better; the score before and that of the best.

    turn(k) descends once and gives named values and the batch that it saw. judge scores the first
    net, the lower the better; at the end it has the best average that was judged, or what it
    started with. Only its own weights are put back, not those of the other nets.

    Raises:
        Diverged: a value that is not finite.
    """
    first = next(iter(nets.values()))
    begun, scores = _resumed(nets, watch)
    if not scores:
        scores = [judge()]
        watch.judged(0, scores[0])
        watch.save("best", {name: p.detach() for name, p in first.chosen.items()})
    for k in range(begun, how.n_steps):
        if _stale(scores, how.patience):
            break
        values, batch = turn(k)
        if not all(map(math.isfinite, values.values())):
            told = ", ".join(f"{name} {value:g}" for name, value in values.items())
            raise Diverged(f"step {k}: {told}; its batch is in {watch.keep_batch(k, batch)}")
        watch.step(k + 1, how.n_steps, values)
        if (k + 1) % how.judge_every == 0 or k + 1 == how.n_steps:
            with first.averaged():
                scores.append(judge())
            watch.judged(k + 1, scores[-1])
            if scores[-1] < min(scores[:-1]):
                watch.save("best", first.average())
        if (k + 1) % _SAVE_EVERY == 0 or k + 1 == how.n_steps:
            watch.save("state", _state(k + 1, scores, nets))
    best = watch.load("best")
    if best is not None:
        first.put(best)
    return scores[0], min(scores)


def _stale(scores: list[float], patience: int) -> bool:
    """Whether the last judgements were all no better than an earlier one."""
    return len(scores) > patience and min(scores[-patience:]) >= min(scores[:-patience])


def _state(done: int, scores: list[float], nets: Mapping[str, Net]) -> dict[str, Tensor]:
    state = {"done": torch.tensor(done), "scores": torch.tensor(scores, dtype=torch.float64)}
    for name, net in nets.items():
        state |= {f"{name}/{key}": value for key, value in net.state().items()}
    return state


def _resumed(nets: Mapping[str, Net], watch: Watch) -> tuple[int, list[float]]:
    """The step to go on with and the scores so far."""
    state = watch.load("state")
    if state is None:
        return 0, []
    for name, net in nets.items():
        own = f"{name}/"
        net.restore({k.removeprefix(own): v for k, v in state.items() if k.startswith(own)})
    return int(state["done"]), state["scores"].tolist()
