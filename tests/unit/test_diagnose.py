"""Loss figures against the rows they stand for, and against the rate-distortion table."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hbxt_compress.algorithms.diagnose import measure
from hbxt_compress.algorithms.gptq import Gptq
from hbxt_compress.algorithms.scales import search_scales
from hbxt_compress.stats import LayerInputs, LayerStats
from tests.oracles.free_format import FreeFormat
from tests.oracles.inputs import correlated, covariance, exact, inputs_of, normal


def _relative(x, y, weight, decoded, shift, against) -> float:
    """The mean square of W x - Q y - shift, relative to that of W applied to `against`."""
    lost = x.double() @ weight.double().T - y.double() @ decoded.double().T - shift
    kept = against.double() @ weight.double().T
    return float(lost.square().sum() / kept.square().sum())


def test_error_is_that_of_the_rows() -> None:
    x, weight = correlated(500, 32), normal(8, 32)
    decoded = weight + 0.1 * normal(8, 32, seed=1)
    inputs = inputs_of(x, bias=False)
    plain = measure(weight, decoded, None, inputs, 4.0)
    fit, held = x[:400], x[400:]
    assert plain.error == pytest.approx(_relative(fit, fit, weight, decoded, 0, fit), rel=1e-6)
    assert plain.held_out == pytest.approx(
        _relative(held, held, weight, decoded, 0, held), rel=1e-6
    )
    shift = 0.1 * normal(8, seed=2)
    shifted = measure(weight, decoded, shift, replace(inputs, takes_bias=True), 4.0)
    assert shifted.error == pytest.approx(
        _relative(fit, fit, weight, decoded, shift, fit), rel=1e-6
    )
    assert shifted.held_out == pytest.approx(
        _relative(held, held, weight, decoded, shift, held), rel=1e-6
    )


def test_the_mean_that_a_shift_leaves_is_that_of_x_and_y() -> None:
    """Only its mean: the error's variance is measured on y alone."""
    x, weight = correlated(400, 16), normal(4, 16)
    y = x + 0.5
    inputs = inputs_of(x, y, held=0)
    perfect = weight.double() @ (inputs.fit.mean_x_I - inputs.fit.mean_y_I)
    assert measure(weight, weight, perfect, inputs, 4.0).error == pytest.approx(0, abs=1e-12)
    assert measure(weight, weight, None, inputs, 4.0).error == 0
    wrong = measure(weight, weight, perfect + 1, inputs, 4.0).error
    assert wrong == pytest.approx(4 / float((y @ weight.T).square().sum(1).mean()), rel=1e-4)


def test_with_moments_inputs_count_as_uncorrelated_and_without_any_as_white() -> None:
    x, weight = correlated(500, 32), normal(8, 32)
    decoded = weight + 0.1 * normal(8, 32, seed=1)
    stats = LayerStats.empty(32, "moments")
    stats.add(x, x)
    inputs = LayerInputs(fit=stats, held_out=None, takes_bias=True)
    loss = measure(weight, decoded, None, inputs, 4.0)
    square = x.double().square().mean(0)
    wanted = ((weight - decoded).double().square() @ square).sum()
    wanted /= (weight.double().square() @ square).sum()
    assert loss.error == pytest.approx(float(wanted), rel=1e-6)
    assert (loss.held_out, loss.g1_db, loss.g2_db, loss.limit_db) == (None,) * 4
    mean = x.double().mean(0)
    best = (weight - decoded).double() @ mean
    assert measure(weight, decoded, best, inputs, 4.0).error < loss.error
    white = measure(weight, decoded, None, None, 4.0)
    assert white.error == pytest.approx(
        float((weight - decoded).square().sum() / weight.square().sum()), rel=1e-6
    )
    assert white.limit_db is None


def test_gains_are_those_of_the_ldl_factors() -> None:
    """d_j by its definition: the variance of a column given the quieter ones after it."""
    hessian, weight = covariance(24), normal(8, 24)
    loss = measure(weight, weight * 0.5, torch.zeros(8), exact(hessian), 4.25)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    h = hessian[order][:, order] + 1e-3 * hessian.diagonal().mean() * torch.eye(24).double()
    pivots = []
    for j in range(24):
        one, before = h[j, j], h[j, :j]
        pivots.append(one - before @ torch.linalg.solve(h[:j, :j], before) if j else one)
    # Eliminating the loudest first or last gives other pivots but the same product.
    after = []
    for j in range(24):
        rest = h[j, j + 1 :]
        inner = h[j + 1 :, j + 1 :]
        after.append(h[j, j] - (rest @ torch.linalg.solve(inner, rest) if len(rest) else 0))
    d = torch.stack(after)
    assert float(d.log().sum()) == pytest.approx(float(torch.stack(pivots).log().sum()))
    geomean = float(d.log().mean().exp())
    assert loss.g1_db == pytest.approx(10 * math.log10(h.diagonal().mean() / d.mean()))
    assert loss.g2_db == pytest.approx(10 * math.log10(d.mean() / geomean))
    lost = 0.25 * float((weight.double() @ hessian * weight.double()).sum())
    limit = 8 * 24 * float(weight.double().square().mean()) * geomean * 2 ** (-8.5)
    assert loss.limit_db == pytest.approx(10 * math.log10(lost / limit), abs=1e-6)


@pytest.mark.parametrize(("group", "gap_db"), [(128, 4.54), (64, 4.66), (32, 5.27)])
def test_on_white_inputs_the_gap_is_the_rate_distortion_tables(group: int, gap_db: float) -> None:
    weight, fmt = normal(512, 256), FreeFormat(group=group)
    grid = search_scales(weight, fmt)
    decoded = grid.value(grid.levels(weight))
    inputs = exact(torch.eye(256))
    loss = measure(weight, decoded, torch.zeros(512), inputs, 4 + 16 / group)
    assert loss.limit_db == pytest.approx(gap_db, abs=0.08)
    assert loss.g1_db == pytest.approx(0, abs=1e-9)
    assert loss.g2_db == pytest.approx(0, abs=1e-9)


def test_feedback_gains_what_g1_says() -> None:
    """G1 is a promise for a fixed grid without clipping: a fine grid keeps it to 0.3 dB."""
    hessian, weight = covariance(96, seed=3), normal(64, 96)
    fmt = FreeFormat(n_levels=(127, 127))
    grid = search_scales(weight, fmt)
    nearest = grid.value(grid.levels(weight))
    rounder = Gptq(damping=(1e-3,), correct=(0.0,), polish=0, scale_weights="ones")
    inputs = exact(hessian)
    fed = fmt.decode(rounder.round(weight, inputs, fmt).payload)
    plain, better = (
        measure(weight, decoded, torch.zeros(64), inputs, 8.0) for decoded in (nearest, fed)
    )
    gained = 10 * math.log10(plain.error / better.error)
    assert plain.g1_db is not None
    assert plain.g1_db > 3
    assert gained == pytest.approx(plain.g1_db, abs=0.3)


def test_inputs_that_never_vary_are_left_out() -> None:
    x, weight = correlated(500, 32), normal(8, 32)
    x[:, 5] = 0
    decoded = weight + 0.1 * normal(8, 32, seed=1)
    keep = torch.arange(32) != 5
    whole = measure(weight, decoded, torch.zeros(8), inputs_of(x), 4.25)
    alone = measure(weight[:, keep], decoded[:, keep], torch.zeros(8), inputs_of(x[:, keep]), 4.25)
    for one, other in zip(vars_of(whole), vars_of(alone), strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def vars_of(loss) -> list[float]:
    return [loss.error, loss.held_out, loss.g1_db, loss.g2_db, loss.limit_db]


def test_every_odd_case_has_a_number_and_no_nan() -> None:
    x, weight = correlated(100, 16), normal(4, 16)
    silent = inputs_of(torch.zeros(100, 16), held=0)
    few = inputs_of(x[:5], held=0)
    zero = torch.zeros(4, 16)
    assert measure(weight, weight * 0.5, None, silent, 4.0).error == 0
    assert measure(weight, weight * 0.5, None, silent, 4.0).limit_db is None
    assert measure(zero, zero, None, inputs_of(x), 4.0).error == 0
    assert measure(zero, weight, None, None, 4.0).error == math.inf
    for inputs in (few, inputs_of(x)):
        for decoded in (weight, weight * 0.9):
            loss = measure(weight, decoded, torch.zeros(4), inputs, 4.25)
            numbers = [v for v in vars_of(loss) if v is not None]
            assert all(math.isfinite(v) for v in numbers)
    with pytest.raises(ValueError, match=r"\(4, 16\) and \(4, 8\)"):
        measure(weight, weight[:, :8], None, None, 4.0)
