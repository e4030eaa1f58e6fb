"""Finds recipes, prompt sets and suites: a bare name is the library, anything else is a path.

In an installed wheel they lie in `_bundled/`; in a checkout, beside the package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from hbxt_compress.errors import RecipeError
from hbxt_compress.strict import did_you_mean

__all__ = ["ROOTS", "Shelf", "find", "folder", "is_path", "names"]

Shelf = Literal["recipes", "calibration", "eval/suites", "eval/baselines"]

_PACKAGE = Path(__file__).resolve().parent
ROOTS: Final = (_PACKAGE / "_bundled", _PACKAGE.parent)

_NOUN = {
    "recipes": "recipe",
    "calibration": "prompt set",
    "eval/suites": "suite",
    "eval/baselines": "baseline",
}


def folder(shelf: Shelf, roots: tuple[Path, ...] = ROOTS) -> Path:
    """The folder of a shelf, from the first root that has it."""
    for root in roots:
        if (root / shelf).is_dir():
            return root / shelf
    raise RecipeError(
        f"the folder {shelf} is missing from this installation; install hbxt-compress again"
    )


def names(shelf: Shelf, roots: tuple[Path, ...] = ROOTS) -> tuple[str, ...]:
    """The names on a shelf, sorted."""
    return tuple(sorted(path.stem for path in folder(shelf, roots).glob("*.yaml")))


def is_path(name_or_path: str) -> bool:
    """Whether the text is a path: it has a slash (or backslash) or ends in .yaml or .yml."""
    return any(mark in name_or_path for mark in "/\\") or name_or_path.endswith((".yaml", ".yml"))


def find(shelf: Shelf, name_or_path: str, roots: tuple[Path, ...] = ROOTS) -> Path:
    """The file of a name on a shelf, or the path itself.

    Raises:
        RecipeError: the shelf has no such name; the message lists those it has.
    """
    if is_path(name_or_path):
        return Path(name_or_path)
    known = names(shelf, roots)
    if name_or_path not in known:
        raise RecipeError(
            f"unknown {_NOUN[shelf]} {name_or_path!r}{did_you_mean(name_or_path, known)}; "
            f"the library has: {', '.join(known)}; "
            f"for a file of your own give its path (./{name_or_path}.yaml)"
        )
    return folder(shelf, roots) / f"{name_or_path}.yaml"
