"""Footage: real videos as frames at a chosen rate. What the project makes itself is in `clips`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError

from hbxt_compress.errors import SourceError

__all__ = ["timed_frames", "video_seconds"]

_NOW_S = 1e-4  # time stamps are whole numbers of ticks, frame rates are not
# FFmpeg's own errors, no video stream, rates of 0 and time bases of none, sizes beyond memory
_UNREADABLE = (
    OSError,
    FFmpegError,
    IndexError,
    ArithmeticError,
    TypeError,
    ValueError,
    MemoryError,
)
_RATE_FPS = 25  # of a video that tells neither its rate nor its frames' times


def video_seconds(path: Path) -> float:
    """How long a file's first video stream lasts, from its packets alone; nothing is decoded."""
    times: list[float] = []
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            stream = container.streams.video[0]
            frame_s = 1 / float(stream.average_rate or _RATE_FPS)
            for packet in container.demux(stream):
                if packet.pts is not None:
                    times.append(float(packet.pts * packet.time_base))
    except _UNREADABLE as error:
        raise SourceError(f"{path}: not a readable video ({error})") from error
    return max(times) - min(times) + frame_s if times else 0.0


def timed_frames(
    path: Path, *, n_frames: int, fps: float, start_s: float = 0.0
) -> Iterator[np.ndarray]:
    """The frames, uint8 H W 3, on screen 0, 1, 2... n_frames - 1 times 1/fps s after start_s.

    Raises:
        SourceError: not a readable video, or one that ends earlier.
    """
    n_given = 0
    shown: av.VideoFrame | None = None
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            for at_s, frame in _timed(container):
                until = (at_s - start_s - _NOW_S) * fps
                while shown is not None and n_given < n_frames and n_given < until:
                    yield shown.to_ndarray(format="rgb24")
                    n_given += 1
                if n_given == n_frames:
                    return
                shown = frame
    except _UNREADABLE as error:
        raise SourceError(f"{path}: not a readable video ({error})") from error
    if n_given < n_frames:
        raise SourceError(
            f"{path}: from {start_s:.2f} s on it has {n_given} of the {n_frames} frames asked for "
            f"at {fps:g} a second"
        )


def _timed(
    container: av.container.InputContainer,
) -> Iterator[tuple[float, av.VideoFrame | None]]:
    """(seconds from the first frame, frame) of every frame; last, when it ends and None."""
    stream = container.streams.video[0]
    frame_s = 1 / float(stream.average_rate or _RATE_FPS)
    first_s = end_s = 0.0
    for i, frame in enumerate(container.decode(stream)):
        at_s = i * frame_s if frame.time is None else float(frame.time)
        first_s = first_s if i else at_s
        yield at_s - first_s, frame
        end_s = at_s - first_s + frame_s
    yield end_s, None
