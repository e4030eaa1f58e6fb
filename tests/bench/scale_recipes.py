"""The recipes of the scale bench: those of the library, a calibrated one on clips under noise.

A model of five billion parameters cannot be sampled on a CPU: `w4a16` is shown clips of drawn
scenes instead, so small that some seventeen thousand tokens pass each layer. Nothing is refined: of
models above a billion parameters that is left out, and sizes are compared.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from hbxt_compress import library
from hbxt_compress.clips import write_mp4
from hbxt_compress.reference.shapes import caption, draw, scene

__all__ = ["on_clips"]

_N_CLIPS, _HELD_OUT = 9, 2
_TOKENS_A_SIDE = 8
_FPS = 8
_SET = """\
name: bench-clips
summary: drawn scenes under noise, 320 tokens a state
seed: 20
n_steps: 20
observe: [2, 9, 16]
held_out: {held_out}
clips: {{folder: clips, height: {side}, width: {side}, n_frames: 17, fps: {fps}}}
"""


def on_clips(name: str, folder: Path, checkpoint: Path) -> Path:
    """A copy of a library recipe that is calibrated on clips for a checkpoint; all in `folder`."""
    vae = json.loads((checkpoint / "vae" / "config.json").read_text(encoding="utf-8"))
    side = _TOKENS_A_SIDE * 2 * vae.get("scale_factor_spatial", 8)
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    rows = ["file_name,caption"]
    for i in range(_N_CLIPS):
        what = scene("calibration", i)
        frames = np.rint(draw(what) * 255).astype(np.uint8)
        write_mp4(folder / "clips" / f"{i:03d}.mp4", frames, _FPS)
        rows.append(f"{i:03d}.mp4,{caption(what)}")
    (folder / "clips" / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    shown = folder / "clips.yaml"
    shown.write_text(_SET.format(held_out=_HELD_OUT, fps=_FPS, side=side), encoding="utf-8")
    text = library.find("recipes", name).read_text(encoding="utf-8")
    text = re.sub(r"(?m)^name: .*$", f"name: {name}-clips", text, count=1)
    text = re.sub(r"(?m)^calibration: .*$", f"calibration: {shown.resolve()}", text, count=1)
    text = re.sub(r"(?m)^refine:\n(?:  .*\n)+", "", text, count=1)
    copy = folder / f"{name}-clips.yaml"
    copy.write_text(text, encoding="utf-8")
    return copy
