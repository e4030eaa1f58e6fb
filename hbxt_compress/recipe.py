"""Recipe: what to do to a model. It names no model, no path and no machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

from pydantic import Field, ValidationInfo, field_validator

from hbxt_compress import library
from hbxt_compress.algorithms import AnyRounder
from hbxt_compress.errors import RecipeError
from hbxt_compress.formats import FORMATS
from hbxt_compress.layers import matches
from hbxt_compress.prompts import Name
from hbxt_compress.strict import Settings, did_you_mean, load
from hbxt_compress.suite import MetricName

if TYPE_CHECKING:
    from hbxt_compress.library import Shelf

__all__ = ["FULL_PRECISION", "Acceptance", "Recipe", "Rule", "load_recipe"]

FULL_PRECISION: Final = frozenset({"keep", "fp16", "fp32"})
"""what a rule may say without a rounder; keep = 16 bit"""


class Rule(Settings):
    """What happens to the weights that a pattern selects; the first rule that matches decides."""

    match: Annotated[str, Field(min_length=1)]
    """`*` any run of characters, `{a,b}` alternatives, over `<component>/<module path>`"""
    weights: str
    """a number format, or keep"""
    why: Annotated[str, Field(validate_default=True)] = ""

    @field_validator("match")
    @classmethod
    def _pattern(cls, match: str) -> str:
        matches(match, "")
        return match

    @field_validator("weights")
    @classmethod
    def _format(cls, weights: str) -> str:
        known = ("keep", *FORMATS)
        if weights not in known:
            meant = did_you_mean(weights, known)
            raise ValueError(f"unknown format {weights!r}{meant}; known: {', '.join(known)}")
        return weights

    @field_validator("why")
    @classmethod
    def _reason(cls, why: str, info: ValidationInfo) -> str:
        if info.data.get("weights") == "keep" and not why.strip():
            raise ValueError("missing; say why these weights stay in high precision")
        return why


class Acceptance(Settings):
    """The promise: limits on what a suite may measure, read in each metric's own direction."""

    suite: str
    limits: Annotated[dict[MetricName, float], Field(default_factory=dict)]

    @field_validator("suite")
    @classmethod
    def _suite(cls, suite: str) -> str:
        return _on_shelf("eval/suites", suite)


class Recipe(Settings):
    """Rules, how to round, what to calibrate on and what is promised."""

    name: Name
    summary: Annotated[str, Field(min_length=1)]
    calibration: str
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]
    round: Annotated[AnyRounder | None, Field(validate_default=True)] = None
    accept: Acceptance

    @field_validator("calibration")
    @classmethod
    def _calibration(cls, calibration: str) -> str:
        return _on_shelf("calibration", calibration)

    @field_validator("rules")
    @classmethod
    def _departures(cls, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        main = next((rule.weights for rule in rules if rule.weights != "keep"), "keep")
        silent = [
            i for i, r in enumerate(rules) if r.weights not in ("keep", main) and not r.why.strip()
        ]
        if silent:
            places = ", ".join(f"rules[{i}] ({rules[i].weights})" for i in silent)
            raise ValueError(f"the main format is {main}; say why these differ: {places}")
        return rules

    @field_validator("round")
    @classmethod
    def _needed(cls, value: AnyRounder | None, info: ValidationInfo) -> AnyRounder | None:
        rules: tuple[Rule, ...] = info.data.get("rules", ())
        quantizing = sorted({rule.weights for rule in rules} - FULL_PRECISION)
        if value is None and quantizing:
            raise ValueError(
                f"missing; rules ask for {', '.join(quantizing)}, so write for example {{use: rtn}}"
            )
        if value is not None and rules and not quantizing:
            raise ValueError(
                "nothing to round: no rule asks for a quantized format; remove this line"
            )
        return value


def _on_shelf(shelf: Shelf, name: str) -> str:
    """The name, or ValueError if the library lacks it; paths are looked at when they are read."""
    try:
        library.find(shelf, name)
    except RecipeError as error:
        raise ValueError(str(error)) from error
    return name


def load_recipe(name_or_path: str) -> Recipe:
    """A recipe by name or path.

    Raises:
        RecipeError: there is no such recipe, or it is not valid; all problems at once.
    """
    return load(Recipe, library.find("recipes", name_or_path))
