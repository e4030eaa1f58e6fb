"""Training: what a distiller's networks take on each of several ranks, from configs and headers.

Weights, gradients, optimizer and average are sharded, so they shrink with the number of ranks.
What a forward keeps for its gradients shrinks with the rows of the batch that are a rank's. Beside
both, weights are gathered: a block's while it runs, the next one's, a block's gradients, and what
no block has.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from hbxt_compress.algorithms import DISTILLERS, AnyDistiller
from hbxt_compress.algorithms.training import Training
from hbxt_compress.costs.shown import Forwards, whole
from hbxt_compress.models import Family
from hbxt_compress.source import Source

__all__ = ["Kept", "NetworkBytes", "TrainingCost", "kept_by", "training_costs"]

_GRADIENT = 3  # forwards that a gradient is: the backward takes twice as many products
_FLOAT32 = 4
_TRAINED = "transformer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Bytes that a forward keeps for its gradients: a + b times the rows, beside the parameters.

    all: without checkpoints. given: with them, at the end of the forward; block: and in addition
    while a block runs again.
    """

    all: tuple[float, float]
    given: tuple[float, float]
    block: tuple[float, float]

    def bytes(self, n_rows: float, *, checkpoint: bool) -> float:
        parts = (self.given, self.block) if checkpoint else (self.all,)
        return sum(a + b * n_rows for a, b in parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkBytes:
    """A network's bytes on one rank; those of one that is not trained are its weights."""

    name: str
    weights: float
    gradients: float
    optimizer: float
    average: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.average


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCost:
    """What a distiller takes. n_rows: of the batch for each rank; 0 if nothing is trained.

    gathered, activations, activations_checkpointed: bytes on one rank. checkpoint: which of the two
    the recipe asks for. flops: of all ranks, as the recipe asks, and with the other setting;
    teaching_flops: of the teacher's clips. problem: why so many ranks cannot share it, or None.
    """

    distiller: str
    n_ranks: int
    n_parameters: int
    n_rows: int
    networks: tuple[NetworkBytes, ...]
    gathered: float
    activations: float
    activations_checkpointed: float
    checkpoint: bool
    flops: float
    flops_checkpointed: float
    teaching_flops: float
    problem: str | None = None

    def bytes(self, *, checkpoint: bool) -> float:
        """On one rank, all together."""
        kept = self.activations_checkpointed if checkpoint else self.activations
        return sum(one.total for one in self.networks) + self.gathered + kept

    def device_hours(self, tflops: float, *, checkpoint: bool) -> float:
        """Hours of all devices together, each of so many 10^12 operations a second."""
        flops = self.flops_checkpointed if checkpoint else self.flops
        return (flops + self.teaching_flops) / (tflops * 1e12) / 3600

    def to_json(self, tflops: float | None) -> dict[str, object]:
        """Plain JSON values, bytes with checkpoints and without."""
        ways = {"plain": False, "checkpointed": True}
        found = asdict(self) | {
            "bytes": {way: self.bytes(checkpoint=on) for way, on in ways.items()}
        }
        if tflops is not None:
            found["device_hours"] = {
                way: self.device_hours(tflops, checkpoint=on) for way, on in ways.items()
            }
        return found


def training_costs(
    family: Family, source: Source, how: Sequence[AnyDistiller], ranks: Sequence[int]
) -> list[TrainingCost]:
    """Of each distiller on each number of ranks; nothing but configs and headers is read.

    Of a model of two experts it is told what one of them takes.
    """
    spec, latent = family.sampler(source), family.latent_shape(source)
    forwards, n_parameters = Forwards(family, source, latent), family.parameters(source)[_TRAINED]
    layers = [one for one in family.layers(source) if one.component == _TRAINED]
    n_blocks = len({one.block for one in layers} - {None})
    passes = forwards.passes(_TRAINED)
    flops = sum(piece.flops * times for piece, times in whole(passes, n_blocks))
    in_blocks = sum(one.n_weights for one in layers if one.block is not None)
    block, root = in_blocks / n_blocks, n_parameters - in_blocks
    sides = sum(1 if spec.guidance_at(float(t)) == 1 else 2 for t in spec.timesteps())
    names = {kind: name for name, kind in DISTILLERS.items()}
    text, found, kept = (family.text_length(source), _width(forwards)), [], dict[str, Kept]()
    for one in how:
        settings: Training | None = getattr(one, "train", None)
        if settings is not None and settings.precision not in kept:
            module = family.skeleton(source, _TRAINED)
            chain = family.chain(source, _TRAINED, module)
            kept[settings.precision] = _kept(
                module, chain.blocks, chain.call, latent, text, settings
            )
        for n in ranks:
            world = n if any(net.trained for net in one.networks) else 1
            n_rows = 0 if settings is None else -(-settings.batch // world)
            held = None if settings is None else kept[settings.precision]
            trained, frozen = _counts(one)
            found.append(
                TrainingCost(
                    distiller=names.get(type(one), type(one).__name__),
                    n_ranks=world,
                    n_parameters=n_parameters,
                    n_rows=n_rows,
                    networks=tuple(
                        NetworkBytes(
                            name=net.name,
                            weights=net.n_bytes * n_parameters / world,
                            gradients=_FLOAT32 * n_parameters / world * net.trained,
                            optimizer=2 * _FLOAT32 * n_parameters / world * net.trained,
                            average=_FLOAT32 * n_parameters / world * net.trained,
                        )
                        for net in one.networks
                    ),
                    gathered=0.0 if world == 1 else _FLOAT32 * (3 * block + 2 * root),
                    activations=held.bytes(n_rows, checkpoint=False) if held else 0.0,
                    activations_checkpointed=held.bytes(n_rows, checkpoint=True) if held else 0.0,
                    checkpoint=settings is not None and settings.checkpoint,
                    flops=flops * (frozen + _GRADIENT * trained),
                    flops_checkpointed=flops * (frozen + (_GRADIENT + 1) * trained),
                    teaching_flops=flops * one.n_clips * sides,
                    problem=_problem(settings, world),
                )
            )
    return found


def kept_by(
    module: nn.Module, blocks: Sequence[nn.Module], run: Callable[[], Tensor]
) -> tuple[float, float, float]:
    """Bytes (all, given, block) of a run, see Kept; tensors may be fake ones."""
    own = {one.untyped_storage()._cdata for one in module.parameters()}
    saved: dict[int | None, dict[int, tuple[float, Tensor]]] = {}
    given: dict[int, tuple[float, Tensor]] = {}
    inside: list[int | None] = [None]

    def note(where: dict[int, tuple[float, Tensor]], one: Tensor) -> None:
        storage = one.untyped_storage()
        if storage._cdata not in own:
            where[storage._cdata] = float(storage.nbytes()), one  # kept, or its number is reused

    def pack(one: Tensor) -> Tensor:
        note(saved.setdefault(inside[0], {}), one.detach())
        return one

    def enter(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inside[0] = index
            for one in (*args, *kwargs.values()):
                for tensor in one if isinstance(one, (tuple, list)) else (one,):
                    if isinstance(tensor, Tensor):
                        note(given, tensor.detach())

        return hook

    def leave(*_: object) -> None:
        inside[0] = None

    hooks = [b.register_forward_pre_hook(enter(i), with_kwargs=True) for i, b in enumerate(blocks)]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    try:
        with saved_tensors_hooks(pack, lambda one: one):
            out = run()
    finally:
        for one in hooks:
            one.remove()
    del out
    outer = saved.pop(None, {})
    outside = outer | given
    everything = outer | {key: one for part in saved.values() for key, one in part.items()}
    most = max((_sum(part, outside) for part in saved.values()), default=0.0)
    return _sum(everything, {}), _sum(outside, {}), most


def _sum(tensors: dict[int, tuple[float, Tensor]], but: dict[int, tuple[float, Tensor]]) -> float:
    return sum(size for key, (size, _) in tensors.items() if key not in but)


def _kept(
    module: nn.Module, blocks: Sequence[nn.Module], call: Callable[..., Tensor],
    latent: Sequence[int], text: tuple[int, int], how: Training,
) -> Kept:  # fmt: skip
    """By what one row and two rows keep; tensors have shapes and no memory."""
    cpu, counts = torch.device("cpu"), []
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.to_empty(device=cpu).requires_grad_(True)
        for n in (1, 2):
            inputs = torch.empty(n, *latent), torch.empty(n), torch.empty(n, *text)
            with how.autocast(cpu):
                counts.append(kept_by(module, blocks, partial(call, module, *inputs)))
    lines = [(2 * one - two, two - one) for one, two in zip(*counts, strict=True)]
    return Kept(all=lines[0], given=lines[1], block=lines[2])


def _width(forwards: Forwards) -> int:
    return forwards.passes("text_encoder").output_shape[-1]


def _counts(how: AnyDistiller) -> tuple[float, float]:
    """States answered with a gradient, and without."""
    nets = how.networks
    return sum(one.n_gradients for one in nets), sum(one.n_forwards for one in nets)


def _problem(how: Training | None, world: int) -> str | None:
    if how is None or how.batch % world == 0:
        return None
    return f"a batch of {how.batch} is no multiple of {world} ranks"
