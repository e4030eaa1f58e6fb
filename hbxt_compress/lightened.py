"""Lightened: a model folder with a `decoder/` of its own, made, or as it will be."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from hbxt_compress.algorithms import AnyDecoder
from hbxt_compress.errors import PlanError
from hbxt_compress.models import family_of
from hbxt_compress.models.light_decoder import LightDecoder
from hbxt_compress.source import Source, locate

__all__ = ["FOLDER", "as_if_lightened", "new_decoder", "write_decoder"]

FOLDER: Final = "decoder"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_SEED = 0


def new_decoder(source: Source, how: AnyDecoder) -> LightDecoder:
    """An untrained decoder of a model's latents, always the same; ValueError if there is none."""
    family = family_of(source)
    clip = family.geometry(source)
    z_dim, n_latents, height, _ = family.latent_shape(source, clip)
    in_time = (clip.n_frames - 1) // (n_latents - 1) if n_latents > 1 else 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return LightDecoder(**how.sizes(z_dim, in_time, clip.height // height))


def write_decoder(folder: Path, decoder: LightDecoder, weights: Mapping[str, Tensor]) -> None:
    """Writes config.json and one safetensors file, float32, into a new folder."""
    folder.mkdir()
    config = json.dumps(dict(decoder.config), indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")
    tensors = {name: one.detach().float().cpu().contiguous() for name, one in weights.items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})


@contextmanager
def as_if_lightened(source: Source, how: AnyDecoder | None) -> Iterator[Source]:
    """Meanwhile the model with a decoder that has not learnt anything: of the right sizes.

    The folder holds links to the model's files; without `how` it is the model itself.

    Raises:
        PlanError: no such decoder suits this model.
    """
    if how is None:
        yield source
        return
    try:
        decoder = new_decoder(source, how)
    except ValueError as error:
        raise PlanError(f"{source.folder}: {error}") from None
    with tempfile.TemporaryDirectory(prefix="hbxt-") as name:
        folder = Path(name)
        for file in source.files:
            if not file.startswith(f"{FOLDER}/"):
                link = folder / file
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to((source.folder / file).resolve())
        write_decoder(folder / FOLDER, decoder, decoder.state_dict())
        yield replace(locate(name, hashed=False), model=source.model)
