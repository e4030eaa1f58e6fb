"""Recipe: what to do to a model. It names no model, no path and no machine."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from hbxt_compress import library
from hbxt_compress.algorithms import AnyDecoder, AnyDistiller, AnyPreparer, AnyRefiner, AnyRounder
from hbxt_compress.errors import ArtifactError, RecipeError
from hbxt_compress.formats import FORMATS
from hbxt_compress.formats.activations import ACTIVATIONS
from hbxt_compress.layers import matches
from hbxt_compress.profile import Profile
from hbxt_compress.prompts import Name
from hbxt_compress.strict import Settings, did_you_mean, load
from hbxt_compress.suite import MetricName

if TYPE_CHECKING:
    from hbxt_compress.library import Shelf

__all__ = ["FULL_PRECISION", "Acceptance", "Recipe", "Rule", "distillers", "load_recipe"]

FULL_PRECISION: Final = frozenset({"keep", "fp16", "fp32"})
"""what a rule may say without a rounder; keep = 16 bit"""


WEIGHTS_OF_ACTIVATIONS = "int8-channel"
_BUDGET = re.compile(r"^(?P<amount>\d+(\.\d+)?) (?P<unit>bits|kB|MB|GB)$")
_BYTES = {"kB": 10**3, "MB": 10**6, "GB": 10**9}


class Rule(Settings):
    """What happens to the weights that a pattern selects; the first rule that matches decides."""

    match: Annotated[str, Field(min_length=1)]
    """`*` any run of characters, `{a,b}` alternatives, over `<component>/<module path>`"""
    weights: str | Annotated[tuple[str, ...], Field(min_length=2)]
    """a number format, or keep; or several formats, among which the recipe's budget decides"""
    activations: str = "keep"
    """what the layer's input is stored as while the model runs, or keep"""
    why: Annotated[str, Field(validate_default=True)] = ""
    round: AnyRounder | None = None
    """how these weights are rounded, if not as the rest of the recipe says"""

    @field_validator("match")
    @classmethod
    def _pattern(cls, match: str) -> str:
        matches(match, "")
        return match

    @field_validator("weights")
    @classmethod
    def _format(cls, weights: str | tuple[str, ...]) -> str | tuple[str, ...]:
        known = ("keep", *FORMATS)
        for one in (weights,) if isinstance(weights, str) else weights:
            if one not in known:
                meant = did_you_mean(one, known)
                raise ValueError(f"unknown format {one!r}{meant}; known: {', '.join(known)}")
        return weights

    @field_validator("activations")
    @classmethod
    def _activations(cls, activations: str, info: ValidationInfo) -> str:
        known = ("keep", *ACTIVATIONS)
        if activations not in known:
            meant = did_you_mean(activations, known)
            raise ValueError(
                f"unknown activation format {activations!r}{meant}; known: {', '.join(known)}"
            )
        weights = info.data.get("weights")
        if activations != "keep" and weights != WEIGHTS_OF_ACTIVATIONS:
            raise ValueError(
                f"{activations} inputs are multiplied with {WEIGHTS_OF_ACTIVATIONS} weights, not "
                f"{weights}"
            )
        return activations

    @field_validator("why")
    @classmethod
    def _reason(cls, why: str, info: ValidationInfo) -> str:
        if info.data.get("weights") == "keep" and not why.strip():
            raise ValueError("missing; say why these weights stay in high precision")
        return why

    @property
    def choices(self) -> tuple[str, ...]:
        """The formats in question, one or several; keep is one of them."""
        return (self.weights,) if isinstance(self.weights, str) else self.weights


class Acceptance(Settings):
    """The promise: limits on what a suite may measure, read in each metric's own direction."""

    suite: str
    limits: Annotated[dict[MetricName, float], Field(default_factory=dict)]

    @field_validator("suite")
    @classmethod
    def _suite(cls, suite: str) -> str:
        return _on_shelf("eval/suites", suite)


class _Distilling(Settings):
    """The part of a recipe that makes the student."""

    distill: tuple[AnyDistiller, ...] = ()
    decoder: AnyDecoder | None = None


class Recipe(Settings):
    """Rules, how to round, what to calibrate on and what is promised."""

    name: Name
    summary: Annotated[str, Field(min_length=1)]
    calibration: str
    distill: tuple[AnyDistiller, ...] = ()
    """what makes a student of the model first, in this order; all that follows is done to it"""
    decoder: AnyDecoder | None = None
    """what is trained in the place of the VAE's decoder, `light` or a mapping; none keeps that"""
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]
    budget: Annotated[str | None, Field(pattern=_BUDGET.pattern, validate_default=True)] = None
    """`4.25 bits` a weight that has a choice of formats, or `5.5 MB` for the whole artifact"""
    prepare: tuple[AnyPreparer, ...] = ()
    """rewrites that make weights easier to round, tried on every layer"""
    round: Annotated[AnyRounder | None, Field(validate_default=True)] = None
    refine: tuple[AnyRefiner, ...] = ()
    """how what is not a code is tuned afterwards, in this order"""
    export: Annotated[Profile, Field(default_factory=Profile)]
    """how the graphs compute, and on which targets they must run"""
    accept: Acceptance

    @classmethod
    def from_manifest(cls, record: Mapping[str, object]) -> Recipe:
        """The recipe that an artifact was made by, as its manifest has it."""
        return cls.model_validate_json(json.dumps(record["document"]))

    @field_validator("decoder", mode="before")
    @classmethod
    def _by_name(cls, decoder: object) -> object:
        return {"use": decoder} if isinstance(decoder, str) else decoder

    @field_validator("calibration")
    @classmethod
    def _calibration(cls, calibration: str) -> str:
        return _on_shelf("calibration", calibration)

    @field_validator("rules")
    @classmethod
    def _departures(cls, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        main = next((rule.choices for rule in rules if rule.weights != "keep"), ("keep",))
        silent = [
            i
            for i, r in enumerate(rules)
            if r.choices not in (("keep",), main) and not r.why.strip()
        ]
        if silent:
            places = ", ".join(f"rules[{i}] ({', '.join(rules[i].choices)})" for i in silent)
            raise ValueError(
                f"the main format is {', '.join(main)}; say why these differ: {places}"
            )
        return rules

    @field_validator("budget")
    @classmethod
    def _spendable(cls, budget: str | None, info: ValidationInfo) -> str | None:
        rules: tuple[Rule, ...] = info.data.get("rules", ())
        chosen = any(len(rule.choices) > 1 for rule in rules)
        if rules and chosen and budget is None:
            raise ValueError("missing; a rule offers several formats, so write `4.25 bits`")
        if rules and budget is not None and not chosen:
            raise ValueError("nothing to decide: no rule offers several formats; remove this line")
        return budget

    @field_validator("round")
    @classmethod
    def _needed(cls, value: AnyRounder | None, info: ValidationInfo) -> AnyRounder | None:
        rules: tuple[Rule, ...] = info.data.get("rules", ())
        quantizing = sorted({one for rule in rules for one in rule.choices} - FULL_PRECISION)
        if value is None and quantizing:
            raise ValueError(
                f"missing; rules ask for {', '.join(quantizing)}, so write for example {{use: rtn}}"
            )
        if value is not None and rules and not quantizing:
            raise ValueError(
                "nothing to round: no rule asks for a quantized format; remove this line"
            )
        return value

    def budget_bytes(self, n_weights: int, fixed_bytes: int) -> int:
        """Bytes for the weights that have a choice of formats.

        n_weights: how many they are. fixed_bytes: what the rest of the artifact weighs.
        """
        found = _BUDGET.fullmatch(self.budget or "")
        if found is None:
            raise ValueError("this recipe has no budget")
        if found["unit"] == "bits":
            return int(float(found["amount"]) * n_weights / 8)
        return int(float(found["amount"]) * _BYTES[found["unit"]]) - fixed_bytes


def distillers(
    document: Mapping[str, Any],
) -> tuple[tuple[AnyDistiller, ...], AnyDecoder | None]:
    """How the student of a recipe, and its decoder, are made.

    document: the recipe as JSON that a manifest holds. Raises ArtifactError if it is not that.
    """
    names = ("distill", "decoder")
    text = json.dumps({name: document[name] for name in names if name in document})
    try:
        found = _Distilling.model_validate_json(text)
    except ValidationError as error:
        where = ", ".join(".".join(map(str, one["loc"])) or "all" for one in error.errors())
        raise ArtifactError(
            f"recipe.document: {where}: not as this version of hbxt_compress writes it"
        ) from None
    return found.distill, found.decoder


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
