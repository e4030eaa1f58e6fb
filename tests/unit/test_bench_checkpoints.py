"""Checkpoints of the scale bench: published shapes, the same bytes again, and trained tails."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from checkpoints import Checkpoint, write_checkpoint
from huggingface_hub import split_torch_state_dict_into_shards
from random_weights import Drawer, write_weights
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from hbxt_compress.journal import file_sha256
from hbxt_compress.models.wan import Wan
from hbxt_compress.source import locate, read_headers

TINY = Checkpoint(transformer="tiny")


def _bytes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _weights(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor.float()
        for path in folder.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def _kurtosis(values: Tensor) -> float:
    """Of a normal law 3."""
    centred = values.double() - values.double().mean()
    return float(centred.pow(4).mean() / centred.square().mean().square())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", TINY)


@pytest.mark.parametrize(
    ("which", "folder", "count"),
    [
        (Checkpoint(transformer="0.3B"), "transformer", 304_419_904),
        (Checkpoint(transformer="1.3B"), "transformer", 1_418_996_800),
        (Checkpoint(transformer="5B"), "transformer", 4_999_787_712),
        (Checkpoint(transformer="5B", text_encoder="umt5-xxl"), "text_encoder", 5_680_910_336),
        (Checkpoint(transformer="5B", vae="wan2.2"), "vae", 704_688_668),
    ],
)
def test_published_sizes_are_exact(which: Checkpoint, folder: str, count: int) -> None:
    assert all(one.is_meta for one in which.modules()[folder].parameters())
    assert sum(map(math.prod, which.shapes()[folder].values())) == count


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    tiny: Path, tmp_path: Path
) -> None:
    again = _bytes(write_checkpoint(tmp_path / "again", TINY))
    assert again == _bytes(tiny)
    other = _bytes(write_checkpoint(tmp_path / "other", Checkpoint(transformer="tiny", seed=1)))
    changed = {name for name in again if again[name] != other[name]}
    assert changed == {name for name in again if name.endswith((".safetensors", ".stamp"))}


def test_a_weight_does_not_depend_on_what_was_drawn_before_it() -> None:
    shapes = {"a": (300, 1000), "b": (7, 3, 1, 2, 2), "c.bias": (5,)}
    one, other = Drawer(0), Drawer(0)
    forward = {name: torch.cat(list(one.chunks(name, shape))) for name, shape in shapes.items()}
    for name, shape in reversed(shapes.items()):
        assert torch.equal(torch.cat(list(other.chunks(name, shape))), forward[name])
        assert forward[name].shape == (math.prod(shape),)


def test_a_folder_is_kept_while_its_stamp_fits(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "one", TINY)
    config = folder / "transformer" / "config.json"
    before = config.stat().st_mtime_ns
    assert write_checkpoint(folder, TINY) == folder
    assert config.stat().st_mtime_ns == before
    write_checkpoint(folder, Checkpoint(transformer="tiny", seed=1))
    assert config.stat().st_mtime_ns != before


def test_other_peoples_files_are_not_removed(tmp_path: Path) -> None:
    kept = tmp_path / "thesis.txt"
    kept.write_text("mine")
    with pytest.raises(ValueError, match="other things than a checkpoint"):
        write_checkpoint(tmp_path, TINY)
    assert kept.read_text() == "mine"


def test_sizes_that_do_not_exist_or_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"no transformer of size '7B'; there are tiny, 0.1B"):
        Checkpoint(transformer="7B").modules()
    with pytest.raises(ValueError, match="4096 features, transformer tiny takes 128"):
        Checkpoint(transformer="tiny", text_encoder="umt5-xxl").modules()


def test_it_loads_as_a_published_folder_does_and_takes_a_step(tiny: Path) -> None:
    source, family = locate(str(tiny)), Wan()
    assert family.components(source) == ("text_encoder", "transformer", "vae_decoder")
    counted = family.parameters(source)
    assert counted["transformer"] == sum(map(math.prod, TINY.shapes()["transformer"].values()))
    linears = [s for s in family.layers(source) if s.component == "transformer" and s.block == 1]
    assert sum(s.kind == "linear" for s in linears) == 10
    ids = torch.arange(16).unsqueeze(0)
    text = family.chain(source, "text_encoder", family.load(source, "text_encoder"))
    hidden = text.whole(ids, torch.ones_like(ids))
    transformer = family.chain(source, "transformer", family.load(source, "transformer"))
    latents = torch.randn(1, *family.latent_shape(source), generator=torch.Generator())
    velocity = transformer.whole(latents, torch.full((1,), 500.0), hidden)
    assert velocity.shape == latents.shape
    assert torch.isfinite(velocity).all()
    assert 0.1 < float(velocity.std()) < 10
    frames = family.decode(source, family.load(source, "vae_decoder"), latents)
    assert frames.shape == (1, 3, 5, 64, 64)
    assert torch.isfinite(frames).all()


def test_weights_have_heavy_tails_and_channels_of_many_scales(tiny: Path) -> None:
    weights = _weights(tiny / "transformer")
    assert all(torch.isfinite(one).all() for one in weights.values())
    weight_OI = weights["blocks.0.ffn.net.0.proj.weight"]
    rows_O = weight_OI.std(1)
    assert _kurtosis(weight_OI / rows_O.unsqueeze(1)) > 4.5  # of Student's t with 5 degrees: 9
    assert float(rows_O.max() / rows_O.min()) > 3
    assert 0.9 < float(weight_OI.std()) * math.sqrt(weight_OI.shape[1]) < 1.3
    assert torch.linalg.matrix_rank(weight_OI) == min(weight_OI.shape)
    norms = torch.cat([w for n, w in weights.items() if ".norm" in n and n.endswith("weight")])
    assert 0.99 < float(norms.mean()) < 1.01
    biases = torch.cat([w for n, w in weights.items() if n.endswith("bias")])
    assert 0 < float(biases.std()) < 0.05


def test_shards_are_cut_where_the_hub_cuts_them_and_hold_the_same_numbers(tmp_path: Path) -> None:
    shapes = {f"block.{i}.weight": (4, 3 + i % 3) for i in range(12)} | {"wide.weight": (4, 12)}
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    for folder, most in ((whole, 10**6), (sharded, 100)):
        folder.mkdir()
        write_weights(folder, "model", shapes, Drawer(3), shard_bytes=most)
    state = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    expected = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=100
    )
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == expected.tensor_to_filename
    assert index["metadata"]["total_size"] == expected.metadata["total_size"]
    for name, file in index["weight_map"].items():
        with safe_open(sharded / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118  # not a dict
            assert shard.metadata() == {"format": "pt"}
    headers = read_headers(sharded)
    assert {name: header.shape for name, header in headers.items()} == shapes
    assert {header.dtype for header in headers.values()} == {"BF16"}
    assert [path.name for path in whole.iterdir()] == ["model.safetensors"]
    one, other = _weights(whole), _weights(sharded)
    assert one.keys() == other.keys() == shapes.keys()
    assert all(torch.equal(one[name], other[name]) for name in shapes)
