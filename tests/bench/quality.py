"""The bench: what this project's recipes and other toolkits make of the same model.

    python tests/bench/quality.py [--only onnxruntime ...] [--out build/bench]

Every tool quantizes the Linear weights of the transformer's blocks, from the same calibration
inputs, in a virtual environment and a process of its own, through its own public API; one code
judges them all. Writes quality.json, quality.md and quality.svg; a tool that cannot be installed or
fails becomes a row with `error`. Finished work is kept until what it was made from changes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import judge
import own
from calibration_inputs import CALIBRATION, HELD_OUT, make_inputs
from safetensors.torch import load_file
from table import write_markdown, write_svg
from torch import Tensor

import hbxt_compress
from hbxt_compress.library import find
from hbxt_compress.machine import Machine
from hbxt_compress.source import BUILTIN, locate

PEERS = {
    "onnxruntime": "ort_nbits",
    "amd-quark": "amd_quark",
    "auto-round": "auto_round_wan",
    "optimum-quanto": "optimum_quanto",
    "torchao": "pytorch_ao",
}
_HERE = Path(__file__).parent / "peers"
_SHARED = (_HERE / "host.py", _HERE / "wan.py")
log = logging.getLogger("bench")

Row = dict[str, Any]


class Bench:
    """One run: where things lie, and who judges."""

    def __init__(self, out: Path, pip_args: list[str], *, clips: bool, limit: float) -> None:
        self.out, self.pip_args, self.inputs, self.limit = out, pip_args, out / "inputs", limit
        make_inputs(self.inputs)
        self.weights = judge.linears()
        self.n_weights = sum(one.numel() for one in self.weights.values())
        self.velocity = judge.VelocityJudge(self.inputs / HELD_OUT)
        machine = Machine(n_threads=int(os.environ.get("OMP_NUM_THREADS", 0)) or None)
        self.reference = judge.artifact(out / "store", BUILTIN, machine)
        self.clips = judge.ClipJudge(out, machine) if clips else None

    def peer_rows(self, tool: str) -> Iterator[Row]:
        """A row for each method of a tool."""
        script = _HERE / f"{PEERS[tool]}.py"
        try:
            python = self._venv(tool, script.with_suffix(".txt"))
            methods = _run([python, script, "list"], self.out / f"{tool}.log").splitlines()
        except RuntimeError as error:
            yield {"tool": tool, "version": "", "method": "", "error": str(error)}
            return
        for method in methods:
            log.info("%s: %s", tool, method)
            folder = self.out / "peers" / tool / _slug(method)
            row = _kept(
                folder / "ran.json",
                [script, script.with_suffix(".txt"), *_SHARED, self.inputs / CALIBRATION],
                partial(self._ran, tool, python, script, method, folder),
                self.limit,
            )
            if "error" not in row:
                weights = folder / "weights.safetensors"
                judges = [weights, Path(judge.__file__), self.inputs / HELD_OUT]
                row |= _kept(
                    folder / ("judged.json" if self.clips else "velocity.json"),
                    judges,
                    partial(self._judged, f"{tool}-{_slug(method)}", weights),
                )
            yield row

    def own_rows(self) -> Iterator[Row]:
        """A row for each of this project's recipes; made again when any of its code changes."""
        code = sorted(Path(hbxt_compress.__file__).parent.rglob("*.py"))
        code += [Path(own.__file__)]
        for recipe in own.OWN:
            log.info("hbxt_compress: %s", recipe)
            folder = self.out / "own" / recipe
            made_from = [*code, find("recipes", recipe)]
            row = _kept(folder / "ran.json", made_from, partial(self._made, recipe))
            if "error" not in row:
                artifact = folder / "artifact"
                judges = [artifact / "manifest.json", Path(judge.__file__), self.inputs / HELD_OUT]
                row |= _kept(
                    folder / ("judged.json" if self.clips else "velocity.json"),
                    judges,
                    partial(self._judged_artifact, artifact),
                )
            yield row

    def _made(self, recipe: str) -> Row:
        try:
            return own.make(recipe, self.out, self.n_weights)
        except (RuntimeError, OSError) as error:
            row = {"tool": "hbxt_compress", "version": "", "method": recipe}
            return row | {"error": _short(str(error))}

    def _judged_artifact(self, artifact: Path) -> Row:
        v = own.graph_velocity(artifact, self.velocity.calls)
        return self.velocity.compare(v) | (self.clips.judge(artifact) if self.clips else {})

    def _venv(self, tool: str, requirements: Path) -> Path:
        folder = self.out / f"venv-{tool}"
        python, stamp = folder / "bin" / "python", folder / "requirements.txt"
        wanted = requirements.read_text(encoding="utf-8")
        if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
            log.info("%s: installing", tool)
            _run([sys.executable, "-m", "venv", folder], self.out / f"{tool}.log")
            pip = [python, "-m", "pip", "--disable-pip-version-check", "install", *self.pip_args]
            _run([*pip, "-r", requirements], self.out / f"{tool}.log")
            stamp.write_text(wanted, encoding="utf-8")
        return python

    def _ran(self, tool: str, python: Path, script: Path, method: str, folder: Path) -> Row:
        """What a peer says about its own run."""
        arguments = {
            "transformer": locate(BUILTIN, hashed=False).folder / "transformer",
            "graph": self.reference / "transformer" / "model.onnx",
            "inputs": self.inputs,
            "out": folder,
        }
        options = [part for name, one in arguments.items() for part in (f"--{name}", one)]
        failed = {"tool": tool, "version": _pinned(script.with_suffix(".txt"), tool)}
        try:
            _run([python, script, method, *options], folder / "log.txt", self.limit)
        except RuntimeError as error:
            return failed | {"method": method, "error": str(error)}
        except subprocess.TimeoutExpired:
            stopped = f"stopped after {self.limit / 60:g} min"
            return failed | {"method": method, "error": stopped, "seconds": self.limit}
        row = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        row["bits_per_weight"] = 8 * sum(row["stored_bytes"].values()) / self.n_weights
        return row

    def _judged(self, name: str, path: Path) -> Row:
        weights = load_file(path)
        if _shapes(weights) != _shapes(self.weights):
            return {"error": f"gave back {len(weights)} weights, not the {len(self.weights)}"}
        judged = self.velocity.judge(weights)
        return judged | (self.clips.judge_weights(name, weights) if self.clips else {})


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(one.shape) for name, one in weights.items()}


def _kept(
    path: Path, inputs: Sequence[Path], make: Callable[[], Row], limit: float = math.inf
) -> Row:
    """The row in a file if it was made from these inputs, else a new one.

    A failure is tried again, unless what failed was stopped after no less than `limit` seconds.
    """
    digest = hashlib.sha256(b"".join(one.read_bytes() for one in inputs)).hexdigest()
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        done = "error" not in kept["row"] or kept["row"].get("seconds", 0) >= limit
        if kept["made_from"] == digest and done:
            return dict(kept["row"])
    path.parent.mkdir(parents=True, exist_ok=True)
    row = make()
    path.write_text(json.dumps({"made_from": digest, "row": row}, indent=1), encoding="utf-8")
    return row


def _run(command: list[Any], log_file: Path, limit: float | None = None) -> str:
    """The standard output of a command; RuntimeError with the end of its error output."""
    words = [str(part) for part in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=limit)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    log_file.write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(_short(done.stderr or done.stdout or f"exit code {done.returncode}"))
    return done.stdout


def _short(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _pinned(requirements: Path, tool: str) -> str:
    text = requirements.read_text(encoding="utf-8")
    found = re.search(rf"^{re.escape(tool)}==(\S+)", text, flags=re.MULTILINE)
    return found[1] if found else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--only", nargs="*", choices=[*PEERS, "hbxt_compress"], default=None)
    parser.add_argument("--no-clips", action="store_true", help="velocity SQNR alone")
    parser.add_argument("--pip-args", default="", help="for pip install, such as an index of torch")
    parser.add_argument("--limit", type=float, default=20, help="minutes for one peer's method")
    asked = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    pip_args, limit = shlex.split(asked.pip_args), 60 * asked.limit
    bench = Bench(asked.out.resolve(), pip_args, clips=not asked.no_clips, limit=limit)
    rows: list[Row] = []
    for tool in asked.only or [*PEERS, "hbxt_compress"]:
        for row in bench.own_rows() if tool == "hbxt_compress" else bench.peer_rows(tool):
            rows.append(row)
            text = json.dumps(rows, indent=1, ensure_ascii=False)
            (bench.out / "quality.json").write_text(text + "\n", encoding="utf-8")
    write_markdown(bench.out / "quality.md", rows)
    write_svg(bench.out / "quality.svg", rows)
    print((bench.out / "quality.md").read_text(encoding="utf-8"))  # noqa: T201


if __name__ == "__main__":
    main()
