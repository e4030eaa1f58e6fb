"""Plan: what a recipe will do to every weight of a model, decided from file headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from hbxt_compress.algorithms import REFINERS, SAMPLER_REFINERS, AnyRefiner, AnyRounder
from hbxt_compress.allocation import Option, allocate
from hbxt_compress.errors import PlanError, listing
from hbxt_compress.formats import FORMATS
from hbxt_compress.formats.activations import ACTIVATIONS
from hbxt_compress.geometry import Geometry
from hbxt_compress.layers import LayerName, LayerSpec, matches
from hbxt_compress.recipe import Recipe
from hbxt_compress.stats import Need
from hbxt_compress.store import canonical

__all__ = [
    "FULL_PRECISION",
    "KEEP",
    "Choice",
    "LayerPlan",
    "LeftOut",
    "Plan",
    "Shown",
    "assumed_plan",
    "make_plan",
    "open_choices",
    "refiners_for",
    "require_own_trajectories",
]

KEEP = "fp16"
FULL_PRECISION = frozenset({"fp16", "fp32"})
_BYTES_BEFORE = 2  # the published checkpoints are 16 bit
_BYTES_OTHER = 4  # biases, norms and modulation tables stay float32
_BYTES_HELD = 4  # float32, while a component is tuned


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A weight that a budget decides about, and the formats it may take."""

    spec: LayerSpec
    formats: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One weight's fate.

    weights: a format's name; activations: what its input is stored as, or keep; how: what rounds
    it, None in full precision; prepared: whether the recipe's preparers look at it; rule: index of
    the deciding rule.
    """

    spec: LayerSpec
    weights: str
    activations: str
    how: AnyRounder | None
    prepared: bool = False
    rule: int
    reason: str

    @property
    def stored(self) -> str:
        """Its format in words, with that of its input where that is rounded."""
        return (
            self.weights if self.activations == "keep" else f"{self.weights} x {self.activations}"
        )

    @property
    def need(self) -> Need | None:
        """What must be known of the layer's inputs, by its algorithms or to round them."""
        rounder = None if self.how is None else self.how.need
        if self.prepared or rounder == "covariance":
            return "covariance"
        static = self.activations != "keep" and ACTIVATIONS[self.activations].calibrated
        return "moments" if static else rounder

    def key(self) -> object:
        """What stands for this fate in a result's key: not why it was chosen."""
        return [canonical(self.spec), self.weights, self.activations, canonical(self.how)]

    @property
    def quantized(self) -> bool:
        return self.weights not in FULL_PRECISION

    @property
    def bytes_before(self) -> int:
        return _BYTES_BEFORE * self.spec.n_weights

    @property
    def bytes_after(self) -> int:
        n_bytes = FORMATS[self.weights].bytes(self.spec.shape)
        if self.activations != "keep":
            n_bytes += ACTIVATIONS[self.activations].extra_bytes(self.spec.shape)
        return n_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What calibration shows the model: states of its own trajectories or of noised clips.

    name: the prompt set's. n: prompts or clips, n_held_out of them to choose with. n_states:
    observed steps of each. n_tokens: of the transformer, for one state. clips: sha256 of each
    clip's file; () for own trajectories.
    """

    name: str
    n: int
    n_held_out: int
    n_states: int
    size: Geometry
    n_tokens: int
    clips: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Which of the two, how many and of what size, in a line."""
        what = f"{self.n} noised clips" if self.clips else f"{self.n} own trajectories"
        size = self.size
        return (
            f"{what} ({self.n_held_out} held out) of {size.width}x{size.height}, {size.n_frames} "
            f"frames at {size.fps:g} fps: {self.n_tokens} tokens, {self.n_states} steps each"
        )

    def to_json(self) -> dict[str, object]:
        """Plain JSON values, as the manifest has them."""
        return {**asdict(self), "clips": list(self.clips), "text": self.text}


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A step of the recipe, as `refine recover`, that is not taken with this model, and why."""

    step: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every weight's fate, and what follows.

    parameters: all parameters by component, so that what no rule can select (biases, norms) is
    counted too. precision: bits of every layer that is not quantized. half: components that compute
    in float16, see hbxt_compress.profile. shown: what calibration
    shows the model, None if nothing needs it. refine: the recipe's refiners but for those in
    left_out.
    """

    layers: tuple[LayerPlan, ...]
    parameters: Mapping[str, int]
    precision: Literal[16, 32]
    half: frozenset[str] = frozenset()
    shown: Shown | None = None
    refine: tuple[AnyRefiner, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.quantized)

    @property
    def calibrated(self) -> bool:
        """Whether an algorithm wants to know what the layers are given."""
        return any(layer.need is not None for layer in self.layers)

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
            "float16": sorted(self.half),
            "calibration": None if self.shown is None else self.shown.to_json(),
            "left_out": [{"step": one.step, "reason": one.reason} for one in self.left_out],
            "layers": [
                {
                    "name": layer.spec.name,
                    "kind": layer.spec.kind,
                    "shape": list(layer.spec.shape),
                    "weights": layer.weights,
                    "activations": layer.activations,
                    "rule": layer.rule,
                    "reason": layer.reason,
                    "bytes_before": layer.bytes_before,
                    "bytes_after": layer.bytes_after,
                }
                for layer in self.layers
            ],
        }


def require_own_trajectories(recipe: Recipe, shown: Shown, refine: Sequence[AnyRefiner]) -> None:
    """Raises PlanError if a refiner needs states that the sampler went through, and has clips.

    refine: those of the recipe's refiners that are not left out.
    """
    fitted = [name for name, kind in SAMPLER_REFINERS.items()
              if any(isinstance(one, kind) for one in refine)]  # fmt: skip
    if shown.clips and fitted:
        names = ", ".join(f"`use: {name}`" for name in fitted)
        raise PlanError(
            f"recipe {recipe.name}: refine has {names}, which is fitted to the model's own "
            f"trajectories, but calibration {shown.name} shows {shown.n} noised clips; take it out "
            "of refine, or calibrate on prompts"
        )


def open_choices(recipe: Recipe, specs: Sequence[LayerSpec]) -> tuple[Choice, ...]:
    """Every weight for which the recipe offers several formats that fit, all of them named.

    Raises:
        PlanError: as `make_plan`.
    """
    fates = _fates(recipe, specs)
    return tuple(Choice(spec=s, formats=names) for s, _, names in fates if len(names) > 1)


def refiners_for(
    recipe: Recipe, specs: Sequence[LayerSpec], parameters: Mapping[str, int]
) -> tuple[tuple[AnyRefiner, ...], tuple[LeftOut, ...]]:
    """The refiners of a recipe that a model is small enough for, and the others.

    Components without blocks are not tuned, and may be of any size.
    """
    names = {kind: name for name, kind in {**REFINERS, **SAMPLER_REFINERS}.items()}
    held = dict.fromkeys(spec.component for spec in specs if spec.block is not None)
    taken, left_out = [], []
    for one in recipe.refine:
        over = {name: n for name in held if (n := parameters[name]) > one.largest}
        if not over:
            taken.append(one)
            continue
        sizes = ", ".join(f"{name} has {_count(n)}" for name, n in over.items())
        reason = (
            f"{sizes} parameters, over its limit of {_count(one.largest)} (it holds a whole "
            f"component in float32: {_BYTES_HELD * max(over.values()) / 1e9:.2g} GB)"
        )
        left_out.append(LeftOut(step=f"refine {names[type(one)]}", reason=reason))
    return tuple(taken), tuple(left_out)


def _count(n: float) -> str:
    return f"{n / 1e9:.1f} B" if n >= 0.95e8 else f"{n / 1e6:.2g} M"


def make_plan(
    recipe: Recipe,
    specs: Sequence[LayerSpec],
    parameters: Mapping[str, int],
    damages: Mapping[LayerName, Mapping[str, float]] | None = None,
) -> Plan:
    """The plan of a recipe for a model's weights. The first rule that matches decides.

    damages: for each open choice what every format costs the velocity; needed by recipes with a
    budget, which is spent where it saves most.

    Raises:
        PlanError: a rule selects nothing, a weight is selected by no rule, a weight fits none of
            its formats (all offenders at once), or the budget is too small.
    """
    fates = _fates(recipe, specs)
    decided = {spec.name: (names[0], "") for spec, _, names in fates}
    if recipe.budget is not None:
        if damages is None:
            raise PlanError(f"recipe {recipe.name} has a budget: measure the layers' damages first")
        decided |= _spend(recipe, fates, parameters, damages)
    layers = []
    for spec, index, _ in fates:
        rule = recipe.rules[index]
        weights, why = decided[spec.name]
        how = None if weights in FULL_PRECISION else rule.round or recipe.round
        layers.append(
            LayerPlan(
                spec=spec,
                weights=weights,
                activations=rule.activations,
                how=how,
                prepared=how is not None and bool(recipe.prepare) and spec.kind == "linear",
                rule=index,
                reason=why or rule.why or recipe.summary,
            )
        )
    all_32 = all(layer.weights == "fp32" for layer in layers)
    refine, left_out = refiners_for(recipe, specs, parameters)
    return Plan(
        layers=tuple(layers),
        parameters=parameters,
        precision=32 if all_32 else 16,
        half=recipe.export.halves(parameters),
        refine=refine,
        left_out=left_out,
    )


def assumed_plan(recipe: Recipe, specs: Sequence[LayerSpec], parameters: Mapping[str, int]) -> Plan:
    """The plan before anything is measured: a budget's weights in the smallest format each fits.

    Raises:
        PlanError: as `make_plan`.
    """
    if recipe.budget is None:
        return make_plan(recipe, specs, parameters)
    smallest = {
        choice.spec.name: {
            name: float(FORMATS[name].bytes(choice.spec.shape)) for name in choice.formats
        }
        for choice in open_choices(recipe, specs)
    }
    return make_plan(recipe, specs, parameters, damages=smallest)


def _fates(
    recipe: Recipe, specs: Sequence[LayerSpec]
) -> list[tuple[LayerSpec, int, tuple[str, ...]]]:
    """(weight, index of its rule, formats that fit it, at least one)."""
    problems: list[str] = []
    fates: list[tuple[LayerSpec, int, tuple[str, ...]]] = []
    seen = [False] * len(recipe.rules)
    for spec in specs:
        hits = [i for i, rule in enumerate(recipe.rules) if matches(rule.match, spec.name)]
        for i in hits:
            seen[i] = True
        if not hits:
            problems.append(f"{spec.name}: no rule selects it; end with a rule for `*`")
            continue
        rule, at = recipe.rules[hits[0]], f"(rules[{hits[0]}])"
        names = tuple(KEEP if name == "keep" else name for name in rule.choices)
        unfit = {name: FORMATS[name].fits(spec) for name in names}
        fitting = tuple(name for name in names if unfit[name] is None)
        if not fitting:
            reasons = "; ".join(str(reason) for reason in unfit.values())
            problems.append(f"{spec.name} {list(spec.shape)}: {reasons} {at}")
            continue
        if problem := _blind(spec, rule.round or recipe.round, fitting):
            problems.append(f"{spec.name}: {problem} {at}")
            continue
        fates.append((spec, hits[0], fitting))
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
    return fates


def _blind(spec: LayerSpec, how: AnyRounder | None, formats: Sequence[str]) -> str | None:
    """Why an algorithm cannot have what it asks for, or None."""
    if how is None or how.need is None or FULL_PRECISION.issuperset(formats):
        return None
    if spec.kind == "linear":
        return None
    return f"the inputs of a {spec.kind} are not observed; give its rule `round: {{use: rtn}}`"


def _spend(
    recipe: Recipe,
    fates: Sequence[tuple[LayerSpec, int, tuple[str, ...]]],
    parameters: Mapping[str, int],
    damages: Mapping[LayerName, Mapping[str, float]],
) -> dict[LayerName, tuple[str, str]]:
    """By layer with a choice: (format, why)."""
    choices = [(spec, names) for spec, _, names in fates if len(names) > 1]
    options = {
        spec.name: [
            Option(
                format=name, bytes=FORMATS[name].bytes(spec.shape), damage=damages[spec.name][name]
            )
            for name in names
        ]
        for spec, names in choices
    }
    n_weights = sum(spec.n_weights for spec, _ in choices)
    fixed = sum(FORMATS[names[0]].bytes(spec.shape) for spec, _, names in fates if len(names) == 1)
    fixed += _BYTES_OTHER * (sum(parameters.values()) - sum(spec.n_weights for spec, _, _ in fates))
    found = allocate(options, recipe.budget_bytes(n_weights, fixed))
    return {name: (option.format, found.why[name]) for name, option in found.chosen.items()}
