"""Opens one graph and runs it as the runtime does; prints the process's peak memory, in bytes.

    python tests/bench/fit_run.py build/bench/graph/model.onnx

A file of its own: nothing may be imported that the runtime does not import.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from hbxt_compress.runtime import generate
from hbxt_compress.runtime.session import open_session

__all__ = ["peak_bytes"]

_RUNS = 3
_CONFIG = {"session.qdq_matmulnbits_accuracy_level": "1"}
_WHOLE = frozenset({"input_ids", "attention_mask"})
_USED = generate  # a process that generates has imported it


def peak_bytes(graph: Path) -> int:
    """After some runs; caches that a run gives go into the next."""
    session = open_session(graph, "cpu", config=_CONFIG)
    draw = np.random.default_rng(0)
    inputs = {
        name: np.ones(shape, np.int64)
        if name in _WHOLE
        else draw.standard_normal(shape, dtype=np.float32)
        for name, shape in session.input_shapes.items()
    }
    for _ in range(_RUNS):
        result = session.run(inputs)
        inputs |= {
            name: value
            for key, value in result.items()
            if (name := key.replace("cache_out_", "cache_in_")) in inputs
        }
        del result
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return 1024 * int(peak)


if __name__ == "__main__":
    sys.stdout.write(f"{peak_bytes(Path(sys.argv[1]))}\n")
