"""Sources: what is missing, damaged or of another kind is said before anything long starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hbxt_compress.errors import SourceError
from hbxt_compress.models import family_of
from hbxt_compress.source import locate, read_headers
from tests.micro import write_micro_wan


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_micro_wan(tmp_path_factory.mktemp("micro") / "wan")


@pytest.fixture
def broken(micro: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(micro, tmp_path / "wan"))


def test_layers_come_from_headers_and_equal_the_modules(micro: Path) -> None:
    source = locate(str(micro))
    family = family_of(source)
    assert family.components(source) == ("text_encoder", "transformer", "vae_decoder")
    for spec in family.layers(source):
        if spec.component == "transformer":
            module = family.load(source, "transformer").get_submodule(spec.module)
            assert tuple(module.weight.shape) == spec.shape  # type: ignore[union-attr]
    transformer = family.load(source, "transformer")
    assert family.parameters(source)["transformer"] == sum(
        p.numel() for p in transformer.parameters()
    )


def test_two_experts_are_two_components(tmp_path: Path) -> None:
    source = locate(str(write_micro_wan(tmp_path / "wan", two_experts=True, residual_vae=False)))
    family = family_of(source)
    assert family.components(source) == (
        "text_encoder",
        "transformer",
        "transformer_2",
        "vae_decoder",
    )
    assert family.sampler(source).boundary == 0.875


def test_a_missing_folder_and_an_unpinned_hub_id() -> None:
    with pytest.raises(SourceError, match="no such folder"):
        locate("./nowhere")
    with pytest.raises(SourceError, match="pin its revision"):
        locate("Wan-AI/Wan2.2-TI2V-5B-Diffusers")


def test_no_network_is_one_message() -> None:
    with pytest.raises(SourceError, match=r"could not be fetched from the Hub .*local folder"):
        locate("Wan-AI/Wan2.2-TI2V-5B-Diffusers@0123456789abcdef")


def test_a_truncated_file_names_itself(broken: Path) -> None:
    path = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        SourceError, match=r"diffusion_pytorch_model\.safetensors: has \d+ bytes where"
    ):
        read_headers(path.parent)


def test_nan_names_the_tensor(broken: Path) -> None:
    path = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["blocks.1.attn1.to_q.weight"][3, 4] = float("nan")
    save_file(tensors, path)
    source = locate(str(broken))
    with pytest.raises(SourceError, match=r"blocks\.1\.attn1\.to_q\.weight"):
        family_of(source).load(source, "transformer")


def test_another_class_is_refused(broken: Path) -> None:
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    with pytest.raises(SourceError, match="FluxPipeline"):
        family_of(locate(str(broken)))
    (broken / "model_index.json").write_text(
        json.dumps({**index, "vae": ["diffusers", "AutoencoderKL"]})
    )
    source = locate(str(broken))
    with pytest.raises(SourceError, match="AutoencoderKL, expected AutoencoderKLWan"):
        family_of(source).components(source)


def test_a_missing_tensor_is_not_random_weights(broken: Path) -> None:
    path = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["proj_out.weight"]
    save_file(tensors, path)
    source = locate(str(broken))
    with pytest.raises(SourceError, match=r"missing: proj_out\.weight"):
        family_of(source).load(source, "transformer")


def test_hashes_are_remembered_and_notice_changes(broken: Path, tmp_path: Path) -> None:
    memo = tmp_path / "memo.json"
    first = locate(str(broken), memo)
    assert locate(str(broken), memo).files == first.files
    (broken / "generation_config.json").write_text('{"height": 64}')
    assert locate(str(broken), memo).files != first.files
