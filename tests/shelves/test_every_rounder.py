"""Every rounder: deterministic, valid payloads, and the searched grid's rate-distortion table."""

from __future__ import annotations

import math

import pytest
import torch

from hbxt_compress.algorithms import ROUNDERS
from hbxt_compress.algorithms.rtn import Rtn, relative_error, search_scales
from hbxt_compress.formats import FORMATS
from hbxt_compress.stats import LayerStats

_QUANTIZING = [name for name in FORMATS if not name.startswith("fp")]


def _stats(n_inputs: int) -> LayerStats:
    stats = LayerStats.empty(n_inputs, frozenset({"moments", "covariance"}))
    stats.add(torch.randn(64, n_inputs, generator=torch.Generator().manual_seed(9)))
    return stats


def _gauss(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fmt", _QUANTIZING)
@pytest.mark.parametrize("name", ROUNDERS)
def test_rounding_is_deterministic_and_valid(name: str, fmt: str) -> None:
    weight = _gauss(48, 256)
    one, two = (ROUNDERS[name]().round(weight, _stats(256), FORMATS[fmt]) for _ in range(2))
    assert one.error == two.error
    for key, tensor in one.payload.items():
        assert torch.equal(tensor, two.payload[key])
    decoded = FORMATS[fmt].decode(one.payload)
    assert decoded.shape == weight.shape
    assert one.error == pytest.approx(relative_error(weight, decoded, _stats(256).mean_square_I))
    assert 0 < one.error < 0.02


@pytest.mark.parametrize(("group", "expected_db"), [(128, -20.29), (64, -20.93), (32, -21.82)])
def test_int4_search_reaches_the_rate_distortion_table(group: int, expected_db: float) -> None:
    weight = _gauss(2048, 512)
    payload = Rtn(search="mse").round(weight, _stats(512), FORMATS[f"int4-g{group}"]).payload
    lost = (
        weight - FORMATS[f"int4-g{group}"].decode(payload)
    ).square().mean() / weight.square().mean()
    assert 10 * math.log10(float(lost)) == pytest.approx(expected_db, abs=0.05)


def test_without_search_the_signed_grid_is_onnx_runtimes() -> None:
    weight = _gauss(2048, 512)
    payload = Rtn(search="none").round(weight, _stats(512), FORMATS["int4-g64"]).payload
    lost = (weight - FORMATS["int4-g64"].decode(payload)).square().mean() / weight.square().mean()
    assert 10 * math.log10(float(lost)) == pytest.approx(-20.45, abs=0.05)


def test_search_finds_the_best_of_all_float16_scales() -> None:
    """Against a slow literal oracle: every float16 scale there is, for a few groups."""
    groups = _gauss(6, 32, seed=4)
    found = search_scales(groups, 32, (8, 7), thorough=True).float()
    every = torch.arange(0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    every = torch.cat([every, -every])
    every = every[(every.abs() > 0.05) & (every.abs() < 1.0)]
    for row, scale in zip(groups, found[:, 0], strict=True):
        codes = (row[None] / every[:, None]).round().clamp(-8, 7)
        least = (row[None] - codes * every[:, None]).square().sum(1).min()
        got = (row - (row / scale).round().clamp(-8, 7) * scale).square().sum()
        assert float(got) <= 1.03 * float(least)


def test_rows_in_chunks_equal_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _gauss(64, 256, seed=5)
    whole = search_scales(weight, 128, (8, 7), thorough=True)
    monkeypatch.setattr("hbxt_compress.algorithms.rtn._ROWS_AT_ONCE", 256 * 5)
    assert torch.equal(whole, search_scales(weight, 128, (8, 7), thorough=True))


def test_an_all_zero_group_stays_zero() -> None:
    weight = _gauss(4, 256)
    weight[1, :128] = 0
    fmt = FORMATS["int4-g128"]
    decoded = fmt.decode(Rtn().round(weight, _stats(256), fmt).payload)
    assert torch.equal(decoded[1, :128], torch.zeros(128))
