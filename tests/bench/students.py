"""Students beside their teacher: what they follow, how far their clips are from its, and how fast.

    python tests/bench/students.py [--n 256] [--recipes w4a16-4step w4a16-dmd] [--steps 3 8]

The teacher is the built-in model's fp16 artifact in all of its steps; once more with other seeds it
is what two sets of clips of one model differ by. Of each recipe there is its student in fp16, too,
and of the first recipe's distillers such students with other numbers of steps. All clips are made
by the runtime; prompts are captions that neither the model nor a student was trained on. Writes
students.json and students.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markdown_table import markdown_table

from hbxt_compress.algorithms.noise_levels import USUAL
from hbxt_compress.artifact import Artifact
from hbxt_compress.clips import Clip, ClipSet
from hbxt_compress.machine import Machine
from hbxt_compress.metrics.extractor import Extractor
from hbxt_compress.metrics.frechet import frechet_distance
from hbxt_compress.metrics.judge import agreement, expected, judge
from hbxt_compress.pipeline import compress
from hbxt_compress.prompts import seed_of
from hbxt_compress.recipe import Recipe, load_recipe
from hbxt_compress.reference import shapes
from hbxt_compress.runtime.generate import Runtime
from hbxt_compress.source import BUILTIN
from hbxt_compress.stages.sample import sample
from hbxt_compress.store import Store

_LEVELS = {3: (1.0, 0.9375, 0.8333), 8: USUAL}
_SEEDS = {"reference": 70, "other": 71}
_TIMED = 15  # clips a model, in turn
_THREADS = (1, 2)
_WORDS = ("colour", "shape", "motion")

Row = dict[str, Any]


def main(recipes: Sequence[str], steps: Sequence[int], n: int, store: Store, out: Path) -> None:
    prompts = [shapes.caption(shapes.scene("evaluation", i)) for i in range(n)]
    asked = [load_recipe(name) for name in recipes]
    full = load_recipe("fp16")
    models: list[tuple[str, Recipe]] = [(full.name, full)]
    models += [(f"{k} steps, fp16", _in_fp16(asked[0], full, k)) for k in steps]
    for one in asked:
        models += [(f"{one.name} in fp16", _in_fp16(one, full, 4)), (one.name, one)]
    found = {
        name: Artifact.open(compress(one, BUILTIN, store, machine=Machine()))
        for name, one in models
    }
    eye, rows = Extractor(), list[Row]()
    reference = _seen(_clips(found[full.name], prompts, "reference", store), eye)
    others = _seen(_clips(found[full.name], prompts, "other", store), eye)
    rows.append(_row(f"{full.name}, other seeds", found[full.name], reference, others))
    for name, artifact in found.items():
        if name != full.name:
            seen = _seen(_clips(artifact, prompts, "other", store), eye)
            rows.append(_row(name, artifact, reference, seen))
    for threads in _THREADS:
        took = _seconds(list(found.values()), prompts, threads)
        for row, seconds in zip(rows, took, strict=True):
            row |= {f"seconds_{threads}": seconds, f"faster_{threads}": took[0] / seconds}
    out.mkdir(parents=True, exist_ok=True)
    (out / "students.json").write_text(json.dumps({"n": n, "rows": rows}, indent=1) + "\n")
    table = _table(rows)
    (out / "students.md").write_text(table)
    sys.stdout.write(f"{table}\n{n} clips a row\n")


def _in_fp16(recipe: Recipe, full: Recipe, n_steps: int) -> Recipe:
    """What distils as a recipe does, to so many steps, and quantizes nothing."""
    levels = {} if n_steps == 4 else {"noise_levels": _LEVELS[n_steps]}
    how = [one.model_copy(update=levels) for one in recipe.distill]
    return full.model_copy(update={"distill": tuple(how), "name": f"steps-{n_steps}"})


def _clips(artifact: Artifact, prompts: Sequence[str], seeds: str, store: Store) -> list[Clip]:
    items = [(prompt, seed_of(_SEEDS[seeds], f"{i}:{prompt}")) for i, prompt in enumerate(prompts)]
    made = store.result(sample, artifact=artifact, items=items, n_steps=None, on=Machine())
    return list(ClipSet.load(made.folder).clips)


def _seen(clips: Sequence[Clip], eye: Extractor) -> Row:
    content, temporal = eye.features(clips)
    judged = [
        agreement(judge(clip.frames), wanted)
        for clip in clips
        if (wanted := expected(clip.prompt)) is not None
    ]
    moved = [np.abs(np.diff(clip.frames.astype(np.float32), axis=0)).mean() for clip in clips]
    words = {key: statistics.fmean(one[key] for one in judged) for key in judged[0]}
    return {"content": content, "temporal": temporal, "words": words, "moved": np.mean(moved)}


def _row(name: str, artifact: Artifact, reference: Mapping[str, Any], seen: Row) -> Row:
    sampler = artifact.manifest.sampler
    forwards = sampler.n_steps * (1 if sampler.guidance == 1 else 2)
    return {
        "model": name,
        "forwards": forwards,
        **seen["words"],
        "fd_content": frechet_distance(reference["content"], seen["content"]),
        "fd_temporal": frechet_distance(reference["temporal"], seen["temporal"]),
        "energy": float(seen["moved"] / reference["moved"]),
        "megabytes": sum(one["after"] for one in artifact.manifest.components.values()) / 1e6,
    }


def _seconds(artifacts: Sequence[Artifact], prompts: Sequence[str], threads: int) -> list[float]:
    """Medians of a clip's time, the artifacts in turn, with their graphs kept open."""
    runtimes = [
        Runtime.open(one.folder, provider="cpu", keep=True, n_threads=threads) for one in artifacts
    ]
    times: list[list[float]] = [[] for _ in runtimes]
    for prompt in prompts[: _TIMED + 1]:
        for runtime, own in zip(runtimes, times, strict=True):
            began = time.perf_counter()
            runtime.generate(prompt, check=False)
            own.append(time.perf_counter() - began)
    return [statistics.median(own[1:]) for own in times]  # the first opens sessions


def _table(rows: Sequence[Row]) -> str:
    heads = ("model", "forwards", "colour", "shape", "motion", "fd_content",
             "fd_temporal", "motion energy", "MB", "1 thread: ms a clip (times faster)",
             "2 threads")  # fmt: skip
    lines = [
        (
            row["model"], str(row["forwards"]), *(f"{100 * row[k]:.1f}" for k in _WORDS),
            f"{row['fd_content']:.2f}", f"{row['fd_temporal']:.2f}", f"{row['energy']:.2f}",
            f"{row['megabytes']:.1f}",
            *(f"{1e3 * row[f'seconds_{k}']:.0f} ({row[f'faster_{k}']:.1f})" for k in _THREADS),
        )
        for row in rows
    ]  # fmt: skip
    return "\n".join(markdown_table(heads, lines, n_words=1)) + "\n"


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--n", type=int, default=256)
    arguments.add_argument("--recipes", nargs="+", default=["w4a16-4step", "w4a16-dmd"])
    arguments.add_argument("--steps", nargs="*", type=int, choices=sorted(_LEVELS), default=[3, 8])
    arguments.add_argument("--store", type=Path, default=Path(".hbxt"))
    arguments.add_argument("--out", type=Path, default=Path("build/bench"))
    given = arguments.parse_args()
    main(given.recipes, given.steps, given.n, Store(given.store), given.out)
