"""Configs whose numbers no model has are refused before a module is made of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hbxt_compress import pipeline
from hbxt_compress.errors import SourceError
from hbxt_compress.models import family_of
from hbxt_compress.recipe import load_recipe
from hbxt_compress.source import Source, locate
from hbxt_compress.store import Store


@pytest.fixture
def folder(micro_wan: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(micro_wan, tmp_path / "wan"))


def _with(folder: Path, name: str, **changes: Any) -> Source:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return locate(str(folder), hashed=False)


def _read_all(source: Source) -> None:
    family = family_of(source)
    family.layers(source)
    family.sampler(source)
    family.buckets(source)
    family.latent_statistics(source)
    for component in family.components(source):
        family.skeleton(source, component)
        if component in family.chained:
            family.pairs(source, component, 0)


def test_the_micro_model_is_within_all_ranges(folder: Path) -> None:
    _read_all(_with(folder, "vae/config.json"))


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("transformer/config.json", {"num_layers": 10**9}, "num_layers: 1000000000 is not"),
        ("transformer/config.json", {"num_layers": "2"}, "num_layers: '2' is not a whole number"),
        ("transformer/config.json", {"patch_size": [1, 2]}, "patch_size: .1, 2. is not a list"),
        ("transformer/config.json", {"num_attention_heads": True}, "num_attention_heads: True"),
        ("vae/config.json", {"dim_mult": []}, "describes no AutoencoderKLWan"),
        ("text_encoder/config.json", {"d_model": -1}, "d_model: -1 is not"),
        ("text_encoder/config.json", {"dropout_rate": [0.0]}, "describes no UMT5EncoderModel"),
        ("text_encoder/config.json", {"architectures": {}}, "describes None, expected UMT5"),
        ("vae/config.json", {"z_dim": 0}, "z_dim: 0 is not a whole number in 1..1024"),
        ("vae/config.json", {"latents_mean": [0.0]}, "has 1 latents_mean and 4 latents_std for 4"),
        ("vae/config.json", {"latents_std": None}, "latents_std: None is not a list"),
        ("vae/config.json", {"dim_mult": 3}, "dim_mult: 3 is not a list of  whole numbers"),
        ("vae/config.json", {"scale_factor_spatial": 0}, "scale_factor_spatial: 0 is not"),
        ("generation_config.json", {"height": 0}, "height: 0 is not"),
        ("generation_config.json", {"num_inference_steps": 1e9}, "num_inference_steps: 1000000000"),
        ("generation_config.json", {"fps": "8"}, "fps: '8' is not a number"),
        ("model_index.json", {"transformer": "WanTransformer3DModel"}, "transformer: is None"),
        ("model_index.json", {"boundary_ratio": 2}, "boundary_ratio: 2 is not a number in 0..1"),
        ("model_index.json", {"_class_name": ["WanPipeline"]}, "_class_name is .'WanPipeline'"),
        ("scheduler/scheduler_config.json", {"flow_shift": "3"}, "shift '3': must be a number"),
        ("scheduler/scheduler_config.json", {"solver_order": []}, "solver_order .* whole number"),
        (
            "scheduler/scheduler_config.json",
            {"disable_corrector": 1},
            "disable_corrector 1: must be",
        ),
    ],
)
def test_numbers_that_no_model_has_are_named(
    name: str, changes: dict[str, Any], problem: str, folder: Path
) -> None:
    source = _with(folder, name, **changes)
    with pytest.raises(SourceError, match=problem) as refused:
        _read_all(source)
    assert Path(name).name in str(refused.value)


def test_all_of_a_files_problems_are_named_at_once(folder: Path) -> None:
    source = _with(folder, "vae/config.json", z_dim="4", num_res_blocks=0)
    with pytest.raises(SourceError, match=r"z_dim: '4'(.|\n)*num_res_blocks: 0"):
        _read_all(source)


def test_a_key_that_is_needed_and_missing_is_named(folder: Path) -> None:
    path = folder / "vae" / "config.json"
    document = json.loads(path.read_text())
    del document["latents_mean"]
    path.write_text(json.dumps(document))
    with pytest.raises(SourceError, match=r"vae/config\.json: .*\n.*latents_mean: missing"):
        _read_all(locate(str(folder), hashed=False))


def test_a_size_that_the_model_cannot_take_is_refused_before_anything_is_counted(
    folder: Path, tmp_path: Path
) -> None:
    _with(folder, "generation_config.json", height=1)
    with pytest.raises(
        SourceError, match="cannot take such clips:\n  height 1: must be a multiple"
    ):
        pipeline.foresee(load_recipe("w4a16-fast"), str(folder), Store(tmp_path / "store"))
