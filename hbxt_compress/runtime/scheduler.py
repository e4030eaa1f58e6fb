"""Denoiser: the solver that takes latents from noise to clip, in numpy.

Flow-matching Euler, and UniPC (Zhao et al. 2023, arXiv 2302.04867) in its data-prediction form with
B(h) weights, multistep with corrector. With sigma the noise level, alpha = 1 - sigma and
lambda = log alpha - log sigma, one UniPC step from s to t with h = lambda_t - lambda_s is

    x_t = sigma_t / sigma_s * x - alpha_t * (e^-h - 1) * m_0 - alpha_t * B(h) * sum_k rho_k D_k

where m_i are the last predictions of the clean latents and D_k = (m_k - m_0) / r_k. The corrector
repeats the last step with the newest prediction among the D_k. Coefficients are float32 and in
diffusers' order of operations: at 50 steps they cancel to four digits, and equal beats better.

For distilled models: renoise takes the predicted clean latents x - sigma v to the next level with
fresh noise (consistency sampling, Song et al. 2023, arXiv 2303.01469, section 3), and fitted takes
steps with coefficients of their own (Shaul et al. 2024, arXiv 2403.01329).
"""

from __future__ import annotations

from collections import deque

import numpy as np

from hbxt_compress.errors import UsageError
from hbxt_compress.runtime.noise import noise
from hbxt_compress.sampler import SamplerSpec

__all__ = ["Denoiser"]


class Denoiser:
    """One trajectory: call `step` n_steps times with the velocity at `timesteps[0..n_steps-1]`."""

    def __init__(self, spec: SamplerSpec, seed: int = 0) -> None:
        """seed: of the noise that renoise adds; the initial noise of that seed is another one."""
        self.spec = spec
        self.seed = seed
        self.sigmas = spec.sigmas()
        self.timesteps = spec.timesteps()
        self.n_done = 0
        self._predictions: deque[np.ndarray] = deque(maxlen=spec.solver_order)  # newest last
        self._before: np.ndarray | None = None
        self._basis: list[np.ndarray] = []  # of fitted: the initial noise, then every velocity
        self._order = 0

    @np.errstate(invalid="ignore", over="ignore")  # who drives it judges the latents
    def step(self, velocity: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """The sample at the next, lower noise level; float32 of the sample's shape.

        velocity: as the model and guidance give it; the spec's corrections are applied here.
        """
        if self.n_done >= self.spec.n_steps:
            raise UsageError(f"all {self.spec.n_steps} steps are done: make a new Denoiser")
        velocity = np.asarray(velocity, dtype=np.float32)
        sample = np.asarray(sample, dtype=np.float32)
        a, b = self.spec.correction_at(float(self.timesteps[self.n_done]))
        if (a, b) != (1.0, 0.0):
            velocity = np.float32(a) * velocity + np.float32(b) * sample
        advance = {
            "euler": self._euler,
            "unipc": self._unipc,
            "renoise": self._renoise,
            "fitted": self._fitted,
        }
        result = advance[self.spec.solver](velocity, sample)
        self.n_done += 1
        return result

    def _euler(self, velocity: np.ndarray, sample: np.ndarray) -> np.ndarray:
        change = self.sigmas[self.n_done + 1] - self.sigmas[self.n_done]
        return np.asarray(sample + change * velocity)

    def _renoise(self, velocity: np.ndarray, sample: np.ndarray) -> np.ndarray:
        clean, level = sample - self.sigmas[self.n_done] * velocity, self.sigmas[self.n_done + 1]
        if level == 0:
            return np.asarray(clean)
        fresh = noise(self.seed, sample.shape, self.n_done + 1)
        return np.asarray((np.float32(1) - level) * clean + level * fresh)

    def _fitted(self, velocity: np.ndarray, sample: np.ndarray) -> np.ndarray:
        basis = self._basis
        basis += [velocity] if basis else [sample, velocity]
        weights = np.array(self.spec.coefficients[self.n_done], dtype=np.float32)
        return np.asarray(sum(w * one for w, one in zip(weights, basis, strict=True)))

    def _unipc(self, velocity: np.ndarray, sample: np.ndarray) -> np.ndarray:
        now = self.n_done
        newest = sample - self.sigmas[now] * velocity
        if self._before is not None and now - 1 not in self.spec.disable_corrector:
            sample = self._move(self._before, now - 1, self._order, newest)
        self._predictions.append(newest)
        self._order = min(self.spec.solver_order, self.spec.n_steps - now, len(self._predictions))
        self._before = sample
        return self._move(sample, now, self._order, None)

    def _move(self, x: np.ndarray, s: int, order: int, corrector: np.ndarray | None) -> np.ndarray:
        """x taken from noise level s to s + 1; a corrector also knows the prediction there."""
        with np.errstate(
            divide="ignore"
        ):  # the last level is 0: its lambda is +inf, as it should be
            alphas = np.float32(1) - self.sigmas
            lambdas = np.log(alphas) - np.log(self.sigmas)
        h = lambdas[s + 1] - lambdas[s]
        hh = -h
        phi_1 = np.expm1(hh)
        b_h = hh if self.spec.solver_type == "bh1" else phi_1
        m_0 = self._predictions[-1]
        ratios = [(lambdas[s - k] - lambdas[s]) / h for k in range(1, order)]
        differences = [
            (self._predictions[-(k + 1)] - m_0) / ratio for k, ratio in enumerate(ratios, start=1)
        ]
        if corrector is not None:
            differences.append(corrector - m_0)
        weights = _weights(
            [*ratios, np.float32(1)], hh, phi_1, b_h, corrected=corrector is not None
        )
        result = self.sigmas[s + 1] / self.sigmas[s] * x - alphas[s + 1] * phi_1 * m_0
        if differences:
            mixed = sum(weight * one for weight, one in zip(weights, differences, strict=True))
            result = result - alphas[s + 1] * b_h * mixed
        return np.asarray(result, dtype=np.float32)


def _weights(
    ratios: list[np.float32], hh: np.float32, phi_1: np.float32, b_h: np.float32, *, corrected: bool
) -> np.ndarray:
    """rho_k, float32: one for each difference; the shortest cases have 1/2 as the paper advises."""
    order = len(ratios)
    if order == (1 if corrected else 2):
        return np.array([0.5], dtype=np.float32)
    if order == 1:
        return np.zeros(0, dtype=np.float32)
    phi_k, factorial = phi_1 / hh - np.float32(1), 1
    rows, right = [], []
    for i in range(1, order + 1):
        rows.append(np.array(ratios, dtype=np.float32) ** (i - 1))
        right.append(phi_k * np.float32(factorial) / b_h)
        factorial *= i + 1
        phi_k = phi_k / hh - np.float32(1 / factorial)
    matrix, vector = np.stack(rows), np.array(right, dtype=np.float32)
    if corrected:
        return np.linalg.solve(matrix, vector)
    return np.linalg.solve(matrix[:-1, :-1], vector[:-1])
