"""The fitted solver on flows whose answer is known, and against literal least squares."""

from __future__ import annotations

import itertools
import math

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
from hbxt_compress.sampler import SamplerSpec

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
    one, said = path(bent, n=48), []
    spec, found = FewSteps(n_steps=3).fit(bent, one, SPEC, said.append)
    assert spec.solver == "fitted"
    assert spec.levels[0] == 1
    assert spec.n_steps == len(spec.levels) == len(spec.coefficients) == 3
    judged = one.rows(slice(32, None))
    assert found.errors[1] < 0.1 * euler_error(bent, judged, (0, 4, 8))
    assert 0.8 < found.energy < 1.2
    assert said
