"""Quantize: round every planned weight; one file a block, so that a kill loses at most one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from safetensors import safe_open

from hbxt_compress.algorithms import AnyRounder
from hbxt_compress.errors import SourceError, listing
from hbxt_compress.formats import FORMATS
from hbxt_compress.layers import LayerName
from hbxt_compress.machine import Machine
from hbxt_compress.models import family_of
from hbxt_compress.plan import LayerPlan
from hbxt_compress.quantized import QuantizedWeight, save_block
from hbxt_compress.source import Source
from hbxt_compress.stats import CalibrationStats
from hbxt_compress.store import Entry, Work

__all__ = ["FACTS", "VERSION", "quantize"]

VERSION = 1
FACTS = ("torch",)
log = logging.getLogger(__name__)


def quantize(
    work: Work,
    source: Source,
    layers: Sequence[LayerPlan],
    stats: Entry,
    how: AnyRounder | None,
    on: Machine,
) -> None:
    """Writes `<component>.<block>.safetensors` for every block with quantized layers."""
    gathered = CalibrationStats.load(sorted(stats.folder.glob("*.safetensors")))
    family = family_of(source)
    blocks = [
        (
            f"{component}.{'rest' if block is None else format(block, '03d')}.safetensors",
            list(members),
        )
        for (component, block), members in groupby(
            layers, key=lambda p: (p.spec.component, p.spec.block)
        )
    ]
    for i, (name, members) in enumerate(blocks):
        log.info("quantize: %s", name, extra={"progress": (i, len(blocks), "quantize")})

        def make(path: Path, members: list[LayerPlan] = members) -> None:
            save_block(
                path,
                _round(
                    source,
                    family.weight_files(source, members[0].spec.component),
                    members,
                    gathered,
                    how,
                ),
            )

        work.piece(name, make)
    log.info("quantize: done", extra={"progress": (len(blocks), len(blocks), "quantize")})


def _round(
    source: Source,
    files: dict[str, Path],
    members: Sequence[LayerPlan],
    stats: CalibrationStats,
    how: AnyRounder | None,
) -> dict[LayerName, QuantizedWeight]:
    done: dict[LayerName, QuantizedWeight] = {}
    broken = []
    for member in members:
        spec = member.spec
        with safe_open(files[spec.parameter], framework="pt") as file:
            weight = file.get_tensor(spec.parameter).to(torch.float32)
        if not bool(torch.isfinite(weight).all()):
            broken.append(f"{spec.name} {list(spec.shape)} in {files[spec.parameter].name}")
            continue
        assert how is not None  # the recipe refuses quantized formats without a rounder
        done[spec.name] = how.round(weight, stats.layers[spec.name], FORMATS[member.weights])
    if broken:
        raise SourceError(f"{source.folder}: weights with NaN or infinity:\n{listing(broken)}")
    return done
