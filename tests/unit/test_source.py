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


def _written(path: Path, header: object, n_bytes: int = 16) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(n_bytes))
    return path


def _entry(**changes: object) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}}


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (b"[" * 50_000, "not JSON .nested too deeply"),
        (b'{"a": 1, "a": 2}', "'a' stands there twice"),
        ([1], "its header is not a JSON object"),
        ({"a": None}, "a: its entry lacks a dtype, a shape or two data_offsets"),
        (_entry(data_offsets=[0]), "a: its entry lacks"),
        (_entry(data_offsets=[0, 8.0]), "a: its entry lacks"),
        (_entry(shape="4"), "a: its entry lacks"),
        (_entry(shape=[-4]), "F32 .-4. at 0..16 is no tensor's size and place"),
        (_entry(shape=[True] * 4), "is no tensor's size and place"),
        (_entry(shape=[2**40, 2**40]), "is no tensor's size and place"),
        (_entry(data_offsets=[16, 0]), "F32 .4. at 16..0 is no tensor's"),
        (_entry(data_offsets=[-16, 0]), "is no tensor's size and place"),
        (_entry(dtype=["F32"]), "holds dtypes .*F32"),
        (_entry(data_offsets=[4, 20]), "a begins at byte 4 of the data, expected 0"),
        (_entry() | {"b": _entry()["a"]}, "b begins at byte 0 of the data, expected 16"),
    ],
)
def test_a_header_that_lies_is_refused_with_the_file(
    header: object, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=problem) as refused:
        read_headers(_written(tmp_path / "w.safetensors", header))
    assert "w.safetensors" in str(refused.value)


def test_tensors_without_numbers_lie_anywhere(tmp_path: Path) -> None:
    none = {"dtype": "F32", "shape": [0, 4]}
    header = _entry() | {
        "before": {**none, "data_offsets": [0, 0]},
        "z": {**none, "data_offsets": [16, 16]},
    }
    found = read_headers(_written(tmp_path / "w.safetensors", header))
    assert {name: one.shape for name, one in found.items()} == {
        "a": (4,), "before": (0, 4), "z": (0, 4),
    }  # fmt: skip


def test_nobodys_home_is_no_model() -> None:
    with pytest.raises(SourceError, match=r"'~nobody-of-that-name/x': .*home directory"):
        locate("~nobody-of-that-name/x")


def test_a_damaged_memo_of_hashes_is_made_anew(broken: Path, tmp_path: Path) -> None:
    memo = tmp_path / "files.json"
    for content in ("[1]", "{", '{"a": [1]}', "[" * 50_000):
        memo.write_text(content)
        assert locate(str(broken), memo).files == locate(str(broken)).files
