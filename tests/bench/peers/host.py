"""What every peer script does around its peer: arguments in, weights and a result.json out.

    venv/bin/python PEER.py list
    venv/bin/python PEER.py METHOD --transformer FOLDER --graph ONNX --inputs FOLDER --out FOLDER

writes, in a process of its own so that time and memory are the method's:
    OUT/weights.safetensors  what each quantized layer multiplies by, float32 (out, in), by name
    OUT/result.json          {tool, version, method, settings, stored_bytes, seconds,
                             peak_rss_bytes}; stored_bytes of those layers, by kind of tensor
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

__all__ = ["Case", "Clock", "Outcome", "run"]


class Clock:
    """Seconds inside `with` blocks: the peer's own work, without loading and unpacking."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began


@dataclass(frozen=True, slots=True)
class Case:
    """What a method is given. transformer: diffusers folder; graph: its float32 ONNX export."""

    transformer: Path
    graph: Path
    inputs: Path
    out: Path
    clock: Clock


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a method hands back: effective weights, bytes really stored, and how it was asked."""

    weights: Mapping[str, np.ndarray]
    stored_bytes: Mapping[str, int]
    settings: Mapping[str, object]


def run(package: str, methods: Mapping[str, Callable[[Case], Outcome]]) -> None:
    """The command line of a peer script; package is the distribution whose version is reported."""
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=["list", *methods])
    for name in ("transformer", "graph", "inputs", "out"):
        parser.add_argument(f"--{name}", type=Path)
    asked = parser.parse_args()
    if asked.method == "list":
        print("\n".join(methods))  # noqa: T201
        return
    asked.out.mkdir(parents=True, exist_ok=True)
    case = Case(asked.transformer, asked.graph, asked.inputs, asked.out, Clock())
    outcome = methods[asked.method](case)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    weights = {
        name: np.ascontiguousarray(one, dtype=np.float32) for name, one in outcome.weights.items()
    }
    save_file(weights, asked.out / "weights.safetensors")
    result = {
        "tool": package,
        "version": version(package),
        "method": asked.method,
        "settings": outcome.settings,
        "stored_bytes": outcome.stored_bytes,
        "seconds": case.clock.seconds,
        "peak_rss_bytes": peak,
    }
    (asked.out / "result.json").write_text(json.dumps(result, indent=1, default=str))
