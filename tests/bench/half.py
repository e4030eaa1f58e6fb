"""What float16 costs: clips of the built-in model, its products rounded as a GPU does, and not.

ONNX Runtime's CPU provider computes float16 graphs in float32, so the clips that `hbxt evaluate`
measures hold nothing of this error. Usage: python tests/bench/half.py [RECIPE ...]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

sys.path.insert(0, str(Path(__file__).parents[2]))

from hbxt_compress.artifact import Artifact, record_files, write_manifest
from hbxt_compress.machine import Machine
from hbxt_compress.pipeline import compress
from hbxt_compress.recipe import load_recipe
from hbxt_compress.runtime.generate import Runtime
from hbxt_compress.store import Store
from tests.half_rounding import round_to_half

_PROMPTS = (
    "a red circle moving right on a black background",
    "a green square moving up on a white background",
    "a blue triangle moving left on a gray background",
    "a yellow circle moving down on a black background",
)


class _Literal(ort.SessionOptions):  # type: ignore[misc]
    """Options of sessions that take no node out."""

    def __init__(self) -> None:
        super().__init__()
        self.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL


def main(recipes: list[str]) -> None:
    ort.SessionOptions = _Literal
    with tempfile.TemporaryDirectory() as place:
        store = Store(Path(place) / "store")
        for name in recipes or ["fp16", "w4a16-fast"]:
            folder = compress(load_recipe(name), "builtin/tiny-wan", store, machine=Machine())
            rounded = Path(shutil.copytree(folder, Path(place) / name))
            n = sum(round_to_half(rounded / file) for file in _graphs(rounded))
            manifest = Artifact.open(folder).manifest
            write_manifest(rounded, replace(manifest, files=record_files(rounded)))
            frames = [_frames(one) for one in (folder, rounded)]
            error = float(((frames[0] - frames[1]) ** 2).mean())
            sys.stdout.write(
                f"{name}: {n} products and attentions rounded to float16, "
                f"{10 * np.log10(255**2 / error):.1f} dB from the same graphs in float32, "
                f"{len(_PROMPTS)} clips\n"
            )


def _graphs(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.glob("*/*.onnx"))


def _frames(folder: Path) -> np.ndarray:
    with Runtime.open(folder, keep=True) as runtime:
        clips = [runtime.generate(text, seed=i) for i, text in enumerate(_PROMPTS)]
    return np.stack([clip.frames for clip in clips]).astype(np.float64)


if __name__ == "__main__":
    main(sys.argv[1:])
