"""Walk: through a model from prompt to velocity, in full precision and half quantized at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hbxt_compress.algorithms.transform import Transform
from hbxt_compress.chain import layer_at
from hbxt_compress.formats import FORMATS
from hbxt_compress.layers import LayerName, LayerSpec
from hbxt_compress.models import family_of
from hbxt_compress.quantized import QuantizedWeight
from hbxt_compress.ranks import ALONE, Ranks
from hbxt_compress.source import Source
from hbxt_compress.stages.batches import Texts, text_batches, transformer_batches
from hbxt_compress.stages.side_by_side import HEAD, TAIL, SideBySide
from hbxt_compress.trajectories import Trajectory

__all__ = ["Station", "effective_weight", "members", "set_weights", "walk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """A piece of a component, about to be passed. sides: both models, all pieces before it done."""

    component: str
    piece: str
    sides: SideBySide


def walk(
    source: Source,
    trajectories: Sequence[Trajectory],
    n_held_out: int,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Iterator[Station]:
    """Every piece of every component that can be observed, in the order in which they run.

    Of several ranks each takes its share of the batches through all pieces.
    Who receives a station changes `sides.half` as they like; on the next one both models have
    passed it, and its weights are gone from memory.
    """
    family = family_of(source)
    sampler = family.sampler(source)
    texts: Texts = {}
    for component in family.components(source):
        if component not in family.chained:
            continue
        full, half = (family.streamed(source, component, device) for _ in range(2))
        half.share(full)
        if component == "text_encoder":
            numbered = text_batches(trajectories, n_held_out)
            batches = [batch for _, batch in numbered]
        else:
            second = component == "transformer_2"
            batches = transformer_batches(trajectories, texts, n_held_out, sampler, second=second)
        if not batches:  # no observed step of this expert: its layers stay unseen
            continue
        own = [batch.to(device) for batch in ranks.share(batches)]
        sides = SideBySide(full, half, own, ranks)
        for piece in sides.pieces:
            sides.enter(piece)
            yield Station(component=component, piece=piece, sides=sides)
            sides.advance(piece)
            sides.leave(piece)
        if component == "text_encoder":
            texts = _all_texts(ranks, [i for i, _ in numbered], sides.outputs)


def _all_texts(
    ranks: Ranks, prompts: Sequence[int], outputs: Sequence[tuple[Tensor, Tensor]]
) -> Texts:
    """Every prompt's text, on the CPU, from the ranks that have passed it."""
    own = zip(ranks.share(prompts), outputs, strict=True)
    parts = ranks.gathered({i: (full.cpu(), half.cpu()) for i, (full, half) in own})
    return {i: text for part in parts for i, text in part.items()}


def members(station: Station, waiting: Sequence[LayerSpec]) -> list[LayerSpec]:
    """Those of the layers that a piece runs."""
    own = [spec for spec in waiting if spec.component == station.component]
    if station.piece not in (HEAD, TAIL):
        return [spec for spec in own if spec.block == int(station.piece)]
    loose = [spec for spec in own if spec.block is None]
    called = station.sides.groups(station.piece, [spec.module for spec in loose])
    return [spec for spec in loose if any(spec.module in group for group in called)]


def set_weights(
    module: nn.Module, component: str, weights: Mapping[LayerName, QuantizedWeight]
) -> None:
    """Puts what quantized weights compute into a module of the component, in float32."""
    for name, weight in weights.items():
        layer = layer_at(module, name.removeprefix(f"{component}/"))
        decoded = effective_weight(weight).reshape(layer.weight.shape)
        layer.weight.data = decoded.to(layer.weight)
        if weight.bias_O is not None:
            layer.bias.data = weight.bias_O.to(layer.bias)


def effective_weight(weight: QuantizedWeight) -> Tensor:
    """The float32 O I matrix that a quantized weight multiplies the layer's own input with."""
    decoded_OI = FORMATS[weight.format].decode(weight.payload)
    return Transform.of(weight.payload).undo(decoded_OI)
