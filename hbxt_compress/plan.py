"""Plan: what a recipe will do to every weight of a model, decided from file headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hbxt_compress.errors import PlanError, listing
from hbxt_compress.formats import FORMATS
from hbxt_compress.layers import LayerSpec, matches
from hbxt_compress.recipe import Recipe
from hbxt_compress.stats import Need

__all__ = ["KEEP", "LayerPlan", "Plan", "make_plan"]

KEEP = "fp16"
_FULL_PRECISION = ("fp16", "fp32")
_BYTES_BEFORE = 2  # the published checkpoints are 16 bit
_BYTES_OTHER = 4  # biases, norms and modulation tables stay float32


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One weight's fate. weights: a format's name; rule: index of the deciding rule."""

    spec: LayerSpec
    weights: str
    rule: int
    reason: str

    @property
    def quantized(self) -> bool:
        return self.weights not in _FULL_PRECISION

    @property
    def bytes_before(self) -> int:
        return _BYTES_BEFORE * self.spec.n_weights

    @property
    def bytes_after(self) -> int:
        return FORMATS[self.weights].bytes(self.spec.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every weight's fate, and what calibration must gather for it.

    parameters: all parameters by component, so that what no rule can select (biases, norms) is
    counted too. precision: bits of every layer that is not quantized.
    """

    layers: tuple[LayerPlan, ...]
    needs: frozenset[Need]
    parameters: Mapping[str, int]
    precision: Literal[16, 32]

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.quantized)

    def components(self) -> dict[str, dict[str, int]]:
        """Bytes of weights by component: {"before": 16 bit, "after": planned}."""
        sizes = {}
        for name, n_parameters in self.parameters.items():
            own = [layer for layer in self.layers if layer.spec.component == name]
            other = n_parameters - sum(layer.spec.n_weights for layer in own)
            after = sum(layer.bytes_after for layer in own) + other * _BYTES_OTHER
            sizes[name] = {"before": _BYTES_BEFORE * n_parameters, "after": after}
        return sizes

    def to_json(self) -> dict[str, object]:
        return {
            "components": self.components(),
            "layers": [
                {
                    "name": layer.spec.name,
                    "kind": layer.spec.kind,
                    "shape": list(layer.spec.shape),
                    "weights": layer.weights,
                    "rule": layer.rule,
                    "reason": layer.reason,
                    "bytes_before": layer.bytes_before,
                    "bytes_after": layer.bytes_after,
                }
                for layer in self.layers
            ],
        }


def make_plan(recipe: Recipe, specs: Sequence[LayerSpec], parameters: Mapping[str, int]) -> Plan:
    """The plan of a recipe for a model's weights. The first rule that matches decides.

    Raises:
        PlanError: a rule selects nothing, a weight is selected by no rule, or a weight does not fit
            its format; all offenders at once.
    """
    problems: list[str] = []
    layers: list[LayerPlan] = []
    seen = [False] * len(recipe.rules)
    for spec in specs:
        hits = [i for i, rule in enumerate(recipe.rules) if matches(rule.match, spec.name)]
        for i in hits:
            seen[i] = True
        if not hits:
            problems.append(f"{spec.name}: no rule selects it; end with a rule for `*`")
            continue
        rule = recipe.rules[hits[0]]
        weights = KEEP if rule.weights == "keep" else rule.weights
        unfit = FORMATS[weights].fits(spec)
        if unfit is not None:
            problems.append(f"{spec.name} {list(spec.shape)}: {unfit} (rules[{hits[0]}])")
            continue
        layers.append(
            LayerPlan(spec=spec, weights=weights, rule=hits[0], reason=rule.why or recipe.summary)
        )
    for i, rule in enumerate(recipe.rules):
        if not seen[i]:
            problems.append(
                f"rules[{i}] `{rule.match}`: matches none of the model's {len(specs)} weights"
            )
    if problems:
        raise PlanError(
            f"recipe {recipe.name} does not fit this model, {len(problems)} problems:\n"
            f"{listing(problems)}"
        )
    all_32 = all(layer.weights == "fp32" for layer in layers)
    needs = recipe.round.NEEDS if recipe.round is not None else frozenset[Need]()
    return Plan(
        layers=tuple(layers), needs=needs, parameters=parameters, precision=32 if all_32 else 16
    )
