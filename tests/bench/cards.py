"""Which card takes which recipe: a Markdown table of fits and estimates, nothing is run.

    python tests/bench/cards.py

For Wan2.2-TI2V-5B and Wan2.1-T2V-1.3B at their own clip sizes, from exact configs without weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from hollow_checkpoints import hollow_checkpoint
from markdown_table import markdown_table

from hbxt_compress.fit.answer import Answer, Asker
from hbxt_compress.fit.cards import GIB, cards, find_room
from hbxt_compress.recipe import load_recipe
from hbxt_compress.show_fit import verdict
from hbxt_compress.source import locate

__all__ = ["RECIPES", "rows"]

RECIPES = ("w4a16", "w8a16", "fp16")
_MODELS = {
    "Wan2.2-TI2V-5B": ({"transformer": "5B", "vae": "wan2.2"}, "704x1280x121"),
    "Wan2.1-T2V-1.3B": ({"transformer": "1.3B", "vae": "wan2.1"}, "480x832x81"),
}
_TITLES = ("card", "model", "recipe", "fits", "peak (GB)", "least s a step", "attention")


def rows(models: Path) -> Iterator[tuple[str, ...]]:
    """By model, recipe and card. models: folder of the configs, made if they are not there."""
    for name, (sizes, geometry) in _MODELS.items():
        folder = hollow_checkpoint(models, text_encoder="umt5-xxl", **sizes)
        asker = Asker(locate(str(folder), hashed=False))
        (clip,) = asker.geometries(geometry)
        for recipe in RECIPES:
            for card in cards().cards:
                found = asker.answer(load_recipe(recipe), clip, find_room(card.short))
                yield (card.name, f"{name} {clip}", recipe, *_cells(found))


def _cells(found: Answer) -> tuple[str, ...]:
    told = verdict(found) + (" (as it is, with all of its range)" if found.only_at_most else "")
    peak = f"{found.residency.peak_bytes / GIB:.1f}"
    step = "" if found.seconds_per_step is None else f"{found.seconds_per_step:.2g}"
    share = "" if found.step is None else f"{found.step.attention_share:.0%}"
    return told, peak, step, share


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("build/bench/hollow"))
    found = []
    for row in rows(parser.parse_args().models):
        found.append(row)
        sys.stderr.write(" | ".join(row) + "\n")
    sys.stdout.write("\n".join(markdown_table(_TITLES, found, n_words=4)) + "\n")


if __name__ == "__main__":
    main()
