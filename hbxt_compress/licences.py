"""Licences: the licence and notice files of a model's folder, which travel with all made of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

__all__ = ["FOLDER", "KNOWN", "PATTERNS", "known_licence", "licence_files", "licence_of"]

FOLDER: Final = "licences"
"""where they lie in an artifact"""

_WORDS: Final = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "THIRD_PARTY", "THIRD-PARTY")
PATTERNS: Final = tuple(
    f"{case}*" for word in _WORDS for case in (word, word.lower(), word.capitalize())
)
"""globs for such names, in the spellings that are in use"""

_NAME: Final = re.compile(rf"(checkpoint-)*({'|'.join(_WORDS)})([^a-z].*|s\b.*|)", re.IGNORECASE)
_TERMS: Final = re.compile(r"(checkpoint-)*(licen[cs]e|copying)", re.IGNORECASE)
_TEXTS: Final = {  # what a licence's own text says in its first lines -> its name on the Hub
    r"apache license,?\s+version 2\.0": "apache-2.0",
    r"\bmit license\b|^permission is hereby granted, free of charge": "mit",
    r"creativeml open rail\+\+-m": "openrail++",
    r"creativeml open rail-m": "creativeml-openrail-m",
    r"open rail-ms": "openrail",
    r"redistributions in binary form[\s\S]*neither the name": "bsd-3-clause",
    r"gnu affero general public license\s+version 3": "agpl-3.0",
    r"gnu general public license\s+version 3": "gpl-3.0",
}
KNOWN: Final = frozenset(_TEXTS.values()) | {
    "bsd-2-clause", "cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-sa-4.0",
    "lgpl-3.0", "mpl-2.0", "other", "unlicense",
}  # fmt: skip
"""names that the Hub knows; it has more"""

_FIRST: Final = 3000  # characters of a text that are looked at


def licence_files(folder: Path) -> dict[str, Path]:
    """LICENSE*, NOTICE*, COPYING* and THIRD_PARTY* in a folder's root, whatever their case.

    By name, sorted; those that `hbxt import` found beside a checkpoint begin with `checkpoint-`.
    """
    found = [one for one in folder.iterdir() if _NAME.fullmatch(one.name) and one.is_file()]
    return {one.name: one for one in sorted(found)}


def known_licence(text: str) -> str | None:
    """The Hub's name of the licence that a text is, such as apache-2.0; None if it is another."""
    words = " ".join(text[:_FIRST].lower().split())
    return next((name for mark, name in _TEXTS.items() if re.search(mark, words)), None)


def licence_of(texts: Mapping[str, str]) -> str | None:
    """The one licence that files by name are; None if it is none, several, or one unknown here.

    A notice that is a licence's text counts like a licence, for it may restrict more than that.
    """
    known = {name: known_licence(text) for name, text in texts.items()}
    found = {one for name, one in known.items() if one is not None or _TERMS.match(name)}
    return found.pop() if len(found) == 1 else None
