"""What MIGraphX on cards, and ONNX Runtime on the CPU, make of every recipe's graphs.

    python tests/bench/judged.py

Of the built-in model and of Wan2.2-TI2V-5B, from exact configs without weights; nothing is run.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hollow_checkpoints import hollow_checkpoint

from hbxt_compress import library
from hbxt_compress.fit.lowered import Lowerer
from hbxt_compress.geometry import Geometry
from hbxt_compress.graph.judge import Graph, judge
from hbxt_compress.graph.table import DEFAULT_TARGETS, default_runtime, table
from hbxt_compress.recipe import load_recipe
from hbxt_compress.source import BUILTIN, Source, locate

__all__ = ["BUILTIN_SIZES", "Judged", "judged", "published"]

BUILTIN_SIZES = "64x64x17,96x128x33"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Of one recipe, clip size and target: whether it passes, its nodes, and those by verdict."""

    recipe: str
    clip: Geometry
    target: str
    passes: bool
    n_nodes: int
    verdicts: Counter[str]


def judged(source: Source, recipes: Sequence[str], clips: Sequence[Geometry]) -> Iterator[Judged]:
    """All of a model's graphs, for every default target by its own runtime."""
    lowerer = Lowerer(source=source)
    for name in recipes:
        for clip in clips:
            graphs = [
                Graph(name=f"{component}/{file}", model=model, keys={}, problems=())
                for component in lowerer.family.components(source)
                for file, model in lowerer.graphs(load_recipe(name), component, clip).items()
            ]
            for target in DEFAULT_TARGETS:
                runtime = table(default_runtime(target))
                found = judge(graphs, runtime, target, runtime.environment(target))
                yield Judged(
                    recipe=name,
                    clip=clip,
                    target=target,
                    passes=found.passes,
                    n_nodes=sum(len(graph.model.graph) for graph in graphs),
                    verdicts=Counter(found.counts()),
                )


def published(folder: Path) -> Source:
    """Wan2.2-TI2V-5B, with its text encoder and VAE, as headers."""
    sizes = {"transformer": "5B", "text_encoder": "umt5-xxl", "vae": "wan2.2"}
    return locate(str(hollow_checkpoint(folder, **sizes)), hashed=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("build/bench/hollow"))
    large = published(parser.parse_args().models)
    (own,) = Geometry.parse("704x1280x121", 24.0)
    small = locate(BUILTIN, hashed=False)
    failed = 0
    for source, clips in ((small, Geometry.parse(BUILTIN_SIZES, 8.0)), (large, [own])):
        for one in judged(source, library.names("recipes"), clips):
            failed += not one.passes
            counts = ", ".join(f"{n} {verdict}" for verdict, n in one.verdicts.items() if n)
            sys.stdout.write(
                f"{source.folder.name} {one.clip} {one.recipe} {one.target}: "
                f"{'passes' if one.passes else 'DOES NOT PASS'}, {one.n_nodes} nodes: {counts}\n"
            )
    sys.exit(failed)


if __name__ == "__main__":
    main()
