"""Suite: an evaluation to run, the same for every recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from hbxt_compress import library
from hbxt_compress.metrics import METRICS
from hbxt_compress.prompts import Name, PromptText, seed_of
from hbxt_compress.strict import Settings, did_you_mean, load

__all__ = ["MetricName", "Suite", "load_suite"]


def _known(name: str) -> str:
    if name not in METRICS:
        known = ", ".join(METRICS)
        raise ValueError(f"unknown metric {name!r}{did_you_mean(name, METRICS)}; known: {known}")
    return name


MetricName = Annotated[str, AfterValidator(_known)]


class Suite(Settings):
    """Prompts to generate from, and what to measure on the clips."""

    name: Name
    summary: str
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    n_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    """denoising steps; empty means the model's own number"""
    metrics: Annotated[tuple[MetricName, ...], Field(min_length=1)]
    prompts: Annotated[tuple[PromptText, ...], Field(min_length=1)]

    @field_validator("metrics", "prompts")
    @classmethod
    def _distinct(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ValueError(f"stands more than once: {', '.join(map(repr, twice[:5]))}")
        return values

    def items(self) -> list[tuple[str, int]]:
        """(prompt, seed of its noise) in order; a prompt's seed does not depend on its place."""
        return [(prompt, seed_of(self.seed, prompt)) for prompt in self.prompts]


def load_suite(name_or_path: str) -> Suite:
    """A suite by name or path."""
    return load(Suite, library.find("eval/suites", name_or_path))
