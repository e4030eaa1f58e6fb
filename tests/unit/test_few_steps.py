"""The fitted solver on flows whose answer is known, and against literal least squares."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hbxt_compress.algorithms.few_steps import (
    FewSteps,
    Path,
    _nearest,
    fit_coefficients,
    shortest_path,
)
from hbxt_compress.algorithms.training import Training
from hbxt_compress.algorithms.tuned_steps import FittedSolver, relative_errors, tune
from hbxt_compress.runtime.scheduler import Denoiser
from hbxt_compress.sampler import SamplerSpec
from tests.watching import Silent

LEVELS = torch.linspace(1, 0, 13)
SPEC = SamplerSpec(solver="euler", n_steps=12, shift=1.0, guidance=1.0)


def straight(x: Tensor, level: float, text: Tensor) -> Tensor:
    """All noise flows to one clip: v = (x - clip) / level."""
    return (x - 0.5) / level


def linear(x: Tensor, level: float, text: Tensor) -> Tensor:
    """Coordinates that shrink at three rates."""
    return x * torch.tensor([0.3, 1.0, 2.0]).view(1, 3, 1, 1, 1)


def bent(x: Tensor, level: float, text: Tensor) -> Tensor:
    return (
        torch.tanh(2 * x)
        + level * torch.sin(3 * x.roll(1, 1))
        + text.mean((1, 2)).view(-1, *[1] * 4)
    )


def path(velocity, n: int = 24, fine: int = 20) -> Path:
    """The teacher: Euler with `fine` small steps between two levels."""
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(n, 3, 2, 2, 2, generator=g), torch.randn(n, 4, 2, generator=g)
    states = [x]
    for a, b in itertools.pairwise(LEVELS.tolist()):
        for i in range(fine):
            x = x + (b - a) / fine * velocity(x, a + (b - a) * i / fine, text)
        states.append(x)
    return Path(states_NKCTHW=torch.stack(states, 1), levels_K=LEVELS, text_NLD=text)


def euler_error(velocity, one: Path, steps) -> float:
    x, ends = one.states_NKCTHW[:, 0], [*steps[1:], len(LEVELS) - 1]
    for a, b in zip(steps, ends, strict=True):
        x = x + (LEVELS[b] - LEVELS[a]) * velocity(x, float(LEVELS[a]), one.text_NLD)
    wanted = one.states_NKCTHW[:, -1]
    return float((x - wanted).square().sum() / wanted.square().sum())


def test_a_straight_flow_takes_one_step() -> None:
    one = path(straight, fine=1)
    found = fit_coefficients(straight, one, one, (0,), 0.0)
    assert max(found.errors) < 1e-10
    assert found.coefficients[0] == pytest.approx((1.0, -1.0), abs=1e-4)


def test_a_linear_flow_is_exact_with_one_step_less_than_it_has_rates() -> None:
    """n steps give a polynomial in A of degree n, and exp(A) is one of degree 2 on three rates."""
    one = path(linear)
    errors = [
        fit_coefficients(linear, one, one, steps, 1e-12).errors[1] for steps in ((0,), (0, 6))
    ]
    assert errors[1] < 1e-9 < errors[0]


@pytest.mark.parametrize("n_steps", [1, 2, 4])
def test_one_fitted_step_is_never_worse_than_eulers_on_what_it_saw(n_steps: int) -> None:
    one = path(bent)
    steps = tuple(12 // n_steps * k for k in range(n_steps))
    found = fit_coefficients(bent, one, one, steps, 0.0)
    assert found.errors[0] <= euler_error(bent, one, steps)


def test_coefficients_are_those_of_literal_least_squares() -> None:
    one = path(bent)
    found = fit_coefficients(bent, one, one, (0, 5), 0.0)
    x = one.states_NKCTHW[:, 0]
    basis = [x, bent(x, 1.0, one.text_NLD)]
    for k, end in enumerate((5, 12)):
        matrix = torch.stack([b.flatten() for b in basis], 1).double()
        wanted = one.states_NKCTHW[:, end].flatten().double()
        literal = torch.linalg.lstsq(matrix, wanted.unsqueeze(1)).solution.squeeze(1)
        assert found.coefficients[k] == pytest.approx(literal.tolist(), rel=1e-4, abs=1e-5)
        x = sum(float(c) * b for c, b in zip(literal, basis, strict=True))
        basis.append(bent(x, float(LEVELS[5]), one.text_NLD))


def test_a_strong_ridge_gives_euler() -> None:
    one = path(bent)
    found = fit_coefficients(bent, one, one, (0, 6), 1e9)
    assert found.coefficients[0] == pytest.approx((1, -0.5), abs=1e-6)
    assert found.coefficients[1] == pytest.approx((1, -0.5, -0.5), abs=1e-6)
    assert found.errors[0] == pytest.approx(euler_error(bent, one, (0, 6)), rel=1e-4)


@pytest.mark.parametrize("n_steps", [1, 2, 3, 4])
def test_the_shortest_path_is_that_of_trying_all(n_steps: int) -> None:
    one, last = path(bent, n=4), len(LEVELS) - 1

    def cost(steps) -> float:
        total = 0.0
        for a, b in itertools.pairwise((*steps, last)):
            x = one.states_NKCTHW[:, a]
            reached = x + (LEVELS[b] - LEVELS[a]) * bent(x, float(LEVELS[a]), one.text_NLD)
            total += math.sqrt(float((reached - one.states_NKCTHW[:, b]).double().square().sum()))
        return total

    every = [(0, *rest) for rest in itertools.combinations(range(1, last), n_steps - 1)]
    found = shortest_path(bent, one, n_steps)
    assert found[0] == 0
    assert cost(found) == pytest.approx(min(map(cost, every)))


@pytest.mark.parametrize("wanted", [(1, 0.9, 0.01), (1, 0.5), (0.99,), (1, 0.999, 0.998, 0.1)])
def test_the_nearest_levels_are_different_and_leave_room(wanted) -> None:
    found = _nearest(LEVELS, wanted)
    assert list(found) == sorted({*found})
    assert found[0] == 0
    assert found[-1] < 12
    assert len(found) == len(wanted)


def test_more_steps_than_the_teacher_took_are_refused() -> None:
    with pytest.raises(ValueError, match="the model itself takes 12"):
        shortest_path(bent, path(bent, n=2), 13)


def test_the_search_helps_clips_that_it_never_saw() -> None:
    one, watch = path(bent, n=48), Silent()
    learnt, judged = one.rows(slice(32)), one.rows(slice(32, None))
    solver = FewSteps(n_steps=3).fit(bent, learnt, SPEC, watch)
    eps, clean, text = judged.ends()
    found = solver(bent, eps, text).detach()
    assert solver.levels().tolist()[0] == 1
    lost = float((found - clean).square().sum() / clean.square().sum())
    assert lost < 0.1 * euler_error(bent, judged, (0, 4, 8))
    assert 0.8 < float(found.square().sum() / clean.square().sum()) < 1.2
    assert watch.searches


def test_a_finished_search_is_not_repeated() -> None:
    one, watch = path(bent, n=16), Silent()
    first = FewSteps(n_steps=3).fit(bent, one, SPEC, watch)
    n_searches = len(watch.searches)
    again = FewSteps(n_steps=3).fit(bent, one, SPEC, watch)
    assert len(watch.searches) == n_searches
    assert [row.tolist() for row in again.rows] == [row.tolist() for row in first.rows]


def test_a_fitted_solver_is_what_the_runtime_does() -> None:
    solver = FittedSolver((1.0, 0.7, 0.2), ((1, -0.3), (0.9, -0.2, -0.5), (1, 0, -0.4, -0.3)))
    torch.testing.assert_close(solver.levels(), torch.tensor([1.0, 0.7, 0.2]))
    spec = replace(
        SPEC, solver="fitted", n_steps=3, levels=tuple(solver.levels().tolist()),
        coefficients=tuple(tuple(row.tolist()) for row in solver.rows),
    )  # fmt: skip
    one, denoiser = path(bent, n=2, fine=1), Denoiser(spec)
    eps, _, text = one.ends()
    x = eps.numpy()
    for t in denoiser.timesteps:
        x = denoiser.step(bent(torch.from_numpy(x), float(t) / 1000, text).numpy(), x)
    found = solver(bent, eps, text).detach()
    torch.testing.assert_close(found, torch.from_numpy(x), rtol=1e-4, atol=1e-5)


def test_gradients_go_through_levels_and_every_step() -> None:
    """Against central differences, in float64."""
    one = path(bent, n=2, fine=1)
    eps, clean, text = (x.double() for x in one.ends())
    solver = FittedSolver((1.0, 0.6), ((1, -0.4), (1, -0.1, -0.5))).double()

    def loss() -> Tensor:
        lost = (solver(bent, eps, text) - clean).square().sum()
        return lost / clean.square().sum()

    loss().backward()
    for parameter in solver.parameters():
        for i in range(parameter.numel()):
            values = []
            for move in (1e-6, -2e-6, 1e-6):  # there, to the other side, and back
                with torch.no_grad():
                    parameter[i] += move
                    values.append(float(loss()))
            slope = (values[0] - values[1]) / 2e-6
            assert float(parameter.grad[i]) == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_tuning_all_together_goes_beyond_fitting_one_by_one() -> None:
    one, watch = path(bent, n=96), Silent()
    learnt, held_out = one.rows(slice(64)), one.rows(slice(64, None))
    fit = fit_coefficients(bent, learnt, held_out, (0, 5), 1e-6)
    solver = FittedSolver([1.0, float(LEVELS[5])], fit.coefficients)
    how = Training(
        n_steps=200, batch=32, rate=5e-3, warmup=5, average=0.9, judge_every=50,
        precision="float32", compiled=False,
    )  # fmt: skip
    device = torch.device("cpu")
    before, after = tune(solver, bent, learnt.ends(), held_out.ends(), how, device, watch)
    assert after < 0.8 * before
    eps, clean, text = held_out.ends()
    errors = relative_errors(solver(bent, eps, text).detach(), clean)
    assert float(errors.mean()) == pytest.approx(after)
