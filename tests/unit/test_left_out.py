"""What a model is too large for: not done, not even prepared for, and told by the manifest."""

from __future__ import annotations

from pathlib import Path

from hbxt_compress import pipeline
from hbxt_compress.algorithms.recover import Recover
from hbxt_compress.algorithms.solver import SolverRefit
from hbxt_compress.models import family_of
from hbxt_compress.plan import make_plan
from hbxt_compress.recipe import Recipe, load_recipe
from hbxt_compress.source import locate
from hbxt_compress.stages import export
from hbxt_compress.store import Store


def _recipe(name: str, largest: float) -> Recipe:
    refine = (Recover(largest=largest), SolverRefit(largest=largest))
    return load_recipe(name).model_copy(update={"refine": refine})


def test_nothing_is_calibrated_for_a_step_that_is_left_out(micro_wan: Path, tmp_path: Path) -> None:
    def first(largest: float) -> str:
        recipe = _recipe("w4a16-fast", largest)
        return pipeline.status(recipe, str(micro_wan), Store(tmp_path))[0][0]

    assert first(1e9) == "calibrate"
    assert first(1e5) == "quantize"


def test_the_manifest_has_the_steps_that_were_left_out(micro_wan: Path) -> None:
    source = locate(str(micro_wan), hashed=False)
    family = family_of(source)
    for largest, steps in ((1e9, None), (1e5, ["refine recover", "refine solver"])):
        recipe = _recipe("fp16", largest)
        plan = make_plan(recipe, family.layers(source), family.parameters(source))
        said = export._recipe_record(recipe, plan).get("left_out")
        if steps is None:
            assert said is None
            continue
        assert isinstance(said, list)
        assert [one["step"] for one in said] == steps
        assert all("over its limit of 0.1 M" in one["reason"] for one in said)
