"""The tables that the bench writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["markdown_table"]


def markdown_table(
    titles: Sequence[str], rows: Iterable[Sequence[str]], *, n_words: int = 2
) -> list[str]:
    """The lines of a Markdown table; the first n_words columns are words, the others numbers."""
    rule = ["---"] * n_words + ["--:"] * (len(titles) - n_words)
    cells = [titles, rule, *([one.replace("|", "/") for one in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in cells]
