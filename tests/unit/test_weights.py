"""Weights: one tensor at a time, from any number of files, in any floating dtype."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hbxt_compress.errors import SourceError
from hbxt_compress.layers import LayerName
from hbxt_compress.quantized import Loss, QuantizedModel, QuantizedWeight, save_block
from hbxt_compress.source import Header
from hbxt_compress.weights import Weights


def _tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(6, 4, generator=generator).bfloat16(),
        "b.weight": torch.randn(3, generator=generator).half(),
        "c.weight": torch.randn(2, 5, generator=generator),
        "empty": torch.zeros(0, 3),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = _tensors()
    for number, names in enumerate((["a.weight"], ["b.weight", "c.weight", "empty"]), 1):
        shard = {name: tensors[name] for name in names}
        save_file(shard, tmp_path / f"model-{number:05}-of-00002.safetensors")
    return tmp_path


def test_shards_are_one_set_of_float32_tensors(folder: Path) -> None:
    weights = Weights(folder)
    assert weights.names == ("a.weight", "b.weight", "c.weight", "empty")
    assert [weights.dtype(name) for name in weights.names] == ["BF16", "F16", "F32", "F32"]
    for name, tensor in _tensors().items():
        assert weights.shape(name) == tuple(tensor.shape)
        got = weights.tensor(name)
        assert got.dtype == torch.float32
        assert torch.equal(got, tensor.float())
    whole = weights.tensors()
    assert {name: tuple(t.shape) for name, t in whole.items()} == {
        name: weights.shape(name) for name in weights.names
    }


def test_a_tensor_is_a_copy_of_what_the_file_holds(folder: Path) -> None:
    weights = Weights(folder)
    weights.tensor("c.weight").fill_(7.0)
    assert torch.equal(weights.tensor("c.weight"), _tensors()["c.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_value_that_is_no_number_names_file_and_tensor(
    folder: Path, value: str, dtype: torch.dtype
) -> None:
    bad = torch.zeros(4, 4, dtype=dtype)
    bad[1, 2] = float(value)
    save_file({"d.weight": bad, "d.bias": bad[0].clone()}, folder / "more.safetensors")
    weights = Weights(folder)
    with pytest.raises(SourceError, match=r"more\.safetensors: d\.weight holds NaN or infinity"):
        weights.tensor("d.weight")
    assert torch.equal(weights.tensor("d.bias"), torch.zeros(4))
    with pytest.raises(SourceError, match=r"1 tensors are unusable:\s.*d\.weight"):
        weights.tensors()


def test_a_missing_tensor_is_named(folder: Path) -> None:
    weights = Weights(folder)
    for ask in (weights.tensor, weights.shape, weights.dtype):
        with pytest.raises(SourceError, match=r"no file holds a tensor 'a\.weigth'"):
            ask("a.weigth")


def test_a_second_name_stands_for_a_tensor_that_is_stored_once(folder: Path) -> None:
    weights = Weights(folder, {"tied": "a.weight", "c.weight": "a.weight", "lost": "x.weight"})
    assert weights.names == ("a.weight", "b.weight", "c.weight", "empty", "tied")
    assert torch.equal(weights.tensor("tied"), _tensors()["a.weight"].float())
    assert torch.equal(weights.tensor("c.weight"), _tensors()["c.weight"])
    whole = weights.tensors()
    assert whole["tied"] is whole["a.weight"]


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no \.safetensors file"):
        Weights(tmp_path)


def test_an_opened_block_file_is_read_when_asked(tmp_path: Path) -> None:
    payload = {"codes": torch.ones(4, 8, dtype=torch.uint8), "scales": torch.ones(4, 1).half()}
    weight = QuantizedWeight(
        format="int4-g32", payload=payload, shape=(4, 8), loss=Loss(error=0.5), bias_O=torch.ones(4)
    )
    path = tmp_path / "block.safetensors"
    save_block(path, {LayerName("net/a"): weight}, {"net/b.weight": torch.ones(2)})
    opened, loaded = QuantizedModel.open(path), QuantizedModel.load(tmp_path)
    for model in (opened, loaded):
        found = model.weights[LayerName("net/a")]
        assert sorted(found.payload) == ["codes", "scales"]
        assert all(torch.equal(found.payload[key], payload[key]) for key in payload)
        assert "bias" not in found.payload
        with pytest.raises(KeyError):
            found.payload["bias"]
        assert found.bias_O is not None
        assert torch.equal(found.bias_O, torch.ones(4))
        assert torch.equal(model.floats["net/b.weight"], torch.ones(2))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        opened.weights[LayerName("net/a")].payload["codes"]
    assert torch.equal(loaded.weights[LayerName("net/a")].payload["codes"], payload["codes"])


def test_rows_are_those_of_the_table(folder: Path) -> None:
    rows = Weights(folder).looked_up("a.weight", torch.tensor([4, 0, 4]))
    assert torch.equal(rows, _tensors()["a.weight"].float()[[4, 0, 4]])


def test_a_tensor_longer_than_a_read_is_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hbxt_compress.weights._AT_ONCE", 20)
    for name, tensor in _tensors().items():
        assert torch.equal(Weights(folder).tensor(name), tensor.float())


def test_a_file_cut_short_or_replaced_meanwhile_is_named(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    stat, content = path.stat(), path.read_bytes()
    stamped = Weights(folder, stamps={path: (stat.st_size, stat.st_mtime_ns)})
    unstamped = Weights(folder)
    os.truncate(path, len(content) - 20)
    for weights in (stamped, unstamped):
        with pytest.raises(SourceError, match=r"00002\.safetensors: changed while the run went on"):
            weights.tensors()
    path.write_bytes(content)
    os.utime(path, ns=(0, stat.st_mtime_ns + 1))
    with pytest.raises(SourceError, match=r"00002\.safetensors: changed while the run went on"):
        stamped.tensor("b.weight")
    assert torch.equal(stamped.tensor("a.weight"), _tensors()["a.weight"].float())


def test_a_read_error_names_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Weights(folder)
    monkeypatch.setattr(Header, "file", property(lambda _: Path("/proc/self/mem")), raising=False)
    with pytest.raises(OSError, match=r"Input/output error: '/proc/self/mem'"):
        weights.tensor("c.weight")
