"""From a recipe that distils to clips of its artifact, and a report that knows both references."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hbxt_compress import evaluation, pipeline
from hbxt_compress.artifact import Artifact
from hbxt_compress.errors import CalibrationError, SourceError, UsageError
from hbxt_compress.machine import Machine
from hbxt_compress.recipe import Recipe, load_recipe
from hbxt_compress.runtime.generate import Runtime
from hbxt_compress.source import locate
from hbxt_compress.store import Store
from hbxt_compress.suite import load_suite
from hbxt_compress.trajectories import Trajectory

_RECIPE = """
name: few
summary: two fitted steps, then four bits
calibration: tiny
distill:
  - use: solver
    n_steps: 2
    n_clips: 8
    prompts: tiny
    tune: {n_steps: 20, batch: 4, rate: 0.002, compiled: false}
rules:
  - {match: "transformer/blocks.*.ffn*", weights: int4-g32}
  - {match: "*", weights: keep, why: a test}
round: {use: gptq}
accept: {suite: tiny}
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("distil") / "store")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    path = tmp_path_factory.mktemp("recipe") / "few.yaml"
    path.write_text(_RECIPE)
    return load_recipe(str(path))


@pytest.fixture(scope="module")
def artifact(micro_wan: Path, store: Store, recipe: Recipe) -> Path:
    return pipeline.compress(recipe, str(micro_wan), store, machine=Machine())


def test_the_artifact_runs_on_the_students_sampler(artifact: Path, micro_wan: Path) -> None:
    manifest = Artifact.open(artifact).manifest
    assert manifest.sampler.solver == "fitted"
    assert manifest.sampler.n_steps == 2
    assert manifest.source["model"] == str(micro_wan)
    seen: list[tuple[int, int]] = []
    with Runtime.open(artifact) as runtime:
        runtime.generate("a red circle", check=False, progress=lambda *at: seen.append(at))
        assert seen == [(1, 2), (2, 2)]
        with pytest.raises(UsageError, match="denoises in 2"):
            runtime.generate("a red circle", n_steps=5)


def test_calibration_saw_the_students_own_steps(artifact: Path, store: Store) -> None:
    manifest = Artifact.open(artifact).manifest
    assert manifest.recipe["calibration"]["n_states"] == 2
    (folder,) = [p for p in (store.root / "calibrate").iterdir() if p.is_dir()]
    first = next(iter(sorted(folder.glob("prompt-*.safetensors"))))
    timesteps = Trajectory.load(first).timesteps_K.numpy()
    np.testing.assert_array_equal(timesteps, manifest.sampler.timesteps())


def test_the_student_is_a_whole_model_folder(store: Store, micro_wan: Path, artifact: Path) -> None:
    (folder,) = (store.root / "distill").glob("*/student")
    student, original = locate(str(folder)), locate(str(micro_wan))
    assert set(student.files) - set(original.files) == {"sampler.json"}
    assert {n: student.files[n] for n in original.files} == original.files
    measured = json.loads((folder.parent / "distilled.json").read_text())
    assert measured["held_out_error_db"] < measured["held_out_error_db_of_euler"] < 0


def test_it_is_compared_with_its_own_student_and_with_the_original(
    artifact: Path, store: Store, tmp_path: Path
) -> None:
    metrics = ("psnr", "prompt_following", "fd_content")
    suite = load_suite("tiny").model_copy(update={"metrics": metrics})
    report = evaluation.evaluate(artifact, suite, store, machine=Machine(), out=tmp_path / "report")
    found = {one.metric.split("[")[0]: one for one in report.measurements}
    assert "psnr.to_original" not in found  # another map from noise to clips
    assert report.suite["n_steps"] == 2
    own, far = found["fd_content"].value, found["fd_content.to_original"].value
    assert own is not None
    assert far is not None
    assert own < far  # a student is nearer to its own full precision


def test_nothing_is_done_twice(
    artifact: Path, store: Store, recipe: Recipe, micro_wan: Path, caplog: pytest.LogCaptureFixture
) -> None:
    states = {stage: state for stage, _, state, _ in pipeline.status(recipe, str(micro_wan), store)}
    assert states["teach"] == states["distill"] == "done"
    assert pipeline.compress(recipe, str(micro_wan), store, machine=Machine()) == artifact


def test_a_student_with_a_broken_sampler_is_refused(
    micro_wan: Path, recipe: Recipe, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    shutil.copytree(micro_wan, folder)
    (folder / "sampler.json").write_text('{"solver": "fitted", "n_steps": 2}')
    with pytest.raises(SourceError, match=r"sampler\.json.*(\n.*)*shift: missing"):
        pipeline.plan(recipe, str(folder), Store(tmp_path / "s"), machine=Machine())


def test_more_steps_than_the_model_takes_are_refused(
    recipe: Recipe, micro_wan: Path, store: Store
) -> None:
    many = recipe.distill[0].model_copy(update={"n_steps": 9})
    asked = recipe.model_copy(update={"distill": (many,)})
    with pytest.raises(CalibrationError, match="9 steps: the model itself takes 3; ask for fewer"):
        pipeline.compress(asked, str(micro_wan), store, machine=Machine())


def test_what_distilling_takes_is_foretold(recipe: Recipe, micro_wan: Path, store: Store) -> None:
    _, told = pipeline.foresee(recipe, str(micro_wan), store)
    found = {one.stage: one for one in told.stages}
    assert list(found)[1:3] == ["teach", "distill"]
    assert all(found[one].peak_rss_bytes > 0 for one in ("teach", "distill"))
    model = sum(path.stat().st_size for path in micro_wan.rglob("*.safetensors"))
    assert found["distill"].disk_bytes == pytest.approx(model, rel=0.2)


def test_a_plan_makes_no_student(
    micro_wan: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A budget is spent on what the student's layers turn out to contribute; that takes hours."""
    path = tmp_path / "spent.yaml"
    path.write_text(
        _RECIPE.replace("weights: int4-g32", "weights: [int4-g32, int8-channel]").replace(
            "round:", "budget: 6 bits\nround:"
        )
    )
    store = Store(tmp_path / "store")
    planned = pipeline.plan(load_recipe(str(path)), str(micro_wan), store, machine=Machine())
    assert not (store.root / "distill").exists()
    assert "the student is not made yet" in caplog.text
    assert len(planned.quantized) > 0


def test_lessons_that_two_distillers_share_are_foretold_once(
    micro_wan: Path, tmp_path: Path
) -> None:
    path = tmp_path / "both.yaml"
    start, end = _RECIPE.index("distill:"), _RECIPE.index("rules:")
    both = "distill: [{use: trajectory, solver: renoise}, {use: dmd}]\n"
    path.write_text(_RECIPE[:start] + both + _RECIPE[end:])
    _, told = pipeline.foresee(load_recipe(str(path)), str(micro_wan), Store(tmp_path / "store"))
    stages = [one.stage for one in told.stages]
    assert (stages.count("teach"), stages.count("distill")) == (1, 2)
