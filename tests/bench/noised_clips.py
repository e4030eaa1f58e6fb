"""What a model loses by being calibrated on clips under noise instead of its own trajectories.

    python tests/bench/noised_clips.py [--out build/bench] [--also my-clips.yaml ...]

Recipe w4a16-fast with `round: {use: gptq}` on the built-in model, calibrated on the trajectories of
calibration/standard.yaml, on noised clips of the very scenes that its captions describe, in the
model's size and in a smaller one, and on any other set that is named. Judged as the bench judges:
velocity SQNR on held-out prompts' trajectories. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np
from calibration_inputs import HELD_OUT, make_inputs
from judge import VelocityJudge
from own import graph_velocity

from hbxt_compress import pipeline
from hbxt_compress.algorithms.gptq import Gptq
from hbxt_compress.clips import write_mp4
from hbxt_compress.machine import Machine
from hbxt_compress.prompts import load_prompts
from hbxt_compress.recipe import load_recipe
from hbxt_compress.reference.shapes import caption, draw, scene
from hbxt_compress.source import BUILTIN
from hbxt_compress.store import Store

_OWN = "standard"
_SIZES = ((64, 17), (32, 9))  # pixels of a side, frames
_FPS = 8
_HEAD = ("calibrated on", "tokens a state", "velocity SQNR (dB)", "guided (dB)", "seconds")


def write_scenes(folder: Path) -> None:
    """A clip of each scene that the prompts of the set `standard` describe, with metadata.csv."""
    prompts = load_prompts(_OWN).prompts
    folder.mkdir(parents=True, exist_ok=True)
    waiting = dict.fromkeys(prompts)
    for index in count():
        if not waiting:
            break
        what = scene("calibration", index)
        if caption(what) in waiting:
            del waiting[caption(what)]
            path = folder / f"{prompts.index(caption(what)):03d}.mp4"
            write_mp4(path, np.rint(draw(what) * 255).astype(np.uint8), _FPS)
    rows = "".join(f"{i:03d}.mp4,{text}\n" for i, text in enumerate(prompts))
    (folder / "metadata.csv").write_text(f"file_name,caption\n{rows}", encoding="utf-8")


def write_set(path: Path, size: int, n_frames: int) -> Path:
    """The set `standard` with clips in place of its prompts."""
    own = load_prompts(_OWN).model_dump(mode="json", exclude={"prompts", "rows", "clips"})
    clips = {"folder": "scenes", "height": size, "width": size, "n_frames": n_frames}
    path.write_text(json.dumps({**own, "name": path.stem, "clips": clips}), encoding="utf-8")
    return path


def rows(out: Path, calibrations: Sequence[str]) -> list[tuple[str, ...]]:
    """A row of the table for each calibration set."""
    make_inputs(out / "inputs")
    judge, store = VelocityJudge(out / "inputs" / HELD_OUT), Store(out / "noised-clips" / "store")
    recipe = load_recipe("w4a16-fast").model_copy(update={"round": Gptq()})
    found = []
    for calibration in calibrations:
        one, began = recipe.model_copy(update={"calibration": calibration}), time.perf_counter()
        planned = pipeline.plan(one, BUILTIN, store, machine=Machine())
        folder = pipeline.compress(one, BUILTIN, store, machine=Machine())
        seconds = time.perf_counter() - began
        assert planned.shown is not None
        sqnr = judge.compare(graph_velocity(folder, judge.calls))
        numbers = (f"{sqnr[f'{kind}velocity_sqnr_db']:.2f}" for kind in ("", "guided_"))
        told = f"{planned.shown.name}: {planned.shown.text.partition(':')[0]}"
        found.append((told, str(planned.shown.n_tokens), *numbers, f"{seconds:.0f}"))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--also", nargs="*", default=[], help="paths of more calibration sets")
    given = parser.parse_args()
    folder = given.out / "noised-clips"
    write_scenes(folder / "scenes")
    sets = [str(write_set(folder / f"scenes-{s}x{s}x{n}.yaml", s, n)) for s, n in _SIZES]
    for row in (_HEAD, ["---"] * len(_HEAD), *rows(given.out, [_OWN, *sets, *given.also])):
        print("| " + " | ".join(row) + " |")  # noqa: T201
