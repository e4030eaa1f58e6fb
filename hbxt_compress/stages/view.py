"""View: what a light decoder learns from: latents, and the frames that they should become.

Real clips, if the model has any, are encoded, and are themselves the frames; of latents that the
model made the frames are those of its full decoder. A killed run goes on with the next file.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hbxt_compress.errors import CalibrationError
from hbxt_compress.geometry import Geometry
from hbxt_compress.lessons import Lessons
from hbxt_compress.machine import Machine
from hbxt_compress.models import Family, family_of
from hbxt_compress.reference import shapes
from hbxt_compress.source import BUILTIN, Source
from hbxt_compress.store import Entry, Work
from hbxt_compress.views import View

__all__ = ["AT_ONCE", "FACTS", "VERSION", "n_real_clips", "view"]

VERSION = 1
FACTS = ("torch", "diffusers")
AT_ONCE = 16
log = logging.getLogger(__name__)


def n_real_clips(source: Source, wanted: int) -> int:
    """How many real clips there are to learn from: the built-in model's are drawn, others none."""
    if source.model == BUILTIN:
        return wanted
    log.info("view: no real clips are known of %s: only generated latents teach", source.model)
    return 0


def view(
    work: Work, source: Source, lessons: Entry, n_real: int, features: bool, on: Machine
) -> None:
    """Writes `real-NNNNN.safetensors` and `made-NNNNN.safetensors`, each a View of up to 16 clips.

    lessons: their last states are the latents that the model made. n_real: drawn clips. features:
    keep what the decoder's low-resolution blocks give.

    Raises:
        CalibrationError: latents or frames that are not finite.
    """
    family, taught = family_of(source), Lessons(lessons.folder)
    size, device = family.geometry(source), torch.device(on.device)
    loaded = cache(lambda: family.load(source, "vae").to(device))
    chunks = [("real", rows) for rows in _chunks(n_real)]
    chunks += [("made", rows) for rows in _chunks(len(taught))]
    work.expect(len(chunks))
    for i, (kind, rows) in enumerate(chunks):
        if not work.ranks.owns(i):
            continue
        log.info("view: %d clips", len(rows), extra={"progress": (i, len(chunks), "view")})

        def make(path: Path, kind: str = kind, rows: range = rows) -> None:
            if kind == "real":
                found = _real(family, source, loaded(), rows, size)
            else:
                last = [len(taught.levels_K) - 1] * len(rows)
                found = _made(family, source, loaded(), taught.states(rows, last), features)
            if not bool(torch.isfinite(found.latents_NCTHW).all()):
                raise CalibrationError(f"view: latents of clips {rows[0]}.. are not finite")
            found.save(path)

        work.piece(f"{kind}-{rows[0] // AT_ONCE:05d}.safetensors", make)
    work.ranks.barrier()
    log.info("view: done", extra={"progress": (len(chunks), len(chunks), "view")})


def _chunks(n: int) -> list[range]:
    return [range(start, min(n, start + AT_ONCE)) for start in range(0, n, AT_ONCE)]


@torch.no_grad()
def _real(
    family: Family, source: Source, vae: nn.Module, rows: Sequence[int], size: Geometry
) -> View:
    drawn = np.stack([shapes.draw(shapes.scene("train", row)) for row in rows])
    if drawn.shape[1:] != (size.n_frames, size.height, size.width, 3):
        raise CalibrationError(f"view: drawn clips are {drawn.shape[1:]}, the model's are {size}")
    levels = torch.from_numpy(np.rint(drawn * 255).astype(np.uint8)).permute(0, 4, 1, 2, 3)
    frames = torch.from_numpy(drawn).permute(0, 4, 1, 2, 3).contiguous() * 2 - 1
    latents = family.encode(source, vae, frames.to(_device(vae)))
    return View(latents_NCTHW=_raw(family, source, latents.cpu()), frames_N3THW=levels)


@torch.no_grad()
def _made(family: Family, source: Source, vae: nn.Module, latents: Tensor, features: bool) -> View:
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    decoder = vae.get_submodule("decoder")
    blocks = [decoder.get_submodule("mid_block"), decoder.get_submodule("up_blocks.0")]
    hooks = [
        block.register_forward_hook(lambda _, __, out, i=i: seen[i].append(out.bfloat16().cpu()))
        for i, block in enumerate(blocks if features else [])
    ]
    try:
        frames = family.decode(source, vae, latents.to(_device(vae))).float().cpu()
    finally:
        for hook in hooks:
            hook.remove()
    if not bool(torch.isfinite(frames).all()):
        raise CalibrationError("view: the full decoder's frames are not finite")
    return View(
        latents_NCTHW=_raw(family, source, latents),
        frames_N3THW=((frames + 1) * 127.5).round().clamp(0, 255).to(torch.uint8),
        features=[torch.cat(parts, dim=2) for parts in seen.values() if parts],
    )


def _raw(family: Family, source: Source, latents: Tensor) -> Tensor:
    """A sampler's latents in the VAE's own units."""
    mean, std = (torch.tensor(s).view(1, -1, 1, 1, 1) for s in family.latent_statistics(source))
    return latents.float() * std + mean


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
