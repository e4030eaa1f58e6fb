"""Quantize: round every planned weight; one file a block, so that a kill loses at most one.

Where an algorithm wants to know a layer's inputs, the model is walked from the prompt to the
velocity: each layer is rounded on what it receives in the model whose earlier layers are quantized
already, and aims at what the full-precision model computes at the same state of the trajectory.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from hbxt_compress.algorithms import AnyPreparer
from hbxt_compress.algorithms.choose import IDENTITY
from hbxt_compress.algorithms.diagnose import measure
from hbxt_compress.algorithms.transform import Transform
from hbxt_compress.chain import Chain, layer_at
from hbxt_compress.errors import CalibrationError, SourceError, listing
from hbxt_compress.formats import FORMATS
from hbxt_compress.heap import give_back
from hbxt_compress.layers import LayerName, Pair
from hbxt_compress.machine import Machine
from hbxt_compress.models import Family, family_of
from hbxt_compress.plan import LayerPlan
from hbxt_compress.quantized import QuantizedModel, QuantizedWeight, save_block
from hbxt_compress.ranks import ALONE, Ranks
from hbxt_compress.source import Source
from hbxt_compress.stages.by_rows import activation_payload, round_blindly
from hbxt_compress.stages.prepare import Kept, input_transform, mix
from hbxt_compress.stages.products import products_for
from hbxt_compress.stages.side_by_side import HEAD
from hbxt_compress.stages.tables import TABLES, use_tables
from hbxt_compress.stages.walk import Station, members, set_weights, walk
from hbxt_compress.stats import LayerInputs, Need
from hbxt_compress.store import Entry, Work
from hbxt_compress.trajectories import Trajectory, load_trajectories

__all__ = ["FACTS", "VERSION", "quantize"]

VERSION = 7
FACTS = ("torch",)
_WIDE = 1024  # features, whose covariance takes 4 MB: what the heap kept lies under it for nothing
log = logging.getLogger(__name__)


def quantize(
    work: Work,
    source: Source,
    layers: Sequence[LayerPlan],
    on: Machine,
    prepare: Sequence[AnyPreparer] = (),
    trajectories: Entry | None = None,
    n_held_out: int = 0,
    n_first: int | None = None,
) -> None:
    """Writes `<component>.<piece>.safetensors` for every piece with quantized layers.

    trajectories: what calibrate wrote; None if no layer's algorithm asks for its inputs.
    n_held_out: the last prompts, to choose with. n_first: the first ones, whose rows are learned
    from; None: all the others. Ranks share the states that the model is walked with, the layers of
    one input, and the pieces whose algorithms ask for no inputs.

    Raises:
        SourceError: a weight holds NaN or infinity.
        CalibrationError: a layer saw no input, or one that is not finite.
    """
    family, device = family_of(source), torch.device(on.device)
    blind = [layer for layer in layers if layer.spec.kind != "embedding"]
    tables = [layer for layer in layers if layer.spec.kind == "embedding"]
    work.expect(
        len({(layer.spec.component, layer.spec.block) for layer in blind})
        + len({layer.spec.component for layer in tables})
    )
    by_component = groupby(tables, key=lambda layer: layer.spec.component)
    for i, (component, group) in enumerate(by_component):
        weights, own = family.weights(source, component), list(group)
        if work.ranks.owns(i):
            make = partial(round_blindly, weights, own, device=device)
            work.piece(TABLES.format(component), make)
    work.ranks.barrier()
    if trajectories is not None:
        seen = [layer for layer in blind if layer.spec.component in family.chained]
        blind = [layer for layer in blind if layer.spec.component not in family.chained]
        _require_finite(source, family, seen, work.ranks)  # before hours, and all of them at once
        observed = load_trajectories(trajectories.folder, first=n_first, last=n_held_out)
        _walk(work, source, family, seen, prepare, observed, n_held_out, on)
    by_piece = groupby(blind, key=lambda layer: (layer.spec.component, layer.spec.block))
    for i, ((component, block), group) in enumerate(by_piece):
        if not work.ranks.owns(i):
            continue
        name = f"{component}.{'rest' if block is None else format(block, '03d')}.safetensors"
        log.info("quantize: %s", name)
        weights, own = family.weights(source, component), list(group)
        make = partial(round_blindly, weights, own, device=device)
        try:
            work.piece(name, make)
        except SourceError:
            _require_finite(source, family, blind)
            raise
    work.ranks.barrier()
    log.info("quantize: done", extra={"progress": (1, 1, "quantize")})


def _walk(
    work: Work,
    source: Source,
    family: Family,
    layers: Sequence[LayerPlan],
    prepare: Sequence[AnyPreparer],
    observed: Sequence[Trajectory],
    n_held_out: int,
    on: Machine,
) -> None:
    """Rounds the layers of all components whose inputs can be observed, in running order."""
    waiting = {layer.spec.name: layer for layer in layers}
    for station in walk(source, observed, n_held_out, torch.device(on.device), work.ranks):
        rounded = work.folder / TABLES.format(station.component)
        if station.piece == HEAD and rounded.exists():
            tables = QuantizedModel.load(rounded).weights
            half, names = station.sides.half.module, family.weights(source, station.component)
            use_tables(half, station.component, tables, names.second_names)
        own = members(station, [layer.spec for layer in waiting.values()])
        done = len(layers) - len(waiting)
        where = f"{station.component} {station.piece}"
        log.info("quantize: %s", where, extra={"progress": (done, len(layers), "quantize")})
        if own:
            chosen = [waiting.pop(spec.name) for spec in own]
            name = f"{station.component}.{station.piece}.safetensors"
            pairs = (
                family.pairs(source, station.component, own[0].block)
                if own[0].block is not None
                else ()
            )
            make = partial(_piece, station, pairs, chosen, prepare, work.ranks)
            path = work.joint_piece(name, make, save_block)
            finished = QuantizedModel.load(path).weights
            set_weights(station.sides.half.module, station.component, finished)
    if waiting:
        raise CalibrationError(
            f"{len(waiting)} layers saw no input at the observed steps; observe steps of both "
            f"experts:\n{listing(list(waiting))}"
        )


def _piece(
    station: Station,
    pairs: Sequence[Pair],
    chosen: Sequence[LayerPlan],
    prepare: Sequence[AnyPreparer],
    ranks: Ranks,
) -> dict[LayerName, QuantizedWeight]:
    """The rounded weights of a piece: group by group, each after the ones before it."""
    sides, planned = station.sides, {layer.spec.module: layer for layer in chosen}
    done: dict[LayerName, QuantizedWeight] = {}
    kept = Kept()
    mixed = mix(station, pairs, planned, prepare, kept, ranks)
    for group in sides.groups(station.piece, list(planned)):
        rounded = _group(station, group, planned, prepare, mixed, ranks)
        set_weights(sides.half.module, station.component, rounded)
        done |= rounded
    if kept.restore():
        sides.begin_anew(sides.full)
    return done


def _group(
    station: Station,
    group: Sequence[str],
    planned: Mapping[str, LayerPlan],
    prepare: Sequence[AnyPreparer],
    mixed: Mapping[str, str],
    ranks: Ranks,
) -> dict[LayerName, QuantizedWeight]:
    """The rounded weights of one input's layers; its statistics are gone before the next ones."""
    sides = station.sides
    needs = {planned[module].need for module in group} - {None}
    inputs, how, transform = None, IDENTITY, Transform()
    if needs:
        need: Need = "covariance" if "covariance" in needs else "moments"
        inputs = sides.inputs(station.piece, group[:1], need)[group[0]]
        if inputs.fit.absmax_I.numel() >= _WIDE:
            give_back()
        choose = partial(input_transform, station, group, planned, inputs, prepare)
        how, transform = ranks.by_first(choose)
    tasks = []
    for module in group:
        layer, member = layer_at(sides.full.module, module), planned[module]
        notes = {"mixed": mixed[module]} if module in mixed else {}
        notes |= {} if transform.is_identity else {"input": how}
        seen = inputs and inputs.of_layer(takes_bias=layer.bias is not None)
        weight_OI = layer.weight.detach().flatten(1).float()
        tasks.append(
            partial(_round, weight_OI, layer.bias, seen, member, transform, notes, sides.full)
        )
    names = [planned[module].spec.name for module in group]
    return dict(zip(names, ranks.spread(tasks), strict=True))


def _round(
    weight_OI: Tensor,
    bias_O: Tensor | None,
    inputs: LayerInputs | None,
    member: LayerPlan,
    transform: Transform,
    notes: Mapping[str, str],
    chain: Chain,
) -> QuantizedWeight:
    """One layer of a chain in its format. bias_O: its own, which goes with the rounded weight."""
    fmt, how, name = FORMATS[member.weights], member.how, member.spec.name
    assert how is not None  # the plan refuses quantized formats without a rounder
    seen = inputs if inputs is None else transform.inputs(inputs)
    weight_OI = transform.weight(weight_OI)
    try:
        rounded = how.round(weight_OI, seen, fmt)
    except ValueError as error:
        raise CalibrationError(f"{name} {list(member.spec.shape)}: {error}") from None
    if rounded.shift_O is not None:
        bias_O = (0 if bias_O is None else bias_O.detach().float()) + rounded.shift_O
    n_bits = 8 * fmt.bytes(member.spec.shape) / weight_OI.numel()
    decoded_OI = fmt.decode(rounded.payload)
    with products_for(chain):
        loss = measure(weight_OI, decoded_OI, rounded.shift_O, seen, n_bits, rounded.target_OI)
    payload = {**rounded.payload, **transform.payload(), **activation_payload(member, seen)}
    return QuantizedWeight(
        format=fmt.name,
        payload={key: tensor.cpu() for key, tensor in payload.items()},
        shape=member.spec.shape,
        loss=loss,
        bias_O=None if bias_O is None else bias_O.detach().float().clone().cpu(),
        notes={**rounded.notes, **notes},
    )


def _weight(source: Source, family: Family, member: LayerPlan) -> Tensor:
    weights = family.weights(source, member.spec.component)
    return weights.unchecked(member.spec.parameter).flatten(1)


def _require_finite(
    source: Source, family: Family, layers: Sequence[LayerPlan], ranks: Ranks = ALONE
) -> None:
    own = [
        f"{layer.spec.name} {list(layer.spec.shape)}"
        for layer in ranks.share(layers)
        if not bool(torch.isfinite(_weight(source, family, layer).float()).all())
    ]
    broken = sorted(name for part in ranks.gathered(own) for name in part)
    if broken:
        raise SourceError(f"{source.folder}: weights with NaN or infinity:\n{listing(broken)}")
