"""Probe: what each layer costs the model in each format that a recipe offers, measured.

A layer's share in the velocity's error is what rounding leaves of its output (estimated for every
format from the inputs' covariance) times what an error of its output does to the velocity (measured
once a layer: it alone is rounded, everything else is full precision). Layers' errors are nearly
independent, so their sum is what a budget minimises; see hbxt_compress.allocation.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hbxt_compress.algorithms.choose import estimated_errors, output_error
from hbxt_compress.algorithms.scales import search_scales
from hbxt_compress.chain import layer_at
from hbxt_compress.errors import CalibrationError, listing
from hbxt_compress.formats import FORMATS
from hbxt_compress.layers import LayerName
from hbxt_compress.machine import Machine
from hbxt_compress.models import family_of
from hbxt_compress.plan import FULL_PRECISION, Choice
from hbxt_compress.source import Source
from hbxt_compress.stages.side_by_side import SideBySide
from hbxt_compress.stages.walk import Station, members, walk
from hbxt_compress.stats import LayerInputs
from hbxt_compress.store import Entry, Work
from hbxt_compress.trajectories import load_trajectories

__all__ = ["FACTS", "VERSION", "probe", "read_damages"]

VERSION = 2
FACTS = ("torch", "diffusers", "transformers")
log = logging.getLogger(__name__)
_N_PROMPTS = 12  # of the trajectories, evenly spread: a sensitivity needs fewer rows than rounding
_N_HELD_OUT = 3  # of them
_N_BATCHES = 4  # through which an error is followed to the velocity
_FOLLOWED = "int4-g64"  # the format whose error is followed
_NUDGE = 0.1  # relative size of the error that measures how much the text matters
_DECODER = "vae_decoder"
_N_DECODED, _FRAMES_DECODED = 2, 2  # prompts, latent frames: a decoder is slow, and linear enough
_RESULT = "damages.json"


def probe(
    work: Work, source: Source, choices: Sequence[Choice], trajectories: Entry, on: Machine
) -> None:
    """Writes damages.json: layer -> format -> lost share of the velocity's energy, 0..inf."""

    def make(path: Path) -> None:
        damages = _probe(source, choices, trajectories, on)
        path.write_text(json.dumps(damages, indent=1, sort_keys=True))

    work.expect(1)
    work.piece(_RESULT, make)


def read_damages(folder: Path) -> Mapping[LayerName, Mapping[str, float]]:
    """What `probe` wrote."""
    return json.loads((folder / _RESULT).read_text())


def _probe(
    source: Source, choices: Sequence[Choice], trajectories: Entry, on: Machine
) -> dict[str, dict[str, float]]:
    every = load_trajectories(trajectories.folder)
    _require_observable(source, choices, len(every))
    chosen = torch.linspace(0, len(every) - 1, min(_N_PROMPTS, len(every))).round().int().tolist()
    some = [every[i] for i in chosen]
    held_out = min(_N_HELD_OUT, len(some) - 1)
    waiting = {choice.spec.name: choice for choice in choices}
    damages: dict[str, dict[str, float]] = {}
    followed: _Followed | None = None
    for station in walk(source, some, held_out, torch.device(on.device), alone=True):
        if followed is None or followed.component != station.component:
            if followed is not None and followed.component == "text_encoder":
                gain = _text_gain(station.sides)
                damages = {n: {f: d * gain for f, d in row.items()} for n, row in damages.items()}
            followed = _Followed(station)
        own = members(station, [choice.spec for choice in waiting.values()])
        done = len(choices) - len(waiting)
        where = f"{station.component} {station.piece}"
        log.info("probe: %s", where, extra={"progress": (done, len(choices), "probe")})
        if not own:
            continue
        groups = station.sides.groups(station.piece, [spec.module for spec in own])
        inputs = station.sides.inputs(station.piece, [group[0] for group in groups], "covariance")
        for group in groups:
            for module in group:
                name = LayerName(f"{station.component}/{module}")
                damages[name] = _damages(waiting.pop(name), inputs[group[0]], station, followed)
    unseen = [name for name, choice in waiting.items() if choice.spec.component != _DECODER]
    if unseen:
        raise CalibrationError(
            f"{len(unseen)} layers saw no input at the observed steps; observe steps of both "
            f"experts:\n{listing(unseen)}"
        )
    blind = [choice for name, choice in waiting.items() if choice.spec.component == _DECODER]
    if blind:
        damages |= _decoder_damages(source, blind, [one.latents_KCTHW[-1] for one in some])
    log.info("probe: done", extra={"progress": (1, 1, "probe")})
    return damages


def _require_observable(source: Source, choices: Sequence[Choice], n_prompts: int) -> None:
    if n_prompts < 2:
        raise CalibrationError("a budget goes by errors on held-out prompts: give two or more")
    chained = family_of(source).chained
    blind = [
        f"{choice.spec.name}: its inputs are no features, it is a {choice.spec.kind}"
        for choice in choices
        if choice.spec.component in chained and choice.spec.kind != "linear"
    ]
    if blind:
        raise CalibrationError(f"a budget cannot decide about these; keep them:\n{listing(blind)}")


@torch.no_grad()
def _decoder_damages(
    source: Source, choices: Sequence[Choice], latents: Sequence[Tensor]
) -> dict[str, dict[str, float]]:
    """By layer and format, what rounding it alone costs the pixels, relative to their variance.

    Counted one to one with errors of the velocity, which reach the pixels about as large.
    """
    family = family_of(source)
    module = family.load(source, _DECODER)
    shown = torch.stack(list(latents[:_N_DECODED]))[:, :, :_FRAMES_DECODED]
    expected = family.decode(source, module, shown)
    energy = float(expected.var())
    damages: dict[str, dict[str, float]] = {}
    for i, choice in enumerate(choices):
        log.info("probe: %s", choice.spec.name, extra={"progress": (i, len(choices), "probe")})
        layer = layer_at(module, choice.spec.module)
        original, row = layer.weight.data, dict[str, float]()
        for name in choice.formats:
            row[name] = 0.0
            if name not in FULL_PRECISION:
                weight_OI = original.flatten(1)
                grid = search_scales(weight_OI, FORMATS[name])
                layer.weight.data = grid.value(grid.levels(weight_OI)).reshape(original.shape)
                got = family.decode(source, module, shown)
                row[name] = float((got - expected).square().mean()) / energy
                layer.weight.data = original
        damages[choice.spec.name] = row
    return damages


class _Followed:
    """A component in full precision, and what the error of one layer does to its output."""

    def __init__(self, station: Station) -> None:
        self.component, self.sides = station.component, station.sides
        n = len(self.sides.batches)
        self.indices = torch.linspace(0, n - 1, min(_N_BATCHES, n)).round().int().tolist()
        batches = [self.sides.batches[i] for i in self.indices]
        with torch.no_grad():
            self.outputs = [self.sides.full.whole(*batch.full) for batch in batches]

    def error(self, piece: str) -> float:
        """sum w ||out' - out||^2 / sum w ||out||^2 with the full model as it is now."""
        lost = kept = 0.0
        for i, expected in zip(self.indices, self.outputs, strict=True):
            weight = self.sides.batches[i].weight
            got = self.sides.output(piece, i)
            lost += weight * float((got - expected).square().sum())
            kept += weight * float(expected.square().sum())
        return lost / kept


@torch.no_grad()
def _text_gain(sides: SideBySide) -> float:
    """The velocity's relative error for a relative error of the text's hidden states, in power."""
    lost = kept = 0.0
    source = torch.Generator().manual_seed(0)
    for batch in sides.batches[: 2 * _N_BATCHES]:
        latents, timestep, text = batch.full
        noise = torch.randn(text.shape, generator=source).to(text) * (text != 0)
        noise *= _NUDGE * text.square().sum().sqrt() / noise.square().sum().sqrt()
        expected = sides.full.whole(latents, timestep, text)
        got = sides.full.whole(latents, timestep, text + noise)
        lost += batch.weight * float((got - expected).square().sum())
        kept += batch.weight * float(expected.square().sum())
    return lost / kept / _NUDGE**2


def _damages(
    choice: Choice, inputs: LayerInputs, station: Station, followed: _Followed
) -> dict[str, float]:
    layer = layer_at(station.sides.full.module, choice.spec.module)
    original = layer.weight.data
    weight_OI = original.flatten(1).float()
    fmts = [FORMATS[name] for name in choice.formats if name not in FULL_PRECISION]
    errors = estimated_errors(weight_OI, inputs, fmts)
    fmt = FORMATS[_FOLLOWED if weight_OI.shape[1] % 64 == 0 else "int8-channel"]
    grid = search_scales(weight_OI, fmt)
    rounded_OI = grid.value(grid.levels(weight_OI))
    sent = output_error(weight_OI, rounded_OI, inputs)
    # A constant error goes into the bias, as it will when the layer is rounded.
    bias = None if layer.bias is None else layer.bias.data
    layer.weight.data = rounded_OI.reshape(original.shape).to(original)
    if bias is not None:
        moved = (weight_OI - rounded_OI).double() @ inputs.fit.mean_y_I
        layer.bias.data = bias + moved.to(bias)
    arrived = followed.error(station.piece)
    layer.weight.data = original
    if bias is not None:
        layer.bias.data = bias
    gain = arrived / sent if sent > 0 else 0.0
    found = {fmt.name: gain * error for fmt, error in zip(fmts, errors, strict=True)}
    return {**found, **{name: 0.0 for name in choice.formats if name in FULL_PRECISION}}
