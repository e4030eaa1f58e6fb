"""From a recipe with `decoder: light` to an artifact that decodes with it, and its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hbxt_compress import evaluation, pipeline
from hbxt_compress.artifact import Artifact
from hbxt_compress.lightened import new_decoder
from hbxt_compress.machine import Machine
from hbxt_compress.recipe import Recipe, load_recipe
from hbxt_compress.runtime.generate import Runtime
from hbxt_compress.source import locate
from hbxt_compress.store import Store

_RECIPE = """
name: light
summary: a light decoder, then sixteen bits
calibration: tiny
decoder:
  use: light
  widths: [16, 8, 8]
  n_blocks: [1, 1, 0]
  train: {n_steps: 12, batch: 2, judge_every: 6}
  n_clips: 8
  prompts: tiny
rules:
  - {match: "*", weights: fp16}
accept: {suite: tiny}
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("light") / "store")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    path = tmp_path_factory.mktemp("recipe") / "light.yaml"
    path.write_text(_RECIPE)
    return load_recipe(str(path))


@pytest.fixture(scope="module")
def artifact(micro_wan: Path, store: Store, recipe: Recipe) -> Path:
    return pipeline.compress(recipe, str(micro_wan), store, machine=Machine())


def test_the_artifact_decodes_with_it(
    artifact: Path, store: Store, recipe: Recipe, micro_wan: Path
) -> None:
    config = json.loads((artifact / "vae_decoder" / "config.json").read_text())
    assert config["_class_name"] == "LightDecoder"
    assert Artifact.open(artifact).manifest.source["model"] == str(micro_wan)
    with Runtime.open(artifact) as runtime:
        clip = runtime.generate("a red circle", check=False)
    assert clip.frames.shape == (5, 32, 32, 3)
    states = {stage: state for stage, _, state, _ in pipeline.status(recipe, str(micro_wan), store)}
    assert states["teach"] == states["view"] == states["lighten"] == "done"
    assert pipeline.compress(recipe, str(micro_wan), store, machine=Machine()) == artifact


def test_its_sources_are_found_again(artifact: Path, store: Store, micro_wan: Path) -> None:
    manifest = Artifact.open(artifact)
    original, student = evaluation.sources_of(manifest, str(micro_wan), store, Machine())
    assert original.folder == locate(str(micro_wan)).folder
    assert set(student.files) - set(original.files) == {
        "decoder/config.json", "decoder/diffusion_pytorch_model.safetensors",
    }  # fmt: skip


def test_plan_and_prediction_know_it_before(
    recipe: Recipe, micro_wan: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "empty")
    planned, told = pipeline.foresee(recipe, str(micro_wan), store)
    decoder = new_decoder(locate(str(micro_wan)), recipe.decoder)
    assert planned.parameters["vae_decoder"] == sum(p.numel() for p in decoder.parameters())
    names = {one.spec.parameter for one in planned.layers if one.spec.component == "vae_decoder"}
    assert names == {name for name, p in decoder.named_parameters() if p.ndim >= 2}
    assert pipeline.plan(recipe, str(micro_wan), store, machine=Machine()) == planned
    stages = {one.stage: one for one in told.stages}
    assert list(stages)[1:4] == ["teach", "view", "lighten"]
    assert all(stages[one].peak_rss_bytes > 0 for one in ("teach", "view", "lighten"))
