"""Decode: frames of clean latents, one latent frame after the other, whole or tile by tile.

Every tile keeps the caches of its convolutions, so frames come out in order and memory does not
grow with the clip. All tiles have one size: they are spread evenly over the frame, and what two of
them show is blended. C T H W: channels, frames, height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from hbxt_compress.manifest import Bucket
from hbxt_compress.runtime.session import Session
from hbxt_compress.tile import Tile

__all__ = ["decode", "ramps", "starts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a tile lies, in latents, and what its pixels count for, float32 H W."""

    latents: tuple[slice, slice]
    pixels: tuple[slice, slice]
    share: np.ndarray


def decode(
    latents: np.ndarray, bucket: Bucket, graph: Callable[[str], Session], *, tiled: bool = False
) -> Iterator[np.ndarray]:
    """Frames float32 H W 3 in -1..1 of what a VAE decodes, float32 C T H W.

    graph: opens one of the decoder's graphs by its file name. tiled: in the bucket's tiles, which
    must be there.
    """
    clip, tile = bucket.geometry, bucket.tile if tiled else None
    factor = clip.height // latents.shape[2]
    places = _places((latents.shape[2], latents.shape[3]), factor, tile)
    caches: list[dict[str, np.ndarray]] = [{} for _ in places]
    steps = tile or bucket
    for t in range(latents.shape[1]):
        session = graph(steps.next if t else steps.first)
        frames: np.ndarray | None = None
        for i, place in enumerate(places):
            part = np.ascontiguousarray(latents[None, :, t : t + 1, *place.latents])
            size = (factor * part.shape[3], factor * part.shape[4])
            result = session.run({"latent_sample": part, **caches[i]}, sample=(1, 3, None, *size))
            sample = result.pop("sample")[0]
            caches[i] = {
                name.replace("cache_out_", "cache_in_"): one for name, one in result.items()
            }
            if frames is None:
                shape = (*sample.shape[:2], clip.height, clip.width)
                frames = np.zeros(shape, dtype=np.float32)
            frames[..., *place.pixels] += sample * place.share
        assert frames is not None
        yield from frames.transpose(1, 2, 3, 0)


def starts(whole: int, side: int, overlap: int) -> list[int]:
    """Where tiles of one side begin: the fewest that share at least overlap, spread evenly."""
    if side >= whole:
        return [0]
    n_steps = -(-(whole - side) // (side - overlap))
    return [i * (whole - side) // n_steps for i in range(n_steps + 1)]


def ramps(begins: list[int], side: int) -> list[np.ndarray]:
    """What each tile's pixels count for along one side, float32; at each place the sum is 1.

    A tile's share rises linearly in the middle half of what it has in common with the one before,
    whose share falls: what is next to a tile's edge was decoded with the least around it.
    """
    whole = begins[-1] + side
    shares = np.zeros((len(begins), whole), dtype=np.float32)
    shares[0, :side] = 1
    for i, begin in enumerate(begins[1:], start=1):
        shared = begins[i - 1] + side - begin
        margin = shared // 4
        steps = np.arange(whole, dtype=np.float32) + 0.5 - (begin + margin)
        rise = np.clip(steps / max(0.5, shared - 2 * margin), 0, 1)  # a step where none is shared
        shares[:i] *= 1 - rise
        shares[i, begin : begin + side] = rise[begin : begin + side]
    return [share[begin : begin + side] for share, begin in zip(shares, begins, strict=True)]


def _places(size: tuple[int, int], factor: int, tile: Tile | None) -> list[_Place]:
    """Row by row; a single one if frames are decoded whole."""
    sides = size if tile is None else (tile.height // factor, tile.width // factor)
    overlap = 0 if tile is None else tile.overlap // factor
    rows, columns = (starts(n, side, overlap) for n, side in zip(size, sides, strict=True))
    down, across = (
        ramps([factor * n for n in begins], factor * side)
        for begins, side in zip((rows, columns), sides, strict=True)
    )
    return [
        _Place(
            latents=(slice(y, y + sides[0]), slice(x, x + sides[1])),
            pixels=(
                slice(factor * y, factor * (y + sides[0])),
                slice(factor * x, factor * (x + sides[1])),
            ),
            share=share_y[:, None] * share_x,
        )
        for y, share_y in zip(rows, down, strict=True)
        for x, share_x in zip(columns, across, strict=True)
    ]
