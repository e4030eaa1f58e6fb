"""The solver refit: closed form against oracles, what held-out prompts veto, guidance pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hbxt_compress.algorithms.example import Example
from hbxt_compress.algorithms.solver import Moments, SolverRefit
from hbxt_compress.sampler import SamplerSpec

SHAPE = (2, 3, 2, 4, 4)


def draw(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def moments(timestep: float, seed: int, a: float, b: float, noise: float = 0.0) -> Moments:
    """States whose velocity is a v_q + b x exactly, but for noise."""
    quantized, own, more = (draw(seed + offset).double() for offset in (0, 1000, 2000))
    latents = own + 0.5 * quantized
    velocity = a * quantized + b * latents + noise * more
    return Moments.of(timestep, quantized, latents, velocity)


class Half(nn.Module):
    """Stands for a quantized model: some velocity of latents, timestep and text."""

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return torch.sin(3 * latents) * text + timestep[0] / 1000


def call(student: nn.Module, *inputs: Tensor) -> Tensor:
    return student(*inputs)


def test_an_exact_relation_is_recovered():
    """v_q = (v - b x) / a on all states, at every timestep with its own a and b."""
    truth = {900.0: (0.9, 0.1), 500.0: (1.2, -0.05), 100.0: (1.01, 0.0)}
    fit, held = (
        [moments(t, seed + int(t), *ab) for t, ab in truth.items() for seed in seeds]
        for seeds in (range(3), range(5, 7))
    )
    found = SolverRefit(ridge=0.0).fit(fit, held)
    assert [t for t, *_ in found.corrections] == [100.0, 500.0, 900.0]
    for t, a, b in found.corrections:
        assert (a, b) == pytest.approx(truth[t], abs=1e-9)
    assert found.before > 1e-3
    assert found.after < 1e-12


def test_the_fit_is_the_least_of_the_ridge_objective():
    """Against a lookup over a fine grid, of the objective as its docstring writes it."""
    quantized, latents = draw(1), draw(2) + 0.8 * draw(1)
    velocity = 0.97 * quantized + 0.04 * latents + 0.3 * draw(3)
    own, ridge = Moments.of(500.0, quantized, latents, velocity), 0.3

    def objective(a: float, b: float) -> float:
        miss = (a * quantized + b * latents - velocity).double().square().sum()
        pull = (a - 1) ** 2 * quantized.square().sum() + b**2 * latents.square().sum()
        return float(miss + ridge * pull)

    ((_, a, b),) = SolverRefit(ridge=ridge).fit([own], [own]).corrections
    best = objective(a, b)
    for step in (1e-2, 1e-3):
        for da, db in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            assert objective(a + step * da, b + step * db) > best


def test_a_strong_ridge_leaves_the_velocity_alone():
    one = moments(500.0, 0, 0.8, 0.2)
    ((_, a, b),) = SolverRefit(ridge=1e6).fit([one], [one]).corrections
    assert (a, b) == pytest.approx((1.0, 0.0), abs=1e-5)


def test_what_does_not_help_held_out_prompts_is_identity():
    """At 900 the other prompts err the other way, at 100 the same way."""
    fit = [moments(900.0, 0, 0.9, 0.0), moments(100.0, 1, 0.9, 0.0)]
    held = [moments(900.0, 2, 1.1, 0.0), moments(100.0, 3, 0.9, 0.0)]
    found = SolverRefit().fit(fit, held)
    (low, high) = found.corrections
    assert low[1] == pytest.approx(0.9, abs=1e-3)
    assert high == (900.0, 1.0, 0.0)
    assert found.after < found.before
    assert found.notes["kept"] == "1 of 2 timesteps"


def test_nothing_kept_is_said_and_costs_nothing():
    found = SolverRefit().fit([moments(900.0, 0, 0.9, 0.0)], [moments(900.0, 2, 1.1, 0.0)])
    assert found.corrections == ()
    assert found.after == found.before > 0
    assert found.notes["kept"] == "none, none helped"


def test_without_a_held_out_state_a_timestep_is_not_corrected():
    found = SolverRefit().fit([moments(900.0, 0, 0.9, 0.0)], [])
    assert found.corrections == ()
    assert math.isinf(found.before)
    assert SolverRefit().fit([], []).corrections == ()


def test_held_out_errors_are_those_of_the_velocities():
    """The notes' two numbers, from the tensors themselves."""
    fit = [moments(500.0, seed, 0.93, 0.02, noise=0.2) for seed in range(4)]
    quantized, latents = draw(50), draw(51)
    velocity = 0.93 * quantized + 0.02 * latents + 0.2 * draw(52)
    found = SolverRefit().fit(fit, [Moments.of(500.0, quantized, latents, velocity)])
    ((_, a, b),) = found.corrections
    energy = float(velocity.double().square().sum())
    before = float((quantized - velocity).double().square().sum()) / energy
    after = float((a * quantized + b * latents - velocity).double().square().sum()) / energy
    assert (found.before, found.after) == pytest.approx((before, after), rel=1e-6)
    assert after < before


@pytest.mark.parametrize("factor", [0.3, 3.0, -1.0])
def test_a_scale_no_sampler_takes_is_not_used(factor):
    one = moments(500.0, 0, factor, 0.0)
    assert SolverRefit().fit([one], [one]).corrections == ()


def test_degenerate_states_give_a_defined_result():
    zero, x = torch.zeros(SHAPE), draw(1)
    for quantized, latents, velocity in ((zero, zero, zero), (zero, x, x), (x, 2 * x, 1.1 * x)):
        one = Moments.of(500.0, quantized, latents, velocity)
        for ridge in (0.0, 1e-4):
            found = SolverRefit(ridge=ridge).fit([one], [one])
            assert all(math.isfinite(n) for entry in found.corrections for n in entry)
            assert found.corrections == () or found.after < found.before


def test_values_that_are_not_finite_are_named():
    with pytest.raises(ValueError, match=r"timestep 500\.0 are not finite"):
        Moments.of(500.0, torch.full(SHAPE, math.nan), draw(1), draw(2))


def test_every_correction_is_a_sampler_s():
    found = SolverRefit().fit(*2 * [[moments(t, int(t), 0.9, 0.1) for t in (999.0, 20.0)]])
    spec = SamplerSpec(
        solver="unipc", n_steps=4, shift=3.0, guidance=4.0, corrections=found.corrections
    )
    assert spec.correction_at(20.0) == found.corrections[0][1:]


def test_tune_fits_the_guided_velocity():
    """Against a literal loop: both branches, at two timesteps of different guidance."""
    half, examples, states = Half(), [], []
    for t, guidance in ((800.0, 4.0), (200.0, 1.0)):
        for seed in (int(t), int(t) + 1):
            x = draw(seed)
            texts = (1.0, 0.5) if guidance != 1 else (1.0,)
            times = torch.full((SHAPE[0],), t)
            branches = [half(x, times, torch.tensor(text)) for text in texts]
            quantized = branches[0]
            if guidance != 1:
                quantized = branches[1] + guidance * (branches[0] - branches[1])
            # targets that a correction can reach, so that something is kept
            wanted = 0.9 * quantized + 0.05 * x
            targets = [branch + (wanted - quantized) for branch in branches]
            n = len(texts)
            text = torch.tensor(texts).repeat_interleave(SHAPE[0])[:, None, None, None, None]
            inputs = (torch.cat(n * [x]), times.repeat(n), text)
            examples.append(
                Example(inputs=inputs, target=torch.cat(targets), weight=1.0, guidance=guidance)
            )
            states.append(Moments.of(t, quantized, x, wanted))
    found = SolverRefit().tune(half, call, examples, examples)
    expected = SolverRefit().fit(states, states)
    assert found.corrections
    np.testing.assert_allclose(found.corrections, expected.corrections, atol=1e-5)
