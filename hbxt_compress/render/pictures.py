"""Clips as pictures for people: panels side by side for video, sheets of frames for the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from hbxt_compress.clips import Clip

__all__ = ["DIFFERENCE_GAIN", "Sheet", "poster", "sheet", "side_by_side"]

DIFFERENCE_GAIN = 4
_SMALL_PX = 128  # frames smaller than this are enlarged for video players
_MOST_SIDE_PX = 256
_MOST_FRAMES = 33


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """Frames of a clip in one WebP image, row by row, as a data URI. shown: which, from 0."""

    uri: str
    n_columns: int
    shown: tuple[int, ...]
    height: int
    width: int
    lossless: bool

    @property
    def n_frames(self) -> int:
        return len(self.shown)


def side_by_side(reference: Clip, candidate: Clip) -> Iterator[np.ndarray]:
    """Frames uint8 with reference, candidate and amplified difference in a row, even sizes."""
    for a, b in zip(reference.frames, candidate.frames, strict=True):
        apart = np.abs(a.astype(np.int16) - b) * DIFFERENCE_GAIN
        row = np.concatenate([a, b, np.minimum(apart, 255).astype(np.uint8)], axis=1)
        times = max(1, 2 * _SMALL_PX // a.shape[0]) if a.shape[0] < _SMALL_PX else 1
        row = row.repeat(times, axis=0).repeat(times, axis=1)
        yield np.pad(row, ((0, row.shape[0] % 2), (0, row.shape[1] % 2), (0, 0)), mode="edge")


def sheet(frames: np.ndarray, *, lossless: bool) -> Sheet:
    """A sheet of frames uint8 T H W 3; large clips are thinned out in time and made smaller."""
    n_frames = min(len(frames), _MOST_FRAMES)
    shown = np.linspace(0, len(frames) - 1, n_frames).round().astype(int)
    frames = frames[shown]
    height, width, shrink = _small(frames.shape[1], frames.shape[2])
    n_columns = int(np.ceil(np.sqrt(n_frames)))
    whole = Image.new("RGB", (n_columns * width, -(-n_frames // n_columns) * height))
    for i, frame in enumerate(frames):
        tile = _tile(frame, (width, height))
        whole.paste(tile, ((i % n_columns) * width, (i // n_columns) * height))
    return Sheet(
        uri=_uri(whole, lossless=lossless),
        n_columns=n_columns,
        shown=tuple(map(int, shown)),
        height=height,
        width=width,
        lossless=lossless and shrink == 1,
    )


def poster(reference: np.ndarray, candidate: np.ndarray) -> str:
    """Two frames uint8 H W 3 and their amplified difference in a row, a data URI."""
    apart = np.minimum(np.abs(reference.astype(np.int16) - candidate) * DIFFERENCE_GAIN, 255)
    height, width, _ = _small(*reference.shape[:2])
    row = Image.new("RGB", (3 * width, height))
    for i, frame in enumerate((reference, candidate, apart.astype(np.uint8))):
        row.paste(_tile(frame, (width, height)), (i * width, 0))
    return _uri(row, lossless=False)


def _small(height: int, width: int) -> tuple[int, int, float]:
    """Height and width for the page, and by how much they are smaller."""
    shrink = max(1.0, max(height, width) / _MOST_SIDE_PX)
    return max(1, round(height / shrink)), max(1, round(width / shrink)), shrink


def _tile(frame: np.ndarray, wide_high: tuple[int, int]) -> Image.Image:
    tile = Image.fromarray(frame)
    same = tile.size == wide_high
    return tile if same else tile.resize(wide_high, Image.Resampling.LANCZOS)


def _uri(image: Image.Image, *, lossless: bool) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=lossless, quality=80, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
