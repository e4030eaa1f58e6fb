"""Targets of an artifact: each is judged before it ships, and what its runtimes need is recorded.

The tables of graph/runtimes say both; the runtime applies what the manifest says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hbxt_compress.errors import ExportError, listing
from hbxt_compress.graph.check import read_graphs
from hbxt_compress.graph.judge import BAD, Judgement, judge
from hbxt_compress.graph.table import RUNTIMES, default_runtime, table
from hbxt_compress.manifest import TargetRecord

__all__ = ["target_records"]


def target_records(folder: Path, targets: Sequence[str]) -> dict[str, TargetRecord]:
    """What is to be set on each target, and how many nodes of all graphs meet which verdict there.

    Raises:
        ExportError: on a target something fails or is misparsed, or a whole graph is left to the
            CPU; every such node with the reason.
    """
    graphs = read_graphs(folder)
    records, problems = {}, []
    for target in targets:
        runtime = default_runtime(target)
        found = judge(graphs, table(runtime), target, table(runtime).environment(target))
        problems += [f"{target}: {one}" for one in _problems(found)]
        records[target] = TargetRecord(
            runtime=runtime,
            nodes=found.counts(),
            settings={
                name: {"environment": told.environment(target), "options": told.options(target)}
                for name in RUNTIMES
                if (told := table(name)).computes_on(target)
            },
        )
    if problems:
        raise ExportError(
            f"the graphs will not do on {len(problems)} counts:\n{listing(problems)}\n"
            "see `hbxt check`, or take the target out of the recipe's export: targets"
        )
    return records


def _problems(found: Judgement) -> list[str]:
    bad = [
        f"{one.file}: {one.node} ({one.op}) {one.verdict}: {one.reason}"
        for one in found.nodes
        if one.verdict in BAD
    ]
    return [f"{file}: all of it is left to the CPU" for file in found.cliff] + bad
