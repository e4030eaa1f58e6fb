"""Training: networks taken towards falling losses, resumable to the bit.

Everything random in a step comes from generators seeded with its number, so a run that was killed
goes on as if nothing had happened. An average of the weights is what gets judged and kept. A loss
that is not finite stops the run before it touches a weight, and the batch is saved.

Several ranks train one network together: each takes its rows of a step's batch, `own` of them, so
gradients are those of the whole batch where a loss is a mean over rows. Weights, optimizer and
average are sharded (algorithms/sharding.py). Checkpoints are whole; any number of ranks goes on.
"""

from __future__ import annotations

import logging
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from hbxt_compress.algorithms.sharding import Named, fill, gathered, part, shard, whole
from hbxt_compress.ranks import ALONE, Ranks
from hbxt_compress.strict import Settings

__all__ = ["Diverged", "Net", "Training", "Watch", "drawn", "own", "train"]

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
    checkpoint: bool = False
    """keep of the forward only what blocks are given, and run each again for its gradients"""
    judge_every: Annotated[int, Field(ge=1)] = 250
    patience: Annotated[int, Field(ge=1)] = 8
    """judgements without a better one after which it stops"""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @contextmanager
    def autocast(self, device: torch.device) -> Iterator[None]:
        """Meanwhile products are in the training's precision."""
        lower = self.precision == "bfloat16"
        # Kept, the rounded weights of all blocks would be in memory at once.
        rounds = torch.autocast(
            device.type, torch.bfloat16, enabled=lower, cache_enabled=not self.checkpoint
        )
        with rounds, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Mismatch dtype")  # norms stay exact, that is meant
            yield

    def compile(
        self, function: Callable[..., Tensor], ranks: Ranks = ALONE
    ) -> Callable[..., Tensor]:
        """The function as compiled code, if that is wanted and to be had; not of several ranks."""
        if self.compiled and ranks.world > 1:
            log.warning("%d ranks train uncompiled: a sharded network is not compiled", ranks.world)
            return function
        if not self.compiled:
            return function
        if shutil.which("g++") is None and not torch.cuda.is_available():
            log.warning("no g++ found: training runs uncompiled, about 1.5 times slower")
            return function
        return torch.compile(function)


class Watch(Protocol):
    """Who keeps checkpoints and tells how a training goes; ranks: of this training."""

    @property
    def ranks(self) -> Ranks: ...

    def step(self, done: int, total: int, values: Mapping[str, float]) -> None: ...

    def judged(self, done: int, score: float) -> None: ...

    def searched(self, done: int, most: int, error_db: float) -> None: ...

    def samples(self, done: int, students: Tensor, teachers: Tensor) -> None:
        """Latents N C T H W of the same clips, after a judgement."""

    def save(self, name: str, state: Mapping[str, Tensor]) -> None: ...

    def load(self, name: str) -> Mapping[str, Tensor] | None: ...

    def keep_batch(self, step: int, batch: Mapping[str, Tensor]) -> str: ...


class Diverged(Exception):
    """A loss is not finite; the message says at which step, and where its batch lies."""


class Net:
    """A network that is being trained: its optimizer and the average of its weights.

    ranks: who trains it; of several each keeps its part, so the module is sharded from now on.

    Raises:
        ValueError: checkpoints within the forward are wanted of a module that knows none, or the
            batch is no multiple of the ranks.
    """

    def __init__(
        self, module: nn.Module, how: Training, rate: float | None = None, ranks: Ranks = ALONE
    ) -> None:
        self.module, self.ranks, self._how = module, ranks, how
        _require_shares(how.batch, ranks)
        if how.checkpoint:
            _checkpointed(module)
        shard(module, ranks)
        self._rate = how.rate if rate is None else rate
        self.chosen = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._adam = torch.optim.AdamW(
            self.chosen.values(), lr=self._rate, betas=how.betas, weight_decay=how.weight_decay
        )
        self._average = {name: p.detach().clone() for name, p in self.chosen.items()}
        self._n_updates = 0

    def descend(self, loss: Tensor, done: float) -> float:
        """One step down; the gradient's norm before clipping. done: share of the training, 0..1.

        loss: of this rank's rows; what the ranks' mean of it does to the weights is done. Where a
        loss or the gradient is not finite, on any rank, nothing is changed on all of them.
        """
        broken = torch.tensor(float(not bool(torch.isfinite(loss))))
        if bool(self.ranks.largest(broken)):
            return math.nan
        loss.backward()
        norm = float(whole(nn.utils.clip_grad_norm_(self.chosen.values(), self._how.clip)))
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
                    part(self._average[name]).lerp_(part(p.detach()), 1 - decay)
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

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Replaces weights, by name; values: whole ones, or those of a net of the same ranks."""
        for name, p in self.chosen.items():
            fill(p, values[name])

    def average(self) -> dict[str, Tensor]:
        """The averages, whole on the first rank; others get none, but all must ask."""
        return gathered(self._average, self.ranks)

    def weights(self) -> dict[str, Tensor]:
        """The weights, whole on the first rank; others get none, but all must ask."""
        return gathered({name: p.detach() for name, p in self.chosen.items()}, self.ranks)

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, whole on the first rank; all must ask."""
        found = {"n_updates": torch.tensor(self._n_updates)}
        for name, p in self.chosen.items():
            found |= {f"value.{name}": p.detach(), f"average.{name}": self._average[name]}
            found |= {f"{key}.{name}": one for key, one in self._adam.state[p].items()}
        return gathered(found, self.ranks)

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave, to any number of ranks."""
        self._n_updates = int(state["n_updates"])
        for name, p in self.chosen.items():
            fill(p, state[f"value.{name}"])
            fill(self._average[name], state[f"average.{name}"])
            kept = self._adam.state[p] = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{key}.{name}" in state:
                    one = torch.tensor(0.0) if key == "step" else torch.zeros_like(p)
                    fill(one, state[f"{key}.{name}"])
                    kept[key] = one


def drawn(seed: int, step: int, *numbers: int) -> torch.Generator:
    """The generator of a step's random numbers."""
    mixed = (seed * 1_000_003 + step) * 1_000_003 + sum(n * 7919**i for i, n in enumerate(numbers))
    return torch.Generator().manual_seed(mixed % 2**63)


def own(ranks: Ranks, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Of each tensor N ... the rows r, r + world, ... that are this rank's of a batch.

    Raises:
        ValueError: N is no multiple of the number of ranks.
    """
    _require_shares(len(tensors[0]), ranks)
    return tensors if ranks.world == 1 else tuple(t[ranks.rank :: ranks.world] for t in tensors)


def train(
    nets: Mapping[str, Net],
    how: Training,
    turn: Callable[[int], tuple[Mapping[str, float], Mapping[str, Tensor]]],
    judge: Callable[[], float],
    watch: Watch,
    show: Callable[[], tuple[Tensor, Tensor]] | None = None,
) -> tuple[float, float]:
    """Runs turns until all are done or nothing gets better; the score before and that of the best.

    turn(k) descends once and gives named values and the batch that it saw. judge scores the first
    net, the lower the better; at the end it has the best average that was judged, or what it
    started with. Only its own weights are put back, not those of the other nets. show gives latents
    N C T H W of the first net and of its teacher, which the watch gets after each judgement.

    Several ranks all make these calls; values and scores that are told are their means, and the
    first one saves.

    Raises:
        Diverged: a value that is not finite.
        ValueError: a net is not trained by all the ranks of this training.
    """
    first = next(iter(nets.values()))
    ranks = first.ranks
    if any(net.ranks.world != watch.ranks.world for net in nets.values()):
        raise ValueError(f"one of {watch.ranks.world} ranks trains alone: give Net the pupil's")
    begun, scores = _resumed(nets, watch)

    def judged(done: int) -> None:
        scores.append(_mean(ranks, [judge()])[0])
        watch.judged(done, scores[-1])
        if show is not None:
            watch.samples(done, *show())

    def save(name: str, state: Mapping[str, Tensor]) -> None:
        if ranks.leads:
            watch.save(name, state)

    if not scores:
        judged(0)
        save("best", first.weights())
    for k in range(begun, how.n_steps):
        if _stale(scores, how.patience):
            break
        values, batch = turn(k)
        values = dict(zip(values, _mean(ranks, list(values.values())), strict=True))
        if not all(map(math.isfinite, values.values())):
            told = ", ".join(f"{name} {value:g}" for name, value in values.items())
            raise Diverged(f"step {k}: {told}; its batch is in {watch.keep_batch(k, batch)}")
        watch.step(k + 1, how.n_steps, values)
        if (k + 1) % how.judge_every == 0 or k + 1 == how.n_steps:
            with first.averaged():
                judged(k + 1)
            if scores[-1] < min(scores[:-1]):
                save("best", first.average())
        if (k + 1) % _SAVE_EVERY == 0 or k + 1 == how.n_steps:
            save("state", _state(k + 1, scores, nets))
    ranks.barrier()  # until the best is written
    best = watch.load("best")
    if best is not None:
        first.put(best)
    return scores[0], min(scores)


def _mean(ranks: Ranks, values: Sequence[float]) -> list[float]:
    """Of all ranks' values, one by one; not finite if one of them is not."""
    return [sum(one) / ranks.world for one in zip(*ranks.gathered(values), strict=True)]


def _require_shares(n: int, ranks: Ranks) -> None:
    if n % ranks.world:
        raise ValueError(f"a batch of {n} is no multiple of {ranks.world} ranks; change `batch`")


def _checkpointed(module: nn.Module) -> None:
    enable = getattr(module, "enable_gradient_checkpointing", None)
    if enable is None:
        raise ValueError(f"checkpoint: {type(module).__name__} cannot run its blocks again")
    enable()


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
        net.restore(Named(state, f"{name}/"))
    return int(state["done"]), state["scores"].tolist()
