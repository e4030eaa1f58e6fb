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
from hbxt_compress.source import locate

__all__ = ["RECIPES", "rows"]

RECIPES = ("w4a16", "w8a16", "fp16")
_MODELS = {
    "Wan2.2-TI2V-5B": ({"transformer": "5B", "vae": "wan2.2"}, "704x1280x121"),
    "Wan2.1-T2V-1.3B": ({"transformer": "1.3B", "vae": "wan2.1"}, "480x832x81"),
}
_ONE = "one graph open at a time"  # as `hbxt generate` runs it


def rows(models: Path) -> Iterator[tuple[str, ...]]:
    """A card a row. models: folder of the configs, made if they are not there."""
    columns: dict[str, dict[str, str]] = {}
    for name, (sizes, geometry) in _MODELS.items():
        folder = hollow_checkpoint(models, text_encoder="umt5-xxl", **sizes)
        asker = Asker(locate(str(folder), hashed=False))
        (clip,) = asker.geometries(geometry)
        for recipe in RECIPES:
            for card in cards().cards:
                found = asker.answer(load_recipe(recipe), clip, find_room(card.short))
                own = columns.setdefault(card.name, {})
                own[f"{name} {recipe} (GB)"] = _cell(found)
                if recipe == RECIPES[0] and found.step is not None:
                    seconds = f"{found.seconds_per_step:.2g}"
                    share = f"{found.step.attention_share:.0%}"
                    own[f"{name} {clip}: least s a step, attention"] = f"{seconds}, {share}"
            sys.stderr.write(f"{name} {recipe}\n")
    yield ("card", *next(iter(columns.values())))
    for name, own in columns.items():
        yield (name, *own.values())


def _cell(found: Answer) -> str:
    """Peak memory, and what it takes."""
    peak = f"{found.residency.peak_bytes / GIB:.1f}"
    if found.found is None:
        return f"does not fit: {peak}"
    kept = ["all kept"] if found.found.loading == "all kept" else []
    return ", ".join([peak, *kept, *(one for one in found.changes if one != _ONE)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("build/bench/hollow"))
    titles, *found = rows(parser.parse_args().models)
    sys.stdout.write("\n".join(markdown_table(titles, found, n_words=1)) + "\n")


if __name__ == "__main__":
    main()
