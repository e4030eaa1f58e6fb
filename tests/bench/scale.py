"""How a run's time and memory grow with the model, against what the machine could do at best.

    python tests/bench/scale.py [--sizes 0.3B 1.3B 5B] [--recipes w4a16-fast w4a16] [--add]

For each size a checkpoint of random weights in the published shapes is quantized by
`python -m hbxt_compress quantize` in a process of its own, from an empty store and with the
checkpoint out of the page cache. Writes scale.json, scale.md and scale.svg; a run that fails or is
killed becomes a row with `error`. The floor is the sum of what no run can leave out: reading and
hashing the checkpoint once, searching a scale for every quantized weight, the products of
calibration, hashing and writing the artifact once. Weights are random: nothing here is about
quality. Checkpoints are kept, stores and artifacts only with --keep, earlier rows with --add.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpoints import CHECKPOINTS, write_checkpoint
from machine_floor import MachineFloor, Work, measure_floor
from scale_pages import write_markdown, write_svg
from scale_recipes import on_clips
from watched import watch

from hbxt_compress.models.wan import Wan
from hbxt_compress.plan import FULL_PRECISION
from hbxt_compress.recipe import Recipe, load_recipe
from hbxt_compress.source import Source, locate

__all__ = ["Run", "least_work", "prediction"]

_PREDICTED = ("seconds", "peak_rss_bytes", "disk_bytes")
_DEFAULT_NORM = 2.0  # of a scale search whose rounder names none
log = logging.getLogger("bench")

Row = dict[str, Any]
Layer = Mapping[str, Any]
Document = Mapping[str, Any]


class Run:
    """One recipe on one checkpoint. folder: made empty, for the store, the artifact and the log."""

    def __init__(self, folder: Path, checkpoint: Path, recipe: str) -> None:
        self.folder, self.checkpoint, self.recipe = folder, checkpoint, recipe
        self.artifact = folder / "artifact"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def row(
        self, floor: MachineFloor, *, most_seconds: float | None, most_memory: float | None
    ) -> Row:
        """What it took, and what it had to take. The artifact is verified, which is timed apart."""
        recipe, source = load_recipe(self.recipe), locate(str(self.checkpoint), hashed=False)
        parameters = Wan().parameters(source)
        row: Row = {"recipe": recipe.name, "params": sum(parameters.values()), "predicted": None}
        planned = self._plan("store-of-plan")
        shutil.rmtree(self.folder / "store-of-plan", ignore_errors=True)
        forget_pages(self.checkpoint)
        command = self._hbxt("quantize", "store", "--out", str(self.artifact))
        took = watch(
            command, self.folder / "log.txt", most_seconds=most_seconds, most_memory=most_memory
        )
        row |= {key: value for key, value in asdict(took).items() if key not in ("curve", "error")}
        (self.folder / "memory.json").write_text(json.dumps(took.curve), encoding="utf-8")
        row["disk_bytes"] = stored_bytes(self.folder)
        if took.error is not None:
            row["error"] = took.error
        else:
            row["artifact_bytes"] = stored_bytes(self.artifact)
            row |= self._verified()
        if planned is not None:
            row["predicted"] = prediction(planned)
            work = least_work(recipe, planned, source, row.get("artifact_bytes"))
            parts = floor.parts_s(work)
            row |= {"floor_seconds": sum(parts.values()), "floor_parts_s": parts}
        return row | {"floor_rates": asdict(floor)}

    def clear(self) -> None:
        """Leaves the log and the memory curve."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)

    def _hbxt(self, verb: str, store: str, *more: str) -> list[str]:
        where = ("--model", str(self.checkpoint), "--store", str(self.folder / store))
        return [sys.executable, "-m", "hbxt_compress", verb, self.recipe, *where, *more]

    def _plan(self, store: str) -> Document | None:
        """What `hbxt plan --predict` says; None if it fails, which the run itself will tell."""
        command = self._hbxt("plan", store, "--json", "--predict", "--out", str(self.artifact))
        done = subprocess.run(command, capture_output=True, text=True)
        return None if done.returncode else dict(json.loads(done.stdout))

    def _verified(self) -> Row:
        command = [sys.executable, "-m", "hbxt_compress", "verify", str(self.artifact)]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        row: Row = {"verify_seconds": time.perf_counter() - began}
        return row | ({"error": f"verify: {done.stderr.strip()}"} if done.returncode else {})


def least_work(
    recipe: Recipe, planned: Document, source: Source, artifact_bytes: int | None
) -> Work:
    """What a run of a plan (`hbxt plan --json`) cannot do without.

    artifact_bytes: None: what the plan says. A calibrated recipe multiplies every parameter of the
    transformer with every token, at each step of each prompt and for both guidance branches; it
    rounds with error feedback, once a layer, by a covariance and its factor, once an input.
    """
    searched: Counter[float] = Counter()
    fed: list[Layer] = []
    for layer in planned["layers"]:
        if layer["weights"] not in FULL_PRECISION:
            how = recipe.rules[layer["rule"]].round or recipe.round
            searched[getattr(how, "norm", _DEFAULT_NORM)] += math.prod(layer["shape"])
            if how is not None and how.need == "covariance":
                fed.append(layer)
    if artifact_bytes is None:
        artifact_bytes = sum(sizes["after"] for sizes in planned["components"].values())
    read = sum((source.folder / name).stat().st_size for name in source.files)
    return Work(
        read_bytes=read,
        hashed_bytes=read + artifact_bytes,
        written_bytes=artifact_bytes,
        searched=searched,
        flops=_calibration_flops(planned, source, fed),
    )


def _calibrated(recipe: Recipe) -> bool:
    how = [recipe.round, *(rule.round for rule in recipe.rules)]
    needs = any(one is not None and one.need is not None for one in how)
    return bool(recipe.budget or recipe.prepare or recipe.refine or needs)


def _calibration_flops(planned: Document, source: Source, fed: Sequence[Layer]) -> float:
    """Of the passes of both models, the full and the half quantized one, and of rounding `fed`.

    0 without calibration. Covariances and feedback fill triangles; layers of one name but for its
    last part may share an input, and count as if they did.
    """
    shown = planned.get("calibration")
    if shown is None:
        return 0.0
    family = Wan()
    branches = 1 if family.sampler(source).guidance == 1.0 else 2
    tokens = shown["n"] * shown["n_states"] * shown["n_tokens"] * branches
    flops = 2 * 2.0 * family.parameters(source)["transformer"] * tokens
    widths: dict[tuple[str, int], float] = {}
    for layer in fed:
        n_out, n_in = layer["shape"][0], math.prod(layer["shape"][1:])
        flops += float(n_out) * n_in**2
        if layer["name"].startswith("transformer"):
            widths[layer["name"].rpartition(".")[0], n_in] = tokens * n_in**2 + n_in**3 / 3
    return flops + sum(widths.values())


def prediction(planned: Document) -> dict[str, float] | None:
    """The plan's own `predicted`: seconds, peak_rss_bytes and disk_bytes; None if it has none."""
    found = planned.get("predicted")
    if not isinstance(found, Mapping) or not found.keys() >= set(_PREDICTED):
        return None
    return {key: found[key] for key in _PREDICTED}


def forget_pages(folder: Path) -> None:
    """Asks the kernel to drop a folder's files from memory, so that reading means the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())  # a page that is not yet written cannot be dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def stored_bytes(folder: Path) -> int:
    """What a folder's files hold, a file of several names once."""
    found = {
        (stat.st_dev, stat.st_ino): stat.st_size
        for path in folder.rglob("*")
        if path.is_file() and (stat := path.stat())
    }
    return sum(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--sizes", nargs="+", choices=CHECKPOINTS, metavar="SIZE", default=["0.3B", "1.3B", "5B"]
    )
    parser.add_argument("--recipes", nargs="+", default=["w4a16-fast", "w4a16"])
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--limit", type=float, help="minutes after which a run is stopped")
    parser.add_argument("--most-memory", type=float, help="GB at which a run is stopped")
    parser.add_argument("--keep", action="store_true", help="keep stores and artifacts")
    parser.add_argument("--add", action="store_true", help="keep other rows of scale.json")
    asked = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    out = asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    written = out / "scale.json"
    rows: list[Row] = json.loads(written.read_text()) if asked.add and written.exists() else []
    for size in asked.sizes:
        log.info("%s: checkpoint", size)
        folder = write_checkpoint(out / "checkpoints" / size, CHECKPOINTS[size])
        for name in asked.recipes:
            log.info("%s: %s", size, name)
            recipe, place = name, out / "scale" / f"{size}-{Path(name).stem}"
            if _calibrated(load_recipe(name)) and load_recipe(name).name == name:
                recipe = str(on_clips(name, out / "scale" / "recipes" / size, folder))
            floor = measure_floor(out)
            run = Run(place, folder, recipe)
            row = run.row(
                floor,
                most_seconds=asked.limit and 60 * asked.limit,
                most_memory=asked.most_memory and 1e9 * asked.most_memory,
            )
            rows = [r for r in rows if (r["model"], r["recipe"]) != (size, row["recipe"])]
            rows.append({"model": size, **row})
            rows.sort(key=lambda r: (r.get("params", 0), r["model"], r["recipe"]))
            if not asked.keep:
                run.clear()
            written.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            write_markdown(out / "scale.md", rows)
            write_svg(out / "scale.svg", rows)
    print((out / "scale.md").read_text(encoding="utf-8"))  # noqa: T201


if __name__ == "__main__":
    main()
