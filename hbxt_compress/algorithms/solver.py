"""Solver refit: two numbers a noise level that take the drift out of a quantized model's velocity.

Where the quantized model's guided velocity v_q errs in the same way on every prompt, a v_q + b x is
nearer to the original's v, x being the latents. (a, b) are least squares over the calibration
states of a timestep, in closed form, with a ridge towards (1, 0):

    min sum ||a v_q + b x - v||^2 + ridge * ((a - 1)^2 sum ||v_q||^2 + b^2 sum ||x||^2)

The sampler interpolates between timesteps, so other step counts work; the graph stays as it is. In
the spirit of Q-Sched (2025, arXiv 2509.01624), which learns such factors on the sampler's steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from hbxt_compress.algorithms.example import Example
from hbxt_compress.strict import Settings

__all__ = ["Moments", "Refitted", "SolverRefit"]

_LIMITS = (0.5, 2.0)  # of a: what the sampler takes
_IDENTITY = (1.0, 0.0)
_RANK = 1e-10  # smaller eigenvalues, relative to the largest, are rounding errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Sums over the states of one timestep: the float64 Gram matrix 3 3 of (v_q, x, v)."""

    timestep: float
    gram: Tensor

    @classmethod
    def of(cls, timestep: float, quantized: Tensor, latents: Tensor, velocity: Tensor) -> Moments:
        """Of some states; the three tensors have one shape. ValueError if they are not finite."""
        rows = torch.stack([one.detach().cpu().double().flatten() for one in
                            (quantized, latents, velocity)])  # fmt: skip
        gram = rows @ rows.T
        if not bool(torch.isfinite(gram).all()):
            raise ValueError(f"velocities at timestep {timestep} are not finite")
        return cls(timestep=timestep, gram=gram)

    def error(self, a: float, b: float) -> float:
        """sum ||a v_q + b x - v||^2."""
        weights = torch.tensor([a, b, -1.0], dtype=torch.float64)
        return max(float(weights @ self.gram @ weights), 0.0)

    @property
    def energy(self) -> float:
        """sum ||v||^2."""
        return float(self.gram[2, 2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Refitted:
    """What a fit found. corrections: (timestep, a, b) by rising timestep, () if nothing helps.

    before, after: relative squared errors of the guided velocity on held-out prompts, 0..inf.
    """

    corrections: tuple[tuple[float, float, float], ...]
    before: float
    after: float
    notes: Mapping[str, float | str]


class SolverRefit(Settings):
    """Fits the sampler to the quantized model; comes after everything that changes weights."""

    VERSION: ClassVar[int] = 1

    ridge: Annotated[float, Field(ge=0)] = 1e-4
    """pull towards no correction, relative to the energies of velocity and latents"""
    largest: Annotated[float, Field(gt=0)] = 1.0e9
    """parameters of the largest component that it may hold, in float32; else it is left out"""

    def tune(
        self,
        student: nn.Module,
        call: Callable[..., Tensor],
        examples: Sequence[Example],
        held_out: Sequence[Example],
    ) -> Refitted:
        """The corrections of one expert; inputs are (latents, timestep, text), of one timestep.

        Raises:
            ValueError: velocities that are not finite.
        """
        sides = [_moments(student, call, side) for side in (examples, held_out)]
        return self.fit(*sides)

    def fit(self, states: Sequence[Moments], held_out: Sequence[Moments]) -> Refitted:
        """The corrections from sums, merged by timestep; each is kept if it helps held-out prompts.

        A timestep where it does not help stays in the table as (1, 0).
        """
        chosen, judges = _merged(states), _merged(held_out)
        table: list[tuple[float, float, float]] = []
        for timestep, own in sorted(chosen.items()):
            a, b = self._solve(own)
            judge = judges.get(timestep)
            if judge is None or not judge.error(a, b) < judge.error(*_IDENTITY):
                a, b = _IDENTITY
            table.append((timestep, a, b))
        n_kept = sum((a, b) != _IDENTITY for _, a, b in table)
        before = after = energy = 0.0
        for timestep, a, b in table:
            if timestep in judges:
                before += judges[timestep].error(*_IDENTITY)
                after += judges[timestep].error(a, b)
                energy += judges[timestep].energy
        before, after = (one / energy if energy else math.inf for one in (before, after))
        return Refitted(
            corrections=tuple(table) if n_kept else (),
            before=before,
            after=after,
            notes={
                "kept": f"{n_kept} of {len(table)} timesteps" if n_kept else "none, none helped",
                "held_out_before": before,
                "held_out_after": after,
            },
        )

    def _solve(self, own: Moments) -> tuple[float, float]:
        """(a, b); the identity where there is nothing to fit or the fit is not to be believed."""
        gram, right = own.gram[:2, :2], own.gram[:2, 2]
        start = torch.tensor(_IDENTITY, dtype=torch.float64)
        pull = self.ridge * torch.diag(gram.diagonal())
        # the pseudo-inverse takes latents in proportion to the velocity, and velocities of 0
        change = torch.linalg.pinv(gram + pull, rtol=_RANK, hermitian=True) @ (right - gram @ start)
        a, b = (start + change).tolist()
        if not (math.isfinite(a) and math.isfinite(b) and _LIMITS[0] <= a <= _LIMITS[1]):
            return _IDENTITY
        return a, b


def _merged(moments: Sequence[Moments]) -> dict[float, Moments]:
    found: dict[float, Moments] = {}
    for one in moments:
        before = found.get(one.timestep)
        gram = one.gram if before is None else before.gram + one.gram
        found[one.timestep] = Moments(timestep=one.timestep, gram=gram)
    return found


@torch.no_grad()
def _moments(
    student: nn.Module, call: Callable[..., Tensor], examples: Sequence[Example]
) -> list[Moments]:
    found = []
    for one in examples:
        quantized, velocity = one.guided(call(student, *one.inputs)), one.guided(one.target)
        latents, timesteps = one.inputs[:2]
        states = latents[: len(velocity)]
        found.append(Moments.of(float(timesteps.flatten()[0]), quantized, states, velocity))
    return found
