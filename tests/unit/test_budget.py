"""Budgets: never overspent, spent best, explained, and refused in words that help."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest

from hbxt_compress.algorithms.rtn import Rtn
from hbxt_compress.errors import PlanError, RecipeError
from hbxt_compress.formats import FORMATS
from hbxt_compress.layers import LayerName, LayerSpec
from hbxt_compress.plan import Plan, make_plan, open_choices
from hbxt_compress.recipe import Acceptance, Recipe, Rule, load_recipe

_OFFERED = ("int4-g128", "int4-g64", "int4-g32", "int8-channel", "keep")
_FORMATS = (*_OFFERED[:-1], "fp16")
_SHAPES = [(64, 256), (128, 128), (256, 384), (32, 512), (96, 128)]


def _spec(name: str, *shape: int) -> LayerSpec:
    return LayerSpec(name=LayerName(name), kind="linear", shape=shape, dtype="F16", block=None)


_SPECS = [_spec(f"transformer/blocks.{i}.ffn", *shape) for i, shape in enumerate(_SHAPES)]
_FIXED = _spec("transformer/proj_out", 48, 256)
_OTHERS = 1000  # parameters that no rule can select
_COUNTS = {
    "transformer": sum(spec.n_weights for spec in [*_SPECS, _FIXED]) + _OTHERS,
    "vae_decoder": 500,
}
_FIXED_BYTES = 2 * _FIXED.n_weights + 4 * (_OTHERS + 500)
_N_OPEN = sum(spec.n_weights for spec in _SPECS)


def _recipe(budget: str | None, offered: tuple[str, ...] = _OFFERED) -> Recipe:
    return Recipe(
        name="r",
        summary="s",
        calibration="tiny",
        rules=(
            Rule(match="*/blocks.*", weights=offered),
            Rule(match="*", weights="keep", why="few"),
        ),
        budget=budget,
        round=Rtn(),
        accept=Acceptance(suite="tiny"),
    )


def _damages(seed: int) -> dict[LayerName, dict[str, float]]:
    """Falling with bytes, each layer in its own measure."""
    rng = random.Random(seed)
    found = {}
    for spec in _SPECS:
        size = 10 ** rng.uniform(-4, 0)
        factors = sorted((rng.uniform(0.001, 1) for _ in range(4)), reverse=True)
        row = {name: size * f for name, f in zip(_FORMATS, factors, strict=False)}
        found[spec.name] = {**row, "fp16": 0.0}
    return found


def _plan(budget: str, damages: dict[LayerName, dict[str, float]]) -> Plan:
    return make_plan(_recipe(budget), [*_SPECS, _FIXED], _COUNTS, damages)


def _open_bytes(plan: Plan) -> int:
    return sum(layer.bytes_after for layer in plan.layers if layer.spec.name != _FIXED.name)


def _whole(plan: Plan) -> int:
    return sum(sizes["after"] for sizes in plan.components().values())


def _least(damages: dict[LayerName, dict[str, float]], budget: float) -> float:
    """By trying all 5^5 plans."""
    best = math.inf
    for names in itertools.product(_FORMATS, repeat=len(_SPECS)):
        chosen = list(zip(_SPECS, names, strict=True))
        if sum(FORMATS[name].bytes(spec.shape) for spec, name in chosen) <= budget:
            best = min(best, math.fsum(damages[spec.name][name] for spec, name in chosen))
    return best


@pytest.mark.parametrize("bits", [4.2, 4.6, 5.5, 8.3, 12.0])
@pytest.mark.parametrize("seed", range(3))
def test_bits_are_spent_as_well_as_they_can_be(bits: float, seed: int) -> None:
    damages = _damages(seed)
    plan = _plan(f"{bits} bits", damages)
    budget = bits * _N_OPEN / 8
    assert _open_bytes(plan) <= budget
    done = math.fsum(damages[layer.spec.name][layer.weights] for layer in plan.layers[:-1])
    assert done == pytest.approx(_least(damages, budget), rel=1e-12)


@pytest.mark.parametrize("kilobytes", [130.5, 160.0, 200.25, 300.0, 500.0])
def test_a_size_is_that_of_everything_in_the_artifact(kilobytes: float) -> None:
    damages = _damages(7)
    plan = _plan(f"{kilobytes} kB", damages)
    assert _whole(plan) <= kilobytes * 1000
    assert _whole(plan) == _open_bytes(plan) + _FIXED_BYTES
    done = math.fsum(damages[layer.spec.name][layer.weights] for layer in plan.layers[:-1])
    assert done == pytest.approx(_least(damages, kilobytes * 1000 - _FIXED_BYTES), rel=1e-12)
    assert done > 0 or kilobytes == 500.0


def test_a_budget_for_everything_changes_nothing() -> None:
    plan = _plan("16 bits", _damages(0))
    assert {layer.weights for layer in plan.layers} == {"fp16"}
    assert not plan.quantized


def test_a_layer_that_hurts_gets_the_bytes_and_the_plan_says_why() -> None:
    damages = {spec.name: {n: 0.001 / (1 + i) for i, n in enumerate(_FORMATS)} for spec in _SPECS}
    precious = _SPECS[2].name
    damages[precious] = {name: 1000 * value for name, value in damages[precious].items()}
    plan = _plan("6.6 bits", damages)  # all but a little more than the others' least
    by_name = {layer.spec.name: layer for layer in plan.layers}
    assert by_name[precious].weights == "int8-channel"
    others = [layer for name, layer in by_name.items() if name not in (precious, _FIXED.name)]
    assert {layer.weights for layer in others} <= {"int4-g128", "int4-g64"}
    for layer in [*others, by_name[precious]]:
        assert layer.reason.startswith("budget: ")
        assert "bytes more and save" in layer.reason
    assert by_name[_FIXED.name].reason == "few"
    assert by_name[precious].how == Rtn()


def test_what_does_not_fit_a_layer_is_not_offered_to_it() -> None:
    odd = [_spec("transformer/blocks.8.a", 8, 192), _spec("transformer/blocks.9.a", 8, 36)]
    found = open_choices(_recipe("6 bits"), [*_SPECS, *odd, _FIXED])
    assert [choice.spec.name for choice in found] == [
        *(spec.name for spec in _SPECS),
        *(spec.name for spec in odd),
    ]
    assert found[0].formats == _FORMATS
    assert found[-2].formats == ("int4-g64", "int4-g32", "int8-channel", "fp16")
    assert found[-1].formats == ("int8-channel", "fp16")
    single = open_choices(_recipe("6 bits", _OFFERED[:4]), [*_SPECS, *odd, _FIXED])
    assert odd[1].name not in {choice.spec.name for choice in single}


def test_a_layer_with_one_format_left_is_charged_but_not_asked_about() -> None:
    """Its only format is no choice, so nobody measured it, and its bytes are still spent."""
    odd = _spec("transformer/blocks.9.a", 8, 36)
    counts = {**_COUNTS, "transformer": _COUNTS["transformer"] + odd.n_weights}
    recipe = _recipe("140 kB", _OFFERED[:4])
    plan = make_plan(recipe, [*_SPECS, odd, _FIXED], counts, _damages(1))
    assert {layer.spec.name: layer.weights for layer in plan.layers}[odd.name] == "int8-channel"
    assert _whole(plan) <= 140_000


def test_too_small_a_budget_names_the_smallest_possible_size() -> None:
    smallest = sum(FORMATS["int4-g128"].bytes(spec.shape) for spec in _SPECS)
    with pytest.raises(PlanError, match=f"too small.* 5 weights.* {smallest} bytes"):
        _plan("4.1 bits", _damages(0))
    with pytest.raises(PlanError, match=f"too small.* {smallest} bytes"):
        _plan("0.1 MB", _damages(0))
    enough = (smallest + _FIXED_BYTES) / 1000
    assert _whole(_plan(f"{enough:.3f} kB", _damages(0))) == smallest + _FIXED_BYTES
    with pytest.raises(PlanError, match="too small"):
        _plan(f"{enough - 0.001:.3f} kB", _damages(0))


def test_a_budget_without_damages_is_refused() -> None:
    with pytest.raises(PlanError, match="measure the layers' damages"):
        make_plan(_recipe("5 bits"), [*_SPECS, _FIXED], _COUNTS)


_YAML = """\
name: mine
summary: s
calibration: tiny
budget: 4.5 bits
rules:
  - {match: "a/*", weights: [int4-g128, int8-channel]}
  - {match: "*", weights: keep, why: rest}
round: {use: rtn}
accept: {suite: tiny}
"""


def test_a_budget_is_read_with_its_choices(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(_YAML)
    recipe = load_recipe(str(path))
    assert recipe.rules[0].choices == ("int4-g128", "int8-channel")
    assert recipe.budget_bytes(1000, 7) == 562
    path.write_text(_YAML.replace("4.5 bits", "5.5 MB"))
    assert load_recipe(str(path)).budget_bytes(1000, 7) == 5_500_000 - 7


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("budget: 4.5 bits\n", "", ":1: budget: missing; a rule offers several formats"),
        ("[int4-g128, int8-channel]", "int4-g128", ":4: budget: nothing to decide: no rule"),
        ("4.5 bits", "4.5bits", ":4: budget: '4.5bits' does not match"),
        ("4.5 bits", "-1 MB", ":4: budget: '-1 MB' does not match"),
        ("4.5 bits", "4.5", ":4: budget: must be text, not 4.5"),
        ("int8-channel]", "int9]", ":6: rules[0].weights: unknown format 'int9'"),
    ],
)
def test_a_mistake_is_named_with_its_line(
    tmp_path: Path, old: str, new: str, expected: str
) -> None:
    assert old in _YAML
    path = tmp_path / "mine.yaml"
    path.write_text(_YAML.replace(old, new))
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    lines = str(caught.value).splitlines()
    assert len(lines) == 1, lines
    assert lines[0].removeprefix(str(path)).startswith(expected)
