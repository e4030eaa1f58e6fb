"""Suite: an evaluation to run, the same for every recipe."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import AfterValidator, Field, field_validator

from hbxt_compress import library
from hbxt_compress.errors import RecipeError
from hbxt_compress.metrics import METRICS
from hbxt_compress.prompts import Name, PromptText, seed_of
from hbxt_compress.strict import Settings, did_you_mean, load

__all__ = ["DISTURBANCES", "MetricName", "Suite", "load_suite"]

DISTURBANCES: Final = ("ulp", "threads", "provider", "seed")
"""what full precision is compared with itself under; see stages/control.py"""


def _known(name: str) -> str:
    if name not in METRICS:
        known = ", ".join(METRICS)
        raise ValueError(f"unknown metric {name!r}{did_you_mean(name, METRICS)}; known: {known}")
    return name


def _control(name: str) -> str:
    if name in DISTURBANCES:
        return name
    try:
        library.find("recipes", name)
    except RecipeError as error:
        known = ", ".join(DISTURBANCES)
        raise ValueError(f"{error}; or a disturbance: {known}") from error
    return name


MetricName = Annotated[str, AfterValidator(_known)]
ControlName = Annotated[str, AfterValidator(_control)]


class Suite(Settings):
    """Prompts to generate from, and what to measure on the clips."""

    name: Name
    summary: str
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    n_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    """denoising steps; empty means the model's own number"""
    metrics: Annotated[tuple[MetricName, ...], Field(min_length=1)]
    prompts: Annotated[tuple[PromptText, ...], Field(min_length=1)]
    n_seeds: Annotated[int, Field(ge=1, le=100)] = 1
    """clips of each prompt"""
    controls: tuple[ControlName, ...] = ()
    """what is measured beside the candidate, to say how much its figures mean: full precision
    disturbed (ulp, threads, provider), with another seed, and recipes whose damage is known"""
    n_control_clips: Annotated[int, Field(ge=8)] = 16
    """of each control, or all clips of the suite if it has fewer"""

    @field_validator("metrics", "prompts", "controls")
    @classmethod
    def _distinct(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ValueError(f"stands more than once: {', '.join(map(repr, twice[:5]))}")
        return values

    def items(self) -> list[tuple[str, int]]:
        """(prompt, seed of its noise) of every clip; a seed does not depend on a prompt's place."""
        return [
            (prompt, seed_of(self.seed, f"{k}:{prompt}" if k else prompt))
            for k in range(self.n_seeds)
            for prompt in self.prompts
        ]

    def control_items(self, *, other_seeds: bool = False) -> list[tuple[str, int]]:
        """(prompt, seed) of every clip of a control, the first ones of the suite."""
        asked = self.items()[: self.n_control_clips]
        if not other_seeds:
            return asked
        return [(prompt, seed_of(self.seed, f"other:{prompt}:{seed}")) for prompt, seed in asked]


def load_suite(name_or_path: str) -> Suite:
    """A suite by name or path."""
    return load(Suite, library.find("eval/suites", name_or_path))
