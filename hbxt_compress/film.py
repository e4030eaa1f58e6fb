"""film: a clip from an artifact to a file; stopped midway it keeps the frames that are done."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from hbxt_compress.clips import write_mp4
from hbxt_compress.geometry import Geometry
from hbxt_compress.runtime.generate import Progress, Runtime
from hbxt_compress.stopping import Stopped, until_stopped

__all__ = ["film"]


def film(
    out: Path, opened: Callable[[], Runtime], prompt: str, *, seed: int, n_steps: int | None,
    guidance: float | None, progress: Progress,
) -> tuple[int, Geometry, list[str]]:  # fmt: skip
    """Writes an mp4 file; how many frames it has, its size, and the providers that ran the graphs.

    Raises:
        Stopped: by a signal; it says what the file holds. Before frames are decoded that is what it
            held before.
    """
    stops: list[Stopped] = []
    kept = "nothing was written"
    try:
        with opened() as runtime:
            size = runtime.bucket.geometry
            frames = runtime.stream(
                prompt, seed=seed, n_steps=n_steps, guidance=guidance, progress=progress
            )
            with closing(until_stopped(frames, stops)) as finished:
                n_frames = write_mp4(out, finished, size.fps)
            kept = f"{out} holds {n_frames} of {size.n_frames} frames"
            if stops:
                raise stops[0]
            return n_frames, size, sorted(set(runtime.providers.values()))
    except Stopped as stopped:
        stopped.add_note(kept)
        stopped.advice = "the same command starts over"
        raise
