"""Streamed statistics equal those of the whole batch, in any order."""

from __future__ import annotations

from pathlib import Path

import torch

from hbxt_compress.layers import LayerName
from hbxt_compress.stats import CalibrationStats, LayerStats

_NEEDS = frozenset({"moments", "covariance"})


def _filled(chunks: list[torch.Tensor]) -> LayerStats:
    stats = LayerStats.empty(6, _NEEDS)
    for chunk in chunks:
        stats.add(chunk)
    return stats


def test_streaming_equals_batch() -> None:
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(0)) + 3
    streamed = _filled(list(x.split(7)))
    wide = x.double()
    assert streamed.n == 100
    assert streamed.products_II is not None
    torch.testing.assert_close(streamed.products_II, wide.T @ wide, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(
        streamed.mean_square_I, wide.square().mean(0), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(streamed.absmax_I, wide.abs().amax(0))


def test_order_does_not_matter_and_merging_equals_streaming(tmp_path: Path) -> None:
    x = torch.randn(90, 6, generator=torch.Generator().manual_seed(1))
    name = LayerName("transformer/a")
    for i, half in enumerate((x[:50], x[50:])):
        CalibrationStats(layers={name: _filled([half])}).save(tmp_path / f"{i}.safetensors")
    files = sorted(tmp_path.glob("*.safetensors"))
    forward = CalibrationStats.load(files).layers[name]
    backward = CalibrationStats.load(files[::-1]).layers[name]
    torch.testing.assert_close(forward.squares_I, backward.squares_I, rtol=1e-12, atol=0)
    torch.testing.assert_close(forward.squares_I, _filled([x]).squares_I, rtol=1e-12, atol=0)


def test_a_weight_counts_rows_more_than_once() -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    weighted = LayerStats.empty(6, frozenset({"moments"}))
    weighted.add(x, 2.0)
    torch.testing.assert_close(weighted.squares_I, 2 * x.double().square().sum(0))
    assert weighted.products_II is None


def test_the_same_statistics_give_the_same_bytes(tmp_path: Path) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    for name in ("a", "b"):
        CalibrationStats(layers={LayerName("t/x"): _filled([x])}).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
