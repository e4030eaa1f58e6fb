"""check_targets: an artifact or an ONNX file, for each target and by every runtime's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hbxt_compress.errors import ArtifactError, UsageError
from hbxt_compress.graph.judge import Graph, Judgement, judge, read_graph
from hbxt_compress.graph.table import RUNTIMES, table
from hbxt_compress.strict import did_you_mean

__all__ = ["DEFAULT_TARGETS", "Check", "check_targets", "default_runtime", "targets"]

DEFAULT_TARGETS: Final = ("gfx942", "gfx1100", "gfx1151", "gfx1201", "cpu")
"""what is checked where no target is named: a card of each kind, and the processor"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What all runtimes make of some graphs on one target, and which of them counts."""

    target: str
    runtime: str
    runtimes: Mapping[str, Judgement]

    @property
    def passes(self) -> bool:
        return self.runtimes[self.runtime].passes

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        return {
            "target": self.target,
            "runtime": self.runtime,
            "passes": self.passes,
            "runtimes": {name: one.to_json() for name, one in self.runtimes.items()},
        }


def targets() -> tuple[str, ...]:
    """Every target that a table names, without patterns."""
    named = {gpu for name in RUNTIMES for gpu in table(name).gpus if "*" not in gpu}
    return tuple(sorted(named, key=lambda one: (len(one), one)))


def default_runtime(target: str) -> str:
    return "cpu" if target == "cpu" else "migraphx"


def check_targets(
    path: Path, wanted: Sequence[str] = (), runtime: str | None = None
) -> tuple[Check, ...]:
    """A check for each target. path: an artifact's folder, another folder of graphs, or a file.

    Raises:
        UsageError: no such target or runtime.
        ArtifactError: there is no graph, or it cannot be read.
    """
    known = targets()
    for target in wanted:
        if target not in known:
            meant = did_you_mean(target, known)
            raise UsageError(f"target {target!r}: unknown{meant}; known: {', '.join(known)}")
    if runtime is not None and runtime not in RUNTIMES:
        meant = did_you_mean(runtime, RUNTIMES)
        raise UsageError(f"runtime {runtime!r}: unknown{meant}; known: {', '.join(RUNTIMES)}")
    graphs = _read(path)
    return tuple(
        Check(
            target=target,
            runtime=runtime or default_runtime(target),
            runtimes={
                name: judge(graphs, table(name), target)
                for name in sorted(
                    RUNTIMES, key=lambda n: n != (runtime or default_runtime(target))
                )
            },
        )
        for target in (wanted or DEFAULT_TARGETS)
    )


def _read(path: Path) -> list[Graph]:
    if not path.is_dir():
        if not path.is_file():
            raise ArtifactError(f"{path}: no such file or folder")
        return [read_graph(path)]
    files = sorted(path.rglob("*.onnx"))
    if not files:
        raise ArtifactError(f"{path}: holds no *.onnx file; give an artifact or an ONNX file")
    return [read_graph(file, file.relative_to(path).as_posix()) for file in files]
