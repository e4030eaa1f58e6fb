"""Clips as pictures for people: panels side by side for video, sheets of frames for the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from hbxt_compress.clips import Clip

__all__ = ["DIFFERENCE_GAIN", "Sheet", "sheet", "side_by_side"]

DIFFERENCE_GAIN = 4
_SMALL_PX = 128  # frames smaller than this are enlarged for video players
_MOST_SIDE_PX = 256
_MOST_FRAMES = 33


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """The frames of a clip in one WebP image, row by row, as a data URI."""

    uri: str
    n_columns: int
    n_frames: int
    height: int
    width: int
    lossless: bool


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
    frames = frames[np.linspace(0, len(frames) - 1, n_frames).round().astype(int)]
    height, width = frames.shape[1:3]
    shrink = max(1.0, max(height, width) / _MOST_SIDE_PX)
    height, width = max(1, round(height / shrink)), max(1, round(width / shrink))
    n_columns = int(np.ceil(np.sqrt(n_frames)))
    whole = Image.new("RGB", (n_columns * width, -(-n_frames // n_columns) * height))
    for i, frame in enumerate(frames):
        tile = Image.fromarray(frame)
        if shrink > 1:
            tile = tile.resize((width, height), Image.Resampling.LANCZOS)
        whole.paste(tile, ((i % n_columns) * width, (i // n_columns) * height))
    buffer = io.BytesIO()
    whole.save(buffer, format="WEBP", lossless=lossless, quality=80, method=4)
    return Sheet(
        uri="data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode(),
        n_columns=n_columns,
        n_frames=n_frames,
        height=height,
        width=width,
        lossless=lossless and shrink == 1,
    )
