"""Small videos with captions, and prompt sets that calibrate on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hbxt_compress.clips import write_mp4

CAPTIONS = ("a red square", "two lines", "a red square")  # clips may show the same


def write_clips(folder: Path, n: int = 3, *, n_frames: int = 9, rate_fps: float = 8.0) -> Path:
    """Clips of 48x32 pixels that differ, and metadata.csv with captions that need not."""
    folder.mkdir(parents=True)
    y, x = np.mgrid[0:32, 0:48]
    for i in range(n):
        frames = [
            np.stack([x * 4 + 20 * i, y * 6 + 10 * t, np.full_like(x, 40 * i)], axis=-1)
            for t in range(n_frames)
        ]
        write_mp4(folder / f"clip{i}.mp4", (f.astype(np.uint8) for f in frames), rate_fps)
    rows = "".join(f"clip{i}.mp4,{CAPTIONS[i % 3]}\n" for i in range(n))
    (folder / "metadata.csv").write_text(f"file_name,caption\n{rows}")
    return folder


def write_set(path: Path, clips: Mapping[str, object], **more: object) -> Path:
    """A prompt set of clips as YAML; JSON is YAML too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "name": "real", "summary": "s", "seed": 5, "n_steps": 3, "observe": [0, 2], "held_out": 1,
        "clips": {"folder": "clips", "height": 32, "width": 32, "n_frames": 5, **clips}, **more,
    }  # fmt: skip
    path.write_text(json.dumps(document))
    return path
