"""Bisection: which part of a model, and which denoising steps, the error of its clips comes from.

One part after the other is put back into full precision, and what that gains is measured on a few
clips. Parts of a student are those of its own full precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hbxt_compress.artifact import Artifact
from hbxt_compress.clips import ClipSet
from hbxt_compress.evaluation import REFERENCE, sources_of, steps_of
from hbxt_compress.machine import Machine
from hbxt_compress.metrics.latents import latent_curve
from hbxt_compress.metrics.pixels import psnr
from hbxt_compress.pipeline import artifact_of, plan_of, ranges_of, rounded_of
from hbxt_compress.recipe import Recipe, load_recipe
from hbxt_compress.source import Source
from hbxt_compress.stages.sample import sample
from hbxt_compress.stages.swap import FOLDER, blocks_of, swap
from hbxt_compress.store import Entry, Missing, Store
from hbxt_compress.suite import Suite

__all__ = ["Bisection", "Part", "bisect"]

_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part that was put back: PSNR that its clips gained. layers: its worst, with errors."""

    name: str
    gain_db: float
    layers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bisection:
    """psnr_db: of the clips as they are, mean. parts: components, then blocks, most gain first.

    latent_error: by step, mean over clips, relative. note: what could not be put back, and why.
    """

    n_clips: int
    psnr_db: float
    components: tuple[Part, ...]
    blocks: tuple[Part, ...]
    latent_error: tuple[float, ...]
    note: str = ""

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        return asdict(self)

    @property
    def text(self) -> str:
        """Where the error enters, in a sentence or two."""
        best = self.components[0]
        told = f"{best.name} in full precision again gains {best.gain_db:.1f} dB of PSNR"
        if self.blocks and best.name.startswith("transformer"):
            block = self.blocks[0]
            told += f"; of its blocks most does {block.name} ({block.gain_db:.1f} dB"
            told += f": {', '.join(block.layers)})" if block.layers else ")"
        if len(self.latent_error) > 1:
            grown = np.diff(self.latent_error, prepend=0.0)
            half = int(np.argmax(np.array(self.latent_error) >= self.latent_error[-1] / 2))
            told += (
                f". The latents' error grows most in step {int(grown.argmax()) + 1} of "
                f"{len(grown)}, half of it is there after step {half + 1}"
            )
        return f"{told}."


def bisect(
    artifact: Path, suite: Suite, store: Store, *, machine: Machine, model: str | None = None,
    n_clips: int = 4,
) -> Bisection:  # fmt: skip
    """Which part's return to full precision brings clips back; some clips of a suite tell.

    Blocks can be put back where the store still has what the artifact was exported from.
    """
    candidate = Artifact.open(artifact)
    source = sources_of(candidate, model, store, machine)[-1]
    size = candidate.manifest.geometry
    exact = Artifact.open(
        artifact_of(load_recipe(REFERENCE), source, store, machine, (size,)).folder
    )

    def clips(one: Artifact) -> ClipSet:
        items, n_steps = suite.items()[:n_clips], steps_of(one, suite)
        made = store.result(sample, artifact=one, items=items, n_steps=n_steps, on=machine)
        return ClipSet.load(made.folder)

    reference, own = clips(exact), clips(candidate)
    before = _psnr(reference, own)

    def gain(entry: Entry) -> float:
        return _psnr(reference, clips(Artifact.open(entry.folder / FOLDER))) - before

    shared = {"source": source, "artifact": candidate, "exact": exact}
    components = [
        Part(name=name, gain_db=gain(store.result(swap, part=name, **shared)))
        for name in candidate.manifest.components
    ]
    blocks, note = list[Part](), ""
    try:
        how = _made_from(candidate, source, store)
        changed = _not_as_exported(candidate, shared | how, store)
    except Missing:
        note = "blocks were not put back: the store lacks what the artifact was exported from"
    else:
        if changed:
            note = f"blocks were not put back: exported again it differs in {', '.join(changed)}"
        for block in [] if changed else blocks_of(how["plan"]):
            entry = store.result(swap, part=block, **shared, **how)
            blocks.append(Part(name=block, gain_db=gain(entry), layers=_worst(candidate, block)))
    errors = [latent_curve(a, b) for a, b in zip(reference.clips, own.clips, strict=True)]
    return Bisection(
        n_clips=len(own.clips),
        psnr_db=before,
        components=tuple(sorted(components, key=lambda part: -part.gain_db)),
        blocks=tuple(sorted(blocks, key=lambda part: -part.gain_db)),
        latent_error=tuple(map(float, np.mean(errors, axis=0))),
        note=note,
    )


def _made_from(candidate: Artifact, source: Source, store: Store) -> dict[str, Any]:
    """Plan, rounded weights and ranges of an artifact; Missing if the store lacks any."""
    peek, machine = store.peek(), Machine()
    recipe = Recipe.from_manifest(candidate.manifest.recipe)
    plan = plan_of(recipe, source, peek, machine)
    rounded = rounded_of(recipe, plan, source, peek, machine)
    ranges = dict(ranges_of(recipe, plan, source, peek, machine))
    return {"plan": plan, "rounded": rounded, "ranges": ranges}


def _not_as_exported(candidate: Artifact, how: Mapping[str, Any], store: Store) -> list[str]:
    """Files of the transformers that are not what its weights give when they are exported again.

    Then a block that is put back would mend what is wrong elsewhere, too.
    """
    found, had = list[str](), {record.path: record.sha256 for record in candidate.manifest.files}
    for component in dict.fromkeys(block.split("/")[0] for block in blocks_of(how["plan"])):
        entry = store.result(swap, part=f"{component}/nothing", **how)
        again = Artifact.open(entry.folder / FOLDER).manifest.files
        found += [
            record.path
            for record in again
            if record.path.startswith(f"{component}/") and had.get(record.path) != record.sha256
        ]
    return found


def _psnr(reference: ClipSet, other: ClipSet) -> float:
    pairs = zip(reference.clips, other.clips, strict=True)
    return float(np.mean([psnr(a.frames, b.frames) for a, b in pairs]))


def _worst(candidate: Artifact, block: str) -> tuple[str, ...]:
    """The layers of a block with the largest errors of their outputs, with these in dB."""
    layers = [
        (layer.error, layer.name)
        for layer in candidate.manifest.layers
        if layer.error and layer.name.startswith(f"{block}.")
    ]
    return tuple(
        f"{name.removeprefix(block + '.')} {10 * np.log10(error):.1f} dB"
        for error, name in sorted(layers, reverse=True)[:_SHOWN]
    )
