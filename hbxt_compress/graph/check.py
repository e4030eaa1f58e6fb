"""check_targets: an artifact or an ONNX file, for each target and by every runtime's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hbxt_compress.artifact import MANIFEST, Artifact
from hbxt_compress.errors import ArtifactError, UsageError
from hbxt_compress.graph.judge import Graph, Judgement, judge, read_graph
from hbxt_compress.graph.table import (
    DEFAULT_TARGETS,
    RUNTIMES,
    default_runtime,
    known_target,
    table,
)
from hbxt_compress.strict import did_you_mean

__all__ = ["Check", "check_targets", "read_graphs"]


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


def check_targets(
    path: Path, wanted: Sequence[str] = (), runtime: str | None = None
) -> tuple[Check, ...]:
    """A check for each target. path: an artifact's folder, another folder of graphs, or a file.

    Variables that an artifact's manifest has for a target count as set.

    Raises:
        UsageError: no such target or runtime.
        ArtifactError: there is no graph, or it cannot be read.
    """
    try:
        wanted = [known_target(target) for target in wanted]
    except ValueError as error:
        raise UsageError(str(error)) from error
    if runtime is not None and runtime not in RUNTIMES:
        meant = did_you_mean(runtime, RUNTIMES)
        raise UsageError(f"runtime {runtime!r}: unknown{meant}; known: {', '.join(RUNTIMES)}")
    graphs, told = read_graphs(path), _told(path)
    return tuple(
        Check(
            target=target,
            runtime=runtime or default_runtime(target),
            runtimes={
                name: judge(graphs, table(name), target, told.get((target, name)))
                for name in sorted(
                    RUNTIMES, key=lambda n: n != (runtime or default_runtime(target))
                )
            },
        )
        for target in (wanted or DEFAULT_TARGETS)
    )


def read_graphs(path: Path) -> list[Graph]:
    """The structure of a file, or of every ONNX file below a folder.

    Raises:
        ArtifactError: there is none, or one cannot be read.
    """
    if not path.is_dir():
        if not path.is_file():
            raise ArtifactError(f"{path}: no such file or folder")
        return [read_graph(path)]
    files = sorted(path.rglob("*.onnx"))
    if not files:
        raise ArtifactError(f"{path}: holds no *.onnx file; give an artifact or an ONNX file")
    return [read_graph(file, file.relative_to(path).as_posix()) for file in files]


def _told(path: Path) -> dict[tuple[str, str], Mapping[str, str]]:
    """(target, runtime) -> the variables that the runtime sets there, if it is an artifact."""
    if not (path / MANIFEST).is_file():
        return {}
    targets = Artifact.open(path, verify=False).manifest.targets
    return {
        (target, runtime): told["environment"]
        for target, record in targets.items()
        for runtime, told in record.settings.items()
    }
