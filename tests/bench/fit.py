"""Memory of ONNX Runtime's CPU provider: what `hbxt plan --target cpu` foretells, and what is.

    python tests/bench/fit.py                    # all cases; folders of graphs are removed again
    python tests/bench/fit.py --only transformer

Graphs are those of an export, of published widths at other depths; their weights are random bytes
of the same number. Each is opened and run in a process of its own as hbxt_compress.runtime does it,
and the kernel's own peak of that process is the measure (Linux).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from hollow_checkpoints import hollow_checkpoint
from markdown_table import markdown_table

from hbxt_compress.fit.cpu import BASE_BYTES, on_cpu
from hbxt_compress.fit.lowered import Lowerer
from hbxt_compress.geometry import Geometry
from hbxt_compress.graph.external import write_models
from hbxt_compress.recipe import load_recipe
from hbxt_compress.source import locate

__all__ = ["CASES", "Case", "Result", "hollow", "measure", "peak_of"]

_AT_ONCE = 1_000_003


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Which graphs: sizes as of tests/bench/checkpoints.py, a component, a recipe, a clip size."""

    checkpoint: Mapping[str, str]
    component: str
    recipe: str
    size: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Bytes of a process that opened one graph and ran it some times."""

    case: Case
    file: str
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


_SMALL = {"transformer": "0.3B"}
_MIDDLE = {"transformer": "1.3B"}
_WIDE = {"transformer": "5B"}
_WHOLE = {"transformer": "5B", "text_encoder": "umt5-xxl", "vae": "wan2.2"}
CASES = (
    *(
        Case(checkpoint=_SMALL, component="transformer", recipe=recipe, size=size)
        for recipe in ("fp32", "fp16", "w4a16-fast", "w8a8")
        for size in ("256x256x33", "320x512x17")
    ),
    Case(checkpoint=_MIDDLE, component="transformer", recipe="w4a16-fast", size="128x128x17"),
    Case(checkpoint=_WIDE, component="transformer", recipe="w4a16-fast", size="256x256x33"),
    Case(checkpoint=_WHOLE, component="text_encoder", recipe="w4a16-fast", size="64x64x5"),
    Case(checkpoint=_WHOLE, component="vae_decoder", recipe="fp16", size="128x128x5"),
    Case(checkpoint=_WHOLE, component="vae_decoder", recipe="fp32", size="256x256x5"),
)  # fmt: skip


def hollow(model: ir.Model) -> None:
    """Gives content to the initializers that a lowered graph has none for."""
    for value in model.graph.initializers.values():
        lazy = value.const_value
        if isinstance(lazy, ir.LazyTensor):
            read = partial(_random, value.name or "", lazy.dtype, tuple(lazy.shape.numpy()))
            value.const_value = ir.LazyTensor(read, lazy.dtype, lazy.shape, name=value.name)


def _random(name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Tensor:
    """Small numbers that repeat; the first are the name's own, so that no two tensors are equal."""
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    kind, n = dtype.numpy(), int(np.prod(shape))
    whole = np.issubdtype(kind, np.integer)
    numbers = draw.integers(0, 120, _AT_ONCE) if whole else draw.normal(0, 0.02, _AT_ONCE)
    numbers, filled = numbers.astype(kind), np.empty(n, kind)
    for start in range(0, n, _AT_ONCE):
        filled[start : start + _AT_ONCE] = numbers[: min(_AT_ONCE, n - start)]
    return ir.Tensor(filled.reshape(shape), name=name)


def measure(model_folder: Path, case: Case, work: Path) -> Iterator[Result]:
    """A result for each graph of a component. work: in it they are written, one after another."""
    lowerer = Lowerer(source=locate(str(model_folder), hashed=False))
    height, width, n_frames = map(int, case.size.split("x"))
    clip = Geometry(height=height, width=width, n_frames=n_frames, fps=8.0)
    for file, model in lowerer.graphs(load_recipe(case.recipe), case.component, clip).items():
        predicted = BASE_BYTES + on_cpu(model).n_bytes
        hollow(model)
        folder = work / "graph"
        write_models(folder, {file: model})
        measured = peak_of(folder / file)
        shutil.rmtree(folder)
        yield Result(case=case, file=file, predicted=predicted, measured=measured)


def peak_of(graph: Path) -> int:
    """The peak of a process that opens the graph and runs it."""
    child = [sys.executable, str(Path(__file__).with_name("fit_run.py")), str(graph)]
    return int(subprocess.run(child, check=True, capture_output=True, text=True).stdout)


def _table(found: Sequence[Result]) -> str:
    rows = [
        (one.case.checkpoint["transformer"], f"{one.case.component}/{one.file}", one.case.recipe,
         one.case.size, f"{one.predicted / 1e6:.0f}", f"{one.measured / 1e6:.0f}",
         f"{one.error:+.1%}")
        for one in found
    ]  # fmt: skip
    titles = ("model", "graph", "recipe", "size", "foretold (MB)", "measured (MB)", "error")
    return "\n".join(markdown_table(titles, rows, n_words=4))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=(), help="components or recipes")
    parser.add_argument("--models", type=Path, default=Path("build/bench/hollow"))
    asked = parser.parse_args()
    found = []
    for case in CASES:
        if not asked.only or {case.component, case.recipe} & set(asked.only):
            folder = hollow_checkpoint(asked.models, **case.checkpoint)
            with tempfile.TemporaryDirectory(dir=asked.models) as work:
                for one in measure(folder, case, Path(work)):
                    found.append(one)
                    sys.stderr.write(_table([one]).splitlines()[-1] + "\n")
    sys.stdout.write(_table(found) + "\n")


if __name__ == "__main__":
    main()
