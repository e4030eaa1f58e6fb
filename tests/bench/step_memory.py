"""What a graph needs in memory: its weights, what is live at once, and what ONNX Runtime takes.

    python tests/bench/step_memory.py GRAPH.onnx [--threads 2]
    python tests/bench/step_memory.py --tokens 8192     # four blocks as wide as the 1.3B model's

Live at once is the most that values of the graph hold between the node that makes them and the last
that reads them, in the order of the file; a reshaped value is the same one. Measured is a process
that opens the graph and runs it twice on random inputs. Their ratio says what is wasted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

__all__ = ["Memory", "largest_bytes", "live_bytes", "measure", "weight_bytes"]

_SAME = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes. held: once the graph is open; opening, step: the peak then, above the bare process."""

    weights: int
    live: int
    held: int
    opening: int
    step: int

    @property
    def ratio(self) -> float:
        """The peak of a step over weights and live values."""
        return self.step / (self.weights + self.live)


def weight_bytes(model: onnx.ModelProto) -> int:
    """Of all initializers, as float32 where they are float16: that is what a CPU computes with."""
    return sum(
        math.prod(one.dims) * max(_width(one.data_type), 4 if _is_half(one.data_type) else 0)
        for one in model.graph.initializer
    )


def live_bytes(model: onnx.ModelProto) -> int:
    """The most bytes that inputs, outputs and values between them hold at once."""
    sizes, graph = _sizes(model), model.graph
    constants = {one.name for one in graph.initializer}
    owner = {name: name for name in sizes}  # whose memory a value lies in
    for node in graph.node:
        if node.op_type in _SAME and node.input[0] not in constants:
            owner[node.output[0]] = owner[node.input[0]]
    last = {owner[one.name]: len(graph.node) for one in graph.output}
    for i, node in enumerate(graph.node):
        for name in node.input:
            if name and name not in constants:
                last[owner[name]] = max(last.get(owner[name], 0), i)
    live = {one.name for one in graph.input if one.name not in constants}
    most = 0
    for i, node in enumerate(graph.node):
        live |= {owner[name] for name in node.output if name}
        most = max(most, sum(sizes[name] for name in live))
        live = {name for name in live if last.get(name, 0) > i}
    return most


def largest_bytes(model: onnx.ModelProto) -> int:
    """Of the largest value that is no initializer."""
    constants = {one.name for one in model.graph.initializer}
    return max(size for name, size in _sizes(model).items() if name not in constants)


def measure(file: Path, *, n_threads: int = 1) -> Memory:
    """Opens and runs the graph in a process of its own."""
    model = onnx.load(file, load_external_data=False)
    done = subprocess.run(
        [sys.executable, __file__, str(file), "--threads", str(n_threads), "--inside"],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    return Memory(weights=weight_bytes(model), live=live_bytes(model), **found)


def _sizes(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of every value that has a type; every one of an export has."""
    graph = model.graph
    found = {}
    for one in (*graph.input, *graph.value_info, *graph.output):
        kind = one.type.tensor_type
        found[one.name] = math.prod(d.dim_value for d in kind.shape.dim) * _width(kind.elem_type)
    return found


def _width(data_type: int) -> float:
    if data_type in (TensorProto.INT4, TensorProto.UINT4):
        return 0.5
    return onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize


def _is_half(data_type: int) -> bool:
    return data_type == TensorProto.FLOAT16


def _inside(file: Path, n_threads: int) -> Mapping[str, int]:
    """In a process of its own: resident bytes above those before the graph was opened."""
    from hbxt_compress.graph.parity import SESSION_OPTIONS
    from hbxt_compress.runtime.session import open_session

    drawn = np.random.default_rng(0)
    graph = onnx.load(file, load_external_data=False).graph
    feeds = {}
    for one in graph.input:
        shape = [d.dim_value for d in one.type.tensor_type.shape.dim]
        whole = one.type.tensor_type.elem_type == TensorProto.INT64
        drawing = drawn.standard_normal(shape, dtype=np.float32)
        feeds[one.name] = np.zeros(shape, dtype=np.int64) if whole else drawing
    bare = _resident("VmRSS")
    session = open_session(file, "cpu", n_threads=n_threads, config=SESSION_OPTIONS)
    held, opening = _resident("VmRSS"), _resident("VmHWM")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    for _ in range(2):  # what the first leaves behind, the second has beside it
        session.run(feeds)
    step = _resident("VmHWM")
    return {"held": held - bare, "opening": opening - bare, "step": step - bare}


def _resident(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(text.split(f"{field}:")[1].split()[0])


def _made(folder: Path, n_tokens: int) -> Path:
    """In a process of its own: torch would stay in this one."""
    code = (
        "import sys; from pathlib import Path; import speed; "
        "_, graphs = speed.transformer(tokens=int(sys.argv[2])); "
        "speed.export_component(Path(sys.argv[1]), graphs, {}, precision=32)"
    )
    command = [sys.executable, "-c", code, str(folder), str(n_tokens)]
    root = Path(__file__).parents[2]
    found = {**os.environ, "PYTHONPATH": f"{root}:{Path(__file__).parent}"}
    subprocess.run(command, check=True, env=found)
    return folder / "model.onnx"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("graph", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, help="make a float32 graph for so many, and measure")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--inside", action="store_true", help="measure in this very process")
    asked = parser.parse_args()
    if asked.inside:
        sys.stdout.write(json.dumps(_inside(asked.graph, asked.threads)))
        return
    if (asked.graph is None) == (asked.tokens is None):
        parser.error("give a graph, or --tokens")
    with tempfile.TemporaryDirectory() as folder:
        graph = asked.graph or _made(Path(folder), asked.tokens)
        found = measure(graph, n_threads=asked.threads)
    for name in ("weights", "live", "held", "opening", "step"):
        sys.stdout.write(f"{name:8} {getattr(found, name) / 1e6:10.1f} MB\n")
    sys.stdout.write(f"step over weights and live values: {found.ratio:.2f}\n")


if __name__ == "__main__":
    main()
