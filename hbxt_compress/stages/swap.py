"""Swap: an artifact with one part in full precision again, to see what that part does to clips.

A part is a component, whose folder is taken from the full-precision artifact, or a transformer
block, which is exported as it was before anything was rounded, the others as they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hbxt_compress.artifact import MANIFEST, Artifact, record_files, write_manifest
from hbxt_compress.models import family_of
from hbxt_compress.plan import KEEP, LayerPlan, Plan
from hbxt_compress.quantized import QuantizedModel
from hbxt_compress.source import Source
from hbxt_compress.stages.export import write_component
from hbxt_compress.store import Entry, Work

__all__ = ["FACTS", "FOLDER", "VERSION", "blocks_of", "swap"]

VERSION = 1
FACTS = ("torch", "onnx", "onnxscript", "onnx_ir", "diffusers", "transformers")
FOLDER = "artifact"


def swap(
    work: Work, part: str, source: Source, artifact: Artifact, exact: Artifact,
    plan: Plan | None = None, rounded: Entry | None = None,
    ranges: Mapping[str, Entry] | None = None,
) -> None:  # fmt: skip
    """Writes an artifact of one clip size in `artifact/`. exact: the model in full precision.

    part: `vae_decoder`, or a block such as `transformer/blocks.3`, of which plan, rounded and
    ranges say how the others were exported; of one that there is not, all of them.
    """

    def make(path: Path) -> None:
        component = part.split("/")[0]
        for name in sorted(p.name for p in artifact.folder.iterdir() if p.is_dir()):
            taken = exact if name == part else artifact
            if part == component or name != component:
                shutil.copytree(taken.folder / name, path / name, copy_function=shutil.copyfile)
        for file in artifact.folder.iterdir():
            if file.is_file() and file.name != MANIFEST:
                shutil.copyfile(file, path / file.name)
        if part != component:
            assert plan is not None
            assert rounded is not None  # else nothing of it could be put back
            whole, kept = _without(part, plan, QuantizedModel.open(rounded.folder))
            write_component(
                family_of(source), source, component, whole, kept, path / component,
                clips=(artifact.manifest.geometry,), ranges=ranges or {},
            )  # fmt: skip
        manifest = replace(
            artifact.manifest, buckets=exact.manifest.buckets, files=record_files(path)
        )
        write_manifest(path, manifest)

    if work.ranks.leads:
        work.piece(FOLDER, make)
    work.ranks.barrier()


def blocks_of(plan: Plan) -> list[str]:
    """The transformer blocks of which a plan quantizes something, in order."""
    found = dict[str, None]()
    for layer in plan.quantized:
        if layer.spec.component.startswith("transformer") and layer.spec.block is not None:
            found[_block(layer)] = None
    return list(found)


def _block(layer: LayerPlan) -> str:
    """`transformer/blocks.3` of `transformer/blocks.3.attn1.to_q`."""
    return ".".join(layer.spec.name.split(".")[:2])


def _without(part: str, plan: Plan, model: QuantizedModel) -> tuple[Plan, QuantizedModel]:
    """The plan with a block in 16 bit, and the weights and tuned parameters of all others."""
    layers = tuple(
        replace(layer, weights=KEEP, activations="keep", how=None, reason="swapped back")
        if layer.quantized and _block(layer) == part
        else layer
        for layer in plan.layers
    )
    inside = f"{part}."
    return replace(plan, layers=layers), QuantizedModel(
        weights={n: w for n, w in model.weights.items() if not n.startswith(inside)},
        floats={n: t for n, t in model.floats.items() if not n.startswith(inside)},
    )
