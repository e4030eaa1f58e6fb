"""`hbxt recipes`, `show` and `copy`: the commands that look at the library of recipes."""

from __future__ import annotations

import re
from pathlib import Path

import click

from hbxt_compress.errors import UsageError

__all__ = ["copy", "recipes", "show_recipe"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def recipes(as_json: bool) -> None:
    """List the recipes of the library."""
    from hbxt_compress import library, show
    from hbxt_compress.recipe import load_recipe

    show.recipes([load_recipe(name) for name in library.names("recipes")], as_json)


@click.command("show")
@click.argument("recipe")
def show_recipe(recipe: str) -> None:
    """Print RECIPE with its defaults.

    JSON, checked, with the digest that results are filed under.
    """
    from hbxt_compress import show
    from hbxt_compress.recipe import load_recipe

    found = load_recipe(recipe)
    show.as_json({**found.model_dump(mode="json"), "digest": found.digest})


@click.command()
@click.argument("recipe")
@click.argument("file", type=click.Path(path_type=Path))
def copy(recipe: str, file: Path) -> None:
    """Copy RECIPE to FILE to change it."""
    from hbxt_compress import library

    if not library.is_path(str(file)) or file.exists():
        raise UsageError(
            f"{file}: " + ("exists already" if file.exists() else "give a name that ends in .yaml")
        )
    text = library.find("recipes", recipe).read_text(encoding="utf-8")
    name = re.sub(r"[^a-z0-9._-]+", "-", file.stem.lower()).strip("-._") or "recipe"
    file.write_text(re.sub(r"(?m)^name: .*$", f"name: {name}", text, count=1), encoding="utf-8")
