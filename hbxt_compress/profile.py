"""Profile: how a recipe's graphs compute, and for which targets they are checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field, field_validator

from hbxt_compress.errors import PlanError
from hbxt_compress.graph.table import DEFAULT_TARGETS, known_target
from hbxt_compress.layers import matches
from hbxt_compress.strict import Settings

__all__ = ["Profile"]


class Profile(Settings):
    """The recipe's `export:`."""

    float16: Annotated[str, Field(min_length=1)] | None = None
    """components whose products, convolutions and attention are float16, as a pattern; their
    norms, sums and ends stay float32, and so does all of the others"""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = DEFAULT_TARGETS
    """on which the export must run as a whole, by the tables of runtimes"""

    @field_validator("float16")
    @classmethod
    def _pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            matches(pattern, "")
        return pattern

    @field_validator("targets")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(known_target(name) for name in names)

    def halves(self, components: Iterable[str]) -> frozenset[str]:
        """The components that the pattern names.

        Raises:
            PlanError: it names none.
        """
        if self.float16 is None:
            return frozenset()
        every = list(components)
        found = frozenset(one for one in every if matches(self.float16, one))
        if not found:
            raise PlanError(
                f"export: float16 {self.float16!r} names no component of {', '.join(every)}"
            )
        return found
