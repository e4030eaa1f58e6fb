"""Streamed statistics equal those of the whole batch, in any order, however far from zero."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hbxt_compress.stats import LayerInputs, LayerStats


def _pairs(n: int, seed: int = 0, mean: float = 3.0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=source) + mean
    return x, x + 0.1 * torch.randn(n, 6, generator=source)


def _filled(x: Tensor, y: Tensor, chunk: int = 1000, weight: float = 1.0) -> LayerStats:
    stats = LayerStats.empty(6, "covariance")
    for one, two in zip(x.split(chunk), y.split(chunk), strict=True):
        stats.add(one, two, weight)
    return stats


def _close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


_FLOAT32 = 1e-6  # products of rows that lie together are float32, only their sums are not


def test_streaming_equals_batch() -> None:
    x, y = _pairs(100)
    stats, wide_x, wide_y = _filled(x, y, chunk=7), x.double(), y.double()
    assert stats.n == 100
    _close(stats.mean_x_I, wide_x.mean(0))
    _close(stats.mean_y_I, wide_y.mean(0))
    _close(stats.mean_square_I, wide_y.square().mean(0))
    _close(stats.absmax_I, wide_y.abs().amax(0))
    _close(stats.hessian(centred=False), wide_y.T @ wide_y / 100, _FLOAT32)
    _close(stats.cross(centred=False), wide_x.T @ wide_y / 100, _FLOAT32)
    a, b = wide_x - wide_x.mean(0), wide_y - wide_y.mean(0)
    _close(stats.hessian(centred=True), b.T @ b / 100, _FLOAT32)
    _close(stats.cross(centred=True), a.T @ b / 100, _FLOAT32)


def test_a_far_mean_costs_no_digits_of_the_covariance() -> None:
    x, y = (one.double() for one in _pairs(400, mean=0.0))
    near, far = _filled(x.float(), y.float()), _filled((x + 4096).float(), (y + 4096).float())
    # float32 rows near 4096 have steps of 5e-4; the sums add nothing to that.
    torch.testing.assert_close(
        far.hessian(centred=True), near.hessian(centred=True), rtol=0, atol=1e-3
    )


def test_order_does_not_matter_and_merging_equals_streaming() -> None:
    x, y = _pairs(90, seed=1)
    first, second = _filled(x[:50], y[:50]), _filled(x[50:] + 1, y[50:] + 1, weight=2.0)
    forward, backward = first.merged(second), second.merged(first)
    assert forward.n == backward.n == 90
    for one in ("hessian", "cross"):
        for centred in (True, False):
            got, other = (getattr(side, one)(centred=centred) for side in (forward, backward))
            _close(got, other, 1e-9)
    _close(forward.mean_square_I, backward.mean_square_I, 1e-9)
    assert LayerStats.empty(6, "covariance").merged(first).n == 50


def test_a_weight_counts_rows_more_than_once() -> None:
    x, y = _pairs(5, seed=2)
    weighted, twice = _filled(x, y, weight=2.0), _filled(torch.cat([x, x]), torch.cat([y, y]))
    assert (weighted.n, weighted.weight) == (5, 10.0)
    _close(weighted.hessian(centred=True), twice.hessian(centred=True), _FLOAT32)
    _close(weighted.mean_y_I, twice.mean_y_I)


def test_moments_alone_have_no_covariance() -> None:
    stats = LayerStats.empty(6, "moments")
    stats.add(*_pairs(5))
    with pytest.raises(ValueError, match="without products"):
        stats.hessian(centred=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x, y = _pairs(5)
    y[2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        LayerStats.empty(6, "moments").add(x, y)


def test_everything_is_both_sets_of_rows() -> None:
    one, two = _filled(*_pairs(10)), _filled(*_pairs(20, seed=3))
    assert LayerInputs(fit=one, held_out=two, takes_bias=True).everything().n == 30
    assert LayerInputs(fit=one, held_out=None, takes_bias=True).everything() is one


def test_many_inputs_are_summed_in_float32_and_still_add_up() -> None:
    """More than 2048 inputs in float32; E[x y^T] of more than 8192 is left out."""
    generator = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(600, 2112, generator=generator)
    y = x + 0.1 * torch.randn(600, 2112, generator=generator)
    stats = LayerStats.empty(2112, "covariance")
    for rows in (slice(0, 250), slice(250, 600)):
        stats.add(x[rows], y[rows], 0.5)
    assert stats.products_yy_II is not None
    assert stats.products_yy_II.dtype == torch.float32
    xd, yd = x.double(), y.double()
    for centred in (True, False):
        left, right = (t - t.mean(0) * centred for t in (xd, yd))
        scale = float((right.T @ right / 600).diagonal().mean())
        assert (stats.hessian(centred=centred) - right.T @ right / 600).abs().max() < 1e-5 * scale
        assert (stats.cross(centred=centred) - left.T @ right / 600).abs().max() < 1e-5 * scale
    assert torch.allclose(stats.mean_y_I, yd.mean(0), rtol=1e-6)
    wide = LayerStats.empty(8193, "covariance")
    assert wide.products_xy_II is None
    with pytest.raises(ValueError, match="without products"):
        wide.cross(centred=True)


def test_layers_of_one_input_share_what_is_derived_and_other_statistics_do_not() -> None:
    inputs = LayerInputs(fit=_filled(*_pairs(8)), held_out=None, takes_bias=True)
    other = inputs.of_layer(takes_bias=False)
    made = inputs.once("key", object)
    assert other.once("key", object) is inputs.once("key", object) is made
    assert not other.takes_bias
    assert not replace(inputs, fit=_filled(*_pairs(8))).derived
