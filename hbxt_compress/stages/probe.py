"""Probe: what each layer costs the model in each format that a recipe offers, measured.

Every component is passed once there and once back, a block in memory at a time: there, formats are
judged by the covariance of each layer's inputs; back, gradients of the velocity tell what arrives
of a layer's error. Layers' errors are nearly independent, so their sum is what a budget minimises;
see hbxt_compress.allocation.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hbxt_compress.algorithms.scales import search_scales
from hbxt_compress.chain import LARGE, layer_at
from hbxt_compress.errors import CalibrationError, listing
from hbxt_compress.formats import FORMATS
from hbxt_compress.heap import give_back
from hbxt_compress.layers import LayerName
from hbxt_compress.machine import Machine
from hbxt_compress.models import family_of
from hbxt_compress.plan import FULL_PRECISION, Choice
from hbxt_compress.source import Source
from hbxt_compress.stages.batches import text_batches, transformer_batches
from hbxt_compress.stages.products import products_for
from hbxt_compress.stages.sensitivity import Sensitivity, arrive, leave
from hbxt_compress.stages.side_by_side import Batch
from hbxt_compress.stages.tape import LOOSE, Tape
from hbxt_compress.store import Entry, Work
from hbxt_compress.trajectories import load_trajectories

__all__ = [
    "FACTS",
    "LEAST_SAMPLES",
    "N_HELD_OUT",
    "N_PROMPTS",
    "N_PROMPTS_OF_LARGE",
    "VERSION",
    "probe",
    "read_damages",
]

VERSION = 5
FACTS = ("torch", "diffusers", "transformers")
log = logging.getLogger(__name__)
N_PROMPTS = 12  # of the trajectories, evenly spread: a sensitivity needs fewer rows than rounding
N_PROMPTS_OF_LARGE = 3  # and one sample of signs a state; the log tells the standard errors
N_HELD_OUT = 3  # of them
LEAST_SAMPLES = 48  # of random signs; where states are fewer, each gets several
_N_SHARES = 4  # of the samples: a prompt's text answers for each share by itself
_TEXT = 2  # which input of a transformer the text is
_ENCODER, _DECODER = "text_encoder", "vae_decoder"
_N_DECODED, _FRAMES_DECODED = 2, 2  # prompts, latent frames: a decoder is slow, and linear enough
_SIDE_DECODED = 32  # latents, from the upper left corner
_RESULT, _UNFINISHED = "damages.json", "unfinished"


def probe(
    work: Work, source: Source, choices: Sequence[Choice], trajectories: Entry, on: Machine
) -> None:
    """Writes damages.json: layer -> format -> lost share of the velocity's energy, 0..inf.

    Until that is done, hidden states of all blocks lie beside it, and how far it is: a killed run
    goes on with the next block. Rank 0 does it alone.

    Raises:
        CalibrationError: too few prompts, or layers whose inputs cannot be observed.
    """

    def make(path: Path) -> None:
        damages = _damages(source, choices, trajectories, torch.device(on.device), folder)
        path.write_text(json.dumps(damages, indent=1, sort_keys=True))

    work.expect(1)
    if not work.ranks.leads:
        return
    folder = work.folder / _UNFINISHED
    work.piece(_RESULT, make)
    give_back()
    shutil.rmtree(folder, ignore_errors=True)


def read_damages(folder: Path) -> Mapping[LayerName, Mapping[str, float]]:
    """What `probe` wrote."""
    return json.loads((folder / _RESULT).read_text())


def _damages(
    source: Source,
    choices: Sequence[Choice],
    trajectories: Entry,
    device: torch.device,
    folder: Path,
) -> dict[LayerName, dict[str, float]]:
    every = load_trajectories(trajectories.folder)
    _require_observable(source, choices, len(every))
    family = family_of(source)
    large = any(n > LARGE for n in family.parameters(source).values())
    n = min(N_PROMPTS_OF_LARGE if large else N_PROMPTS, len(every))
    some = [every[i] for i in torch.linspace(0, len(every) - 1, n).round().int().tolist()]
    held_out = min(N_HELD_OUT, n - 1)
    tour = _Tour(source, choices, device, folder)
    numbered = text_batches(some, held_out)
    encoder = tour.there(_ENCODER, [batch for _, batch in numbered])
    # Leaves of autograd: a batch's gradient finds its way to the texts that it was made of.
    leaves = [text.requires_grad_() for text in encoder.outputs]
    texts = {i: (leaf, leaf) for (i, _), leaf in zip(numbered, leaves, strict=True)}
    shares = [[torch.zeros_like(leaf) for leaf in leaves] for _ in range(_N_SHARES)]
    signs, total = torch.Generator().manual_seed(0), 0.0
    for component in family.components(source):
        if component not in family.chained or component == _ENCODER:
            continue
        second = component == "transformer_2"
        batches = transformer_batches(some, texts, held_out, family.sampler(source), second=second)
        if not batches:  # no observed step of this expert: its layers stay unseen
            continue
        tape = tour.there(component, batches)
        energy = sum(
            batch.weight * float(velocity.square().sum())
            for batch, velocity in zip(tape.batches, tape.outputs, strict=True)
        )
        tape.start(_signs(tape, signs, 1 if large else LEAST_SAMPLES))
        tour.back(component, tape, energy)
        total += energy
        _share_out(tape, leaves, shares)
    if any(choice.spec.component == _ENCODER for choice in choices):
        encoder.start([list(of_one) for of_one in zip(*shares, strict=True)])
        tour.back(_ENCODER, encoder, total)
    waiting = [choice for choice in choices if choice.spec.name not in tour.damages]
    unseen = [c.spec.name for c in waiting if c.spec.component != _DECODER]
    if unseen:
        raise CalibrationError(
            f"{len(unseen)} layers saw no input at the observed steps; observe steps of both "
            f"experts:\n{listing(unseen)}"
        )
    if waiting:
        latents = [one.latents_KCTHW[-1] for one in some]
        tour.damages |= _decoder_damages(source, waiting, latents, device)
    log.info("probe: done", extra={"progress": (1, 1, "probe")})
    return tour.damages


class _Tour:
    """Through all components, there and back. damages: of the layers that are done, by format."""

    def __init__(
        self, source: Source, choices: Sequence[Choice], device: torch.device, folder: Path
    ) -> None:
        self._source, self._device, self._folder = source, device, folder
        self._choices = {choice.spec.name: choice for choice in choices}
        self._known: dict[LayerName, Sensitivity] = {}
        self.damages: dict[LayerName, dict[str, float]] = {}

    def there(self, component: str, batches: Sequence[Batch]) -> Tape:
        """A tape at its end."""
        chain = family_of(self._source).streamed(self._source, component, self._device)
        batches = [batch.to(self._device) for batch in batches]
        tape = Tape(chain, batches, self._folder / component)
        for piece in tape.there:
            own, path = (
                self._own(component, piece),
                self._folder / f"{component}.{piece}.left.checkpoint",
            )
            self._tell(component, piece)
            if piece != LOOSE and path.exists():
                tape.skip(piece)
                known = json.loads(path.read_text())
                self._known |= {own[k].spec.name: Sensitivity.from_json(known[k]) for k in known}
                continue
            with tape.at(piece), products_for(chain):
                found = leave(chain.module, own, tape.forward(piece, list(own)))
            self._known |= {own[module].spec.name: one for module, one in found.items()}
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(json.dumps({name: one.to_json() for name, one in found.items()}))
            os.replace(unfinished, path)
        return tape

    def back(self, component: str, tape: Tape, energy: float) -> None:
        """Follows a tape back to its start. energy: of all that it gives, by batches' weights."""
        errors, passed = [], self._passed(component, tape)
        for piece in tape.back:
            own = self._own(component, piece)
            known = {
                module: self._known[choice.spec.name]
                for module, choice in own.items()
                if choice.spec.name in self._known
            }
            self._tell(component, piece)
            if piece not in passed:
                with tape.at(piece), products_for(tape.chain):
                    arrive(tape.chain.module, known, tape.backward(piece, list(known)))
                if piece != LOOSE:
                    self._remember(component, tape, piece)
            for module, one in known.items():
                self.damages[own[module].spec.name] = one.damages(energy)
                errors.append(one.relative_error)
        if errors:
            log.info(
                "probe: %s: damages of %d layers, standard error %.0f %% in the median, %.0f %% at "
                "most", component, len(errors), 100 * median(errors), 100 * max(errors),
            )  # fmt: skip

    def _remember(self, component: str, tape: Tape, piece: str) -> None:
        """Writes down how far back a tape is, for a run that goes on from there."""
        arrived = {
            f"arrived {name}": torch.tensor(one.arrived, dtype=torch.float64)
            for name, one in self._known.items()
            if name.startswith(f"{component}/")
        }
        state = {key: one.cpu().contiguous() for key, one in (tape.state() | arrived).items()}
        path = self._folder / f"{component}.back.checkpoint"
        save_file(state, path.with_suffix(".tmp"), metadata={"piece": piece})
        os.replace(path.with_suffix(".tmp"), path)

    def _passed(self, component: str, tape: Tape) -> list[str]:
        """The pieces that an earlier run was back from; tape and arrivals are as it left them."""
        path = self._folder / f"{component}.back.checkpoint"
        if not path.exists():
            return []
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            piece = file.metadata()["piece"]
        for name, one in self._known.items():
            if name.startswith(f"{component}/"):
                one.arrived.extend(state.pop(f"arrived {name}").tolist())
        tape.restore(state)
        return tape.back[: tape.back.index(piece) + 1]

    def _own(self, component: str, piece: str) -> dict[str, Choice]:
        """The choices that a piece may call, by module."""
        block = None if piece == LOOSE else int(piece)
        return {
            choice.spec.module: choice
            for choice in self._choices.values()
            if choice.spec.component == component and choice.spec.block == block
        }

    def _tell(self, component: str, piece: str) -> None:
        done = len(self._known) + len(self.damages)
        progress = (done, 2 * len(self._choices), "probe")
        log.info("probe: %s %s", component, piece, extra={"progress": progress})


def _signs(tape: Tape, source: torch.Generator, n_least: int) -> list[list[Tensor]]:
    """For each batch random signs like its output, once or more, in all of its weight's energy."""
    n_states = sum(len(velocity) for velocity in tape.outputs)
    n = math.ceil(n_least / n_states)
    return [
        [
            (torch.randint(0, 2, velocity.shape, generator=source) * 2.0 - 1).to(velocity)
            * math.sqrt(batch.weight / n)
            for _ in range(n)
        ]
        for batch, velocity in zip(tape.batches, tape.outputs, strict=True)
    ]


def _share_out(tape: Tape, leaves: Sequence[Tensor], shares: Sequence[Sequence[Tensor]]) -> None:
    """Adds the gradients of all samples to those of their texts, each sample's to one share.

    Different samples' signs have nothing to do with each other, so neither have the shares.
    """
    for i, (batch, gradients) in enumerate(
        zip(tape.batches, tape.input_gradients(_TEXT), strict=True)
    ):
        for j, gradient in enumerate(gradients):
            place = torch.arange(len(gradient)) + i // 2 + j  # batches come in pairs
            for k, share in enumerate(shares):
                part = gradient * (place % len(shares) == k).to(gradient).view(-1, 1, 1)
                found = torch.autograd.grad(
                    batch.full[_TEXT], leaves, part, retain_graph=True,
                    allow_unused=True, materialize_grads=True,
                )  # fmt: skip
                for sum_1SD, one in zip(share, found, strict=True):
                    sum_1SD += one


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
    source: Source, choices: Sequence[Choice], latents: Sequence[Tensor], device: torch.device
) -> dict[LayerName, dict[str, float]]:
    """By layer and format, what rounding it alone costs the pixels, relative to their variance.

    Counted one to one with errors of the velocity, which reach the pixels about as large.
    """
    family = family_of(source)
    module = family.load(source, _DECODER).to(device)
    shown = torch.stack(list(latents[:_N_DECODED]))
    shown = shown[:, :, :_FRAMES_DECODED, :_SIDE_DECODED, :_SIDE_DECODED].to(device)
    expected = family.decode(source, module, shown)
    energy = float(expected.var())
    damages: dict[LayerName, dict[str, float]] = {}
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
