"""Block files: what is read back is what was written, in half a byte where that is enough."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hbxt_compress.layers import LayerName
from hbxt_compress.quantized import (
    Loss,
    QuantizedModel,
    QuantizedWeight,
    halves,
    outline,
    save_block,
)

_NAME = LayerName("transformer/blocks.0.ffn.net.2")


def _weight(payload: dict[str, Tensor]) -> QuantizedWeight:
    return QuantizedWeight(
        format="int4-g64", payload=payload, shape=(48, 256), loss=Loss(error=0.01)
    )


@pytest.mark.parametrize(
    ("codes", "n_bytes"),
    [
        (torch.randint(16, (48, 256), dtype=torch.uint8), 48 * 128),
        (torch.full((48, 256), 15, dtype=torch.uint8), 48 * 128),
        (torch.randint(256, (48, 256), dtype=torch.uint8), 48 * 256),
        (torch.randint(16, (48, 255), dtype=torch.uint8), 48 * 255),
        (torch.randint(-8, 8, (48, 256), dtype=torch.int8), 48 * 256),
        (torch.zeros(0, 256, dtype=torch.uint8), 0),
    ],
)
def test_codes_come_back_and_take_half_a_byte_where_they_can(
    codes: Tensor, n_bytes: int, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    scales = torch.rand(48, 4, dtype=torch.float16)
    save_block(path, {_NAME: _weight({"codes": codes, "scales": scales})})
    for read in (QuantizedModel.load(path), QuantizedModel.open(path)):
        payload = read.weights[_NAME].payload
        assert payload["codes"].dtype == codes.dtype
        assert torch.equal(payload["codes"], codes)
        assert torch.equal(payload["scales"], scales)
    without = tmp_path / "b.safetensors"
    empty = codes.new_zeros(0, codes.shape[1])
    save_block(without, {_NAME: _weight({"codes": empty, "scales": scales})})
    assert path.stat().st_size - without.stat().st_size == pytest.approx(n_bytes, abs=64)


def test_tensors_that_share_memory_are_stored_apart(tmp_path: Path) -> None:
    shared = torch.rand(4, 8)
    save_block(tmp_path / "a.safetensors", {_NAME: _weight({"up": shared, "down": shared[:2]})})
    payload = QuantizedModel.load(tmp_path / "a.safetensors").weights[_NAME].payload
    assert torch.equal(payload["up"], shared)
    assert torch.equal(payload["down"], shared[:2])


def test_an_open_payload_tells_its_shapes_and_gives_halves_as_they_lie(tmp_path: Path) -> None:
    payload = {
        "codes": torch.randint(16, (48, 256), dtype=torch.uint8),
        "odd": torch.randint(16, (48, 255), dtype=torch.uint8),
        "scales": torch.rand(48, 4, dtype=torch.float16),
        "input_scale": torch.rand(256, dtype=torch.float16),
        "rotation": torch.tensor(64),
    }
    save_block(tmp_path / "a.safetensors", {_NAME: _weight(payload)})
    opened = QuantizedModel.open(tmp_path / "a.safetensors").weights[_NAME].payload
    for found in (outline(opened), outline(payload)):
        assert found.keys() == payload.keys()
        for key, tensor in payload.items():
            assert (found[key].shape, found[key].dtype) == (tensor.shape, tensor.dtype)
            assert found[key].is_meta == (tensor.ndim > 1)
            assert tensor.ndim > 1 or torch.equal(found[key], tensor)
    expected = payload["codes"][:, ::2] | payload["codes"][:, 1::2] << 4
    for given in (opened, payload):
        assert torch.equal(halves(given, "codes"), expected)
    assert halves(outline(opened), "codes").shape == (48, 128)
