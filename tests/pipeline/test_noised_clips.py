"""The whole program on a micro model that is calibrated on clips under noise, not on samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hbxt_compress import evaluation, pipeline, show, show_quality
from hbxt_compress.artifact import Artifact
from hbxt_compress.errors import PlanError
from hbxt_compress.machine import Machine
from hbxt_compress.recipe import Recipe, load_recipe
from hbxt_compress.stages.full_model import FullModel
from hbxt_compress.store import Store
from hbxt_compress.suite import Suite
from tests.real_clips import write_clips, write_set

_LINE = "3 noised clips (1 held out) of 48x16, 9 frames at 8 fps: 9 tokens, 2 steps each"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def tuned(folder: Path) -> Recipe:
    """Recipe tiny without its solver, on clips of another size than the model's 32x32x5."""
    write_clips(folder / "clips", n_frames=12)
    path = write_set(folder / "real.yaml", {"height": 16, "width": 48, "n_frames": 9})
    tiny = load_recipe("tiny")
    refine = tuple(one for one in tiny.refine if type(one).__name__ != "SolverRefit")
    assert len(refine) == 1
    return tiny.model_copy(update={"calibration": str(path), "refine": refine})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def artifact(tuned: Recipe, micro_wan: Path, store: Store, folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:  # nothing may be sampled
        patch.setattr(FullModel, "states", None)
        return pipeline.compress(
            tuned, str(micro_wan), store, machine=Machine(), out=folder / "artifact"
        )


def test_manifest_and_report_say_what_was_shown(
    artifact: Path, store: Store, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Artifact.open(artifact).manifest
    rounded = [layer for layer in manifest.layers if layer.format.startswith("int")]
    assert len(rounded) > 20
    by_inputs = [layer for layer in rounded if layer.name != "text_encoder/shared"]
    assert all(layer.held_out is not None and layer.held_out < 0.2 for layer in by_inputs)
    shown = manifest.recipe["calibration"]
    assert shown["text"] == _LINE
    assert [len(digest) for digest in shown["clips"]] == [64] * 3
    assert manifest.geometry.height == manifest.geometry.width == 32  # as without clips
    suite = Suite(
        name="two", summary="two", seed=1, n_steps=2, metrics=("psnr",), prompts=("a", "b")
    )
    out = folder / "report"
    report = evaluation.evaluate(artifact, suite, store, machine=Machine(), out=out)
    told = f"Calibrated on {_LINE} (set real)."
    assert told in (out / "report.html").read_text()
    assert told in (out / "report.md").read_text().replace("\\", "")
    show_quality.report(report, None, False)
    assert told in " ".join(capsys.readouterr().out.split())


def test_plan_tells_it_before_anything_is_read(
    tuned: Recipe, micro_wan: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    found = pipeline.plan(tuned, str(micro_wan), store, machine=Machine())
    show.plan(tuned, found, False)
    assert f"calibration: real, {_LINE}" in capsys.readouterr().out
    show.plan(tuned, found, True)
    assert json.loads(capsys.readouterr().out)["calibration"]["n_tokens"] == 9
    own = tuned.model_copy(update={"calibration": "tiny"})
    show.plan(own, pipeline.plan(own, str(micro_wan), store, machine=Machine()), False)
    line = (
        "calibration: tiny, 3 own trajectories (1 held out) of 32x32, 5 frames at 8 fps: 8 tokens"
    )
    assert line in capsys.readouterr().out
    fast = load_recipe("w4a16-fast")
    show.plan(fast, pipeline.plan(fast, str(micro_wan), store, machine=Machine()), False)
    assert "calibration: none is needed" in capsys.readouterr().out


def test_a_moved_folder_is_found_and_a_solver_refused(
    artifact: Path, tuned: Recipe, micro_wan: Path, store: Store, folder: Path
) -> None:
    assert artifact.exists()
    shutil.copytree(folder, folder.with_name("moved"))
    moved = str(folder.with_name("moved") / "real.yaml")
    again = tuned.model_copy(update={"calibration": moved})
    done = [(s, state) for s, _, state, _ in pipeline.status(again, str(micro_wan), store)]
    # the recipe's own text names the folder, and an artifact carries its recipe
    stages = ("noise_clips", "quantize", "refine")
    assert done == [*((stage, "done") for stage in stages), ("export", "missing")]
    solver = load_recipe("tiny").model_copy(update={"calibration": moved})
    for run in (pipeline.plan, pipeline.compress):
        with pytest.raises(PlanError, match="`use: solver`"):
            run(solver, str(micro_wan), store, machine=Machine())


def test_the_states_are_filed_once_for_every_recipe(
    artifact: Path, tuned: Recipe, micro_wan: Path, store: Store
) -> None:
    assert artifact.exists()
    other = tuned.model_copy(update={"refine": ()})
    seen = pipeline.status(other, str(micro_wan), store)
    assert [(stage, state) for stage, _, state, _ in seen][:2] == [
        ("noise_clips", "done"),
        ("quantize", "done"),
    ]
