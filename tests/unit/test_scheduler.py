"""The numpy solvers against diffusers' schedulers, step by step."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest

from hbxt_compress.errors import UsageError
from hbxt_compress.runtime.noise import noise
from hbxt_compress.runtime.scheduler import Denoiser
from hbxt_compress.sampler import SamplerSpec
from hbxt_compress.torchvision_ops import mend_torchvision

mend_torchvision()
import torch  # noqa: E402
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler  # noqa: E402

SHAPE = (1, 3, 2, 4, 4)


def spec(solver: str, n_steps: int, shift: float, **options: object) -> SamplerSpec:
    return SamplerSpec(solver=solver, n_steps=n_steps, shift=shift, guidance=1.0, **options)


def theirs(of: SamplerSpec):
    if of.solver == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=of.shift)
    else:
        scheduler = UniPCMultistepScheduler(
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
            flow_shift=of.shift,
            solver_order=of.solver_order,
            solver_type=of.solver_type,
            disable_corrector=list(of.disable_corrector),
        )
    scheduler.set_timesteps(of.n_steps)
    scheduler.set_begin_index(0)
    return scheduler


def worst_difference(of: SamplerSpec, velocity_of) -> float:
    """Largest |ours - theirs| / max |theirs| over all steps, each side on its own trajectory."""
    ours, scheduler = Denoiser(of), theirs(of)
    start = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    x, y, worst = start, torch.from_numpy(start), 0.0
    for i, timestep in enumerate(scheduler.timesteps):
        assert float(timestep) == float(ours.timesteps[i])
        x = ours.step(velocity_of(x, i), x)
        y = scheduler.step(torch.from_numpy(velocity_of(y.numpy(), i)), timestep, y).prev_sample
        assert x.dtype == np.float32
        worst = max(worst, float(np.abs(x - y.numpy()).max() / y.abs().max()))
    return worst


def random_velocity(_: np.ndarray, i: int) -> np.ndarray:
    return np.random.default_rng(i + 1).standard_normal(SHAPE).astype(np.float32)


def linear_velocity(x: np.ndarray, i: int) -> np.ndarray:
    return np.float32(0.7) * x - np.float32(0.2)


@pytest.mark.parametrize("solver", ["euler", "unipc"])
@pytest.mark.parametrize("n_steps", [1, 2, 3, 4, 8, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("velocity", [random_velocity, linear_velocity])
def test_every_step_equals_diffusers(solver, n_steps, shift, velocity):
    assert worst_difference(spec(solver, n_steps, shift), velocity) <= 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"solver_order": 1},
        {"solver_order": 3},
        {"solver_type": "bh1"},
        {"solver_order": 3, "solver_type": "bh1"},
        {"disable_corrector": (0, 2)},
    ],
)
def test_unipc_options_equal_diffusers(options):
    assert worst_difference(spec("unipc", 8, 3.0, **options), linear_velocity) <= 1e-5


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_a_straight_path_is_solved_exactly(solver):
    """x = (1 - sigma) data + sigma noise has one velocity everywhere: any solver is exact."""
    generator = np.random.default_rng(3)
    data, noise = (generator.standard_normal(SHAPE).astype(np.float32) for _ in range(2))
    denoiser, x = Denoiser(spec(solver, 7, 3.0)), noise
    for _ in denoiser.timesteps:
        x = denoiser.step(noise - data, x)
    np.testing.assert_allclose(x, data, atol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_corrections_equal_a_loop_that_corrects_the_velocity_itself(solver):
    """At another step count than that of the table, so most entries are interpolated."""
    knots = ((100.0, 0.9, 0.05), (500.0, 1.1, -0.03), (900.0, 1.05, 0.02))
    plain = spec(solver, 6, 3.0)
    ours, bare = Denoiser(replace(plain, corrections=knots)), Denoiser(plain)
    times, a, b = (np.array(column) for column in zip(*knots, strict=True))
    x = y = start = np.random.default_rng(4).standard_normal(SHAPE).astype(np.float32)
    for i, t in enumerate(plain.timesteps()):
        x = ours.step(linear_velocity(x, i), x)
        at = [np.float32(np.interp(float(t), times, column)) for column in (a, b)]
        y = bare.step(at[0] * linear_velocity(y, i) + at[1] * y, y)
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, y)
    uncorrected, z = Denoiser(plain), start
    for i in range(6):
        z = uncorrected.step(linear_velocity(z, i), z)
    assert np.abs(x - z).max() > 1e-3


def test_a_correction_that_changes_nothing_leaves_every_byte():
    plain = spec("unipc", 5, 3.0)
    knots = ((100.0, 1.0, 0.0), (900.0, 1.0, 0.0))
    results = []
    for one in (plain, replace(plain, corrections=knots)):
        denoiser, x = Denoiser(one), np.random.default_rng(4).standard_normal(SHAPE)
        for i in range(5):
            x = denoiser.step(random_velocity(x, i), x)
        results.append(x.tobytes())
    assert results[0] == results[1]


def test_unipc_converges_faster_than_euler():
    """Against a fine solution, 8 UniPC steps have less than half the error of 8 Euler steps."""

    def solve(solver: str, n_steps: int) -> np.ndarray:
        denoiser = Denoiser(spec(solver, n_steps, 1.0))
        x = np.ones(SHAPE, dtype=np.float32)
        for sigma in denoiser.sigmas[:-1]:
            x = denoiser.step(0.7 * x + np.cos(3 * sigma), x)
        return x

    truth = solve("euler", 1000)
    assert np.abs(solve("unipc", 8) - truth).max() < 0.5 * np.abs(solve("euler", 8) - truth).max()


def test_a_step_too_many_is_refused():
    denoiser, x = Denoiser(spec("unipc", 1, 1.0)), np.zeros(SHAPE, dtype=np.float32)
    denoiser.step(x, x)
    with pytest.raises(UsageError, match="all 1 steps are done"):
        denoiser.step(x, x)


def test_renoise_is_diffusers_stochastic_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the levels of Hummingbird-XT, with this project's noise in place of torch's."""
    levels = (1.0, 0.9677, 0.9091)
    of = replace(spec("euler", 3, 1.0), solver="renoise", levels=levels)
    ours, n_drawn = Denoiser(of, seed=5), 0
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=list(levels))
    scheduler.set_begin_index(0)

    def drawn(shape: tuple[int, ...], **_: object) -> torch.Tensor:
        nonlocal n_drawn
        n_drawn += 1
        return torch.from_numpy(noise(5, tuple(shape), n_drawn))

    module = importlib.import_module(FlowMatchEulerDiscreteScheduler.__module__)
    monkeypatch.setattr(module, "randn_tensor", drawn)
    x = y = noise(5, SHAPE)
    for i, timestep in enumerate(scheduler.timesteps):
        assert float(ours.timesteps[i]) == pytest.approx(float(timestep), rel=1e-6)
        x = ours.step(random_velocity(x, i), x)
        v, state = torch.from_numpy(random_velocity(y, i)), torch.from_numpy(y)
        y = scheduler.step(v, timestep, state).prev_sample.numpy()
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_renoise_draws_from_its_seed_and_never_the_initial_noise_again() -> None:
    of = replace(spec("euler", 2, 1.0), solver="renoise", levels=(1.0, 0.5))
    start, still = noise(3, SHAPE), np.zeros(SHAPE, np.float32)
    first, again, other = (Denoiser(of, seed=s).step(still, start) for s in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    fresh = (first - 0.5 * start) / 0.5
    assert abs(np.corrcoef(fresh.ravel(), start.ravel())[0, 1]) < 0.3
    assert fresh.std() == pytest.approx(1, abs=0.15)


def test_fitted_combines_noise_and_velocities_as_told() -> None:
    rows = ((0.9, -0.2), (0.8, 0.1, -0.3), (0.7, 0.2, -0.1, -0.4))
    of = replace(spec("euler", 3, 1.0), solver="fitted", levels=(1.0, 0.6, 0.2), coefficients=rows)
    ours, start = Denoiser(of), noise(0, SHAPE)
    x, v = start, [random_velocity(start, i) for i in range(3)]
    for k, row in enumerate(rows):
        x = ours.step(v[k], x)
        wanted = row[0] * start + sum(c * one for c, one in zip(row[1:], v, strict=False))
        np.testing.assert_allclose(x, wanted, atol=1e-6)


def test_fitted_with_eulers_coefficients_is_euler() -> None:
    levels, ends = (1.0, 0.6, 0.2), (0.6, 0.2, 0.0)
    steps = [b - a for a, b in zip(levels, ends, strict=True)]
    rows = tuple((1.0, *steps[: k + 1]) for k in range(3))
    euler = replace(spec("euler", 3, 1.0), levels=levels)
    one, other = Denoiser(replace(euler, solver="fitted", coefficients=rows)), Denoiser(euler)
    x = y = noise(0, SHAPE)
    for i in range(3):
        x, y = one.step(random_velocity(x, i), x), other.step(random_velocity(y, i), y)
        np.testing.assert_allclose(x, y, atol=1e-6)
