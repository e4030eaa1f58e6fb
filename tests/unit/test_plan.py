"""Plans: first rule wins, nothing is left unsaid, every problem at once."""

from __future__ import annotations

import pytest

from hbxt_compress.algorithms.recover import Recover
from hbxt_compress.algorithms.smooth_quant import SmoothQuant
from hbxt_compress.algorithms.solver import SolverRefit
from hbxt_compress.errors import PlanError
from hbxt_compress.formats import FORMATS
from hbxt_compress.geometry import Geometry
from hbxt_compress.layers import LayerName, LayerSpec, matches
from hbxt_compress.plan import Shown, make_plan, require_own_trajectories
from hbxt_compress.recipe import Acceptance, Recipe, Rule


def _spec(name: str, *shape: int, kind: str = "linear") -> LayerSpec:
    return LayerSpec(name=LayerName(name), kind=kind, shape=shape, dtype="F16", block=None)  # type: ignore[arg-type]


def _recipe(*rules: Rule) -> Recipe:
    from hbxt_compress.algorithms.rtn import Rtn

    accept = Acceptance(suite="tiny")
    return Recipe(
        name="r", summary="s", calibration="tiny", rules=rules, round=Rtn(), accept=accept
    )


_SPECS = [_spec("transformer/blocks.0.ffn", 128, 256), _spec("transformer/proj_out", 48, 256)]
_COUNTS = {"transformer": 128 * 256 + 48 * 256 + 100}


def test_the_first_rule_that_matches_decides() -> None:
    plan = make_plan(
        _recipe(
            Rule(match="transformer/blocks.*", weights="int4-g64"),
            Rule(match="*", weights="keep", why="w"),
        ),
        _SPECS,
        _COUNTS,
    )
    assert [layer.weights for layer in plan.layers] == ["int4-g64", "fp16"]
    assert [layer.rule for layer in plan.layers] == [0, 1]
    assert plan.layers[1].reason == "w"


def test_bytes_count_layers_by_format_and_the_rest_in_float32() -> None:
    plan = make_plan(
        _recipe(
            Rule(match="transformer/blocks.*", weights="int4-g64"),
            Rule(match="*", weights="keep", why="w"),
        ),
        _SPECS,
        _COUNTS,
    )
    after = 128 * 256 // 2 + 128 * (256 // 64) * 2 + 48 * 256 * 2 + 100 * 4
    assert plan.components() == {
        "transformer": {"before": 2 * sum(_COUNTS.values()), "after": after}
    }
    assert FORMATS["int4-g64"].bytes((128, 256)) == 128 * 256 // 2 + 128 * 4 * 2


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(
            _recipe(
                Rule(match="transformer/blocks.*", weights="int4-g128"),
                Rule(match="transfromer/*", weights="int8-channel", why="x"),
            ),
            [
                _spec("transformer/blocks.0.a", 8, 192),
                _spec("transformer/blocks.1.a", 8, 192),
                _SPECS[1],
            ],
            _COUNTS,
        )  # fmt: skip
    text = str(caught.value)
    assert "transformer/blocks.0.a [8, 192]" in text
    assert "transformer/blocks.1.a [8, 192]" in text
    assert "int4-g64" in text
    assert "rules[1] `transfromer/*`: matches none of the model's 3 weights" in text
    assert "transformer/proj_out: no rule selects it" in text


def test_a_convolution_cannot_take_int4() -> None:
    with pytest.raises(PlanError, match="conv3d"):
        make_plan(
            _recipe(Rule(match="*", weights="int4-g32")),
            [_spec("vae_decoder/c", 8, 32, 3, 3, 3, kind="conv3d")],
            {},
        )


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*", "a/b.c", True),
        ("{a,b}/*.x", "b/y.z.x", True),
        ("{a,b}/*.x", "c/y.x", False),
        ("a/b.c", "a/bxc", False),
        ("a/{p.{q,r},s}", "a/p.r", True),
    ],
)
def test_patterns(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_an_unclosed_brace_is_an_error() -> None:
    with pytest.raises(ValueError, match="never closed"):
        matches("a/{b", "a/b")


def test_preparers_are_given_what_they_ask_for_whatever_rounds_the_layer() -> None:
    rules = (
        Rule(match="transformer/blocks.*", weights="int8-channel", activations="int8-token"),
        Rule(match="transformer/conv", weights="int8-channel"),
        Rule(match="*", weights="keep", why="w"),
    )
    specs = [*_SPECS, _spec("transformer/conv", 8, 4, 3, 3, kind="conv2d")]
    plain = make_plan(_recipe(*rules), specs, _COUNTS)
    assert not plain.calibrated
    recipe = _recipe(*rules).model_copy(update={"prepare": (SmoothQuant(),)})
    plan = make_plan(recipe, specs, _COUNTS)
    assert [layer.need for layer in plan.layers] == ["covariance", None, None]
    assert plan.calibrated
    # What was chosen is said elsewhere; a layer's own key stays what it was.
    assert [layer.key() for layer in plan.layers] == [layer.key() for layer in plain.layers]


def _shown(*clips: str) -> Shown:
    size = Geometry(height=32, width=64, n_frames=13, fps=16.0)
    return Shown(name="real", n=3, n_held_out=1, n_states=2, size=size, n_tokens=32, clips=clips)


def test_what_calibration_shows_is_told_in_a_line() -> None:
    size = "of 64x32, 13 frames at 16 fps: 32 tokens, 2 steps each"
    assert _shown("a", "b", "c").text == f"3 noised clips (1 held out) {size}"
    assert _shown().text == f"3 own trajectories (1 held out) {size}"
    assert _shown("a").to_json()["clips"] == ["a"]


def test_a_solver_is_not_fitted_to_noised_clips() -> None:
    keep = Rule(match="*", weights="int4-g64")
    tuned = _recipe(keep).model_copy(update={"refine": (Recover(),)})
    fitted = _recipe(keep).model_copy(update={"refine": (Recover(), SolverRefit())})
    for recipe, shown in ((tuned, _shown("a")), (fitted, _shown()), (_recipe(keep), _shown("a"))):
        require_own_trajectories(recipe, shown, recipe.refine)
    with pytest.raises(PlanError, match=r"refine has `use: solver`.*real shows 3 noised clips"):
        require_own_trajectories(fitted, _shown("a"), fitted.refine)


def test_what_a_model_is_too_large_for_is_left_out_and_said() -> None:
    specs = [
        LayerSpec(name=LayerName(name), kind="linear", shape=(128, 256), dtype="F16", block=block)
        for name, block in (
            ("text_encoder/b.0", 0),
            ("transformer/b.0", 0),
            ("vae_decoder/c", None),
        )
    ]
    counts = {"text_encoder": 5_681_000_000, "transformer": 4_999_000_000, "vae_decoder": 10**12}
    refine = (Recover(largest=5.0e9), SolverRefit(), SolverRefit(largest=6.0e9))
    rule = Rule(match="*", weights="int4-g64")
    recipe = _recipe(rule).model_copy(update={"refine": refine})
    plan = make_plan(recipe, specs, counts)
    assert plan.refine == refine[2:]
    assert [one.step for one in plan.left_out] == ["refine recover", "refine solver"]
    assert plan.left_out[0].reason == (
        "text_encoder has 5.7 B parameters, over its limit of 5.0 B (it holds a whole component in "
        "float32: 23 GB)"
    )
    assert "text_encoder has 5.7 B, transformer has 5.0 B parameters" in plan.left_out[1].reason
    assert plan.to_json()["left_out"] == [
        {"step": one.step, "reason": one.reason} for one in plan.left_out
    ]
    small = make_plan(recipe, specs, dict.fromkeys(counts, 10**9))
    assert small.refine == refine
    assert small.left_out == ()


def test_a_pattern_that_would_take_years_is_refused() -> None:
    assert matches("*" * 500 + "a", "x" * 60 + "a")
    with pytest.raises(ValueError, match="has 20 stars and 40 characters, at most 5"):
        matches("*a" * 20, "a" * 60)
    with pytest.raises(ValueError, match="characters"):
        matches("a" * 2000, "a")
