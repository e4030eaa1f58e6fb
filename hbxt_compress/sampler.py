"""SamplerSpec: the numbers a flow-matching sampler runs on. They travel in the manifest.

The schedules are those of diffusers' FlowMatchEulerDiscreteScheduler and of its
UniPCMultistepScheduler with flow sigmas, to the last bit that float32 keeps. Options of theirs that
no Wan checkpoint uses are refused by name rather than ignored. A distilled model has noise levels
of its own instead, and perhaps a solver that was fitted to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from numbers import Integral, Real
from typing import Literal, Self, cast, get_args

import numpy as np

from hbxt_compress.errors import ArtifactError, SourceError, UsageError, listing

__all__ = ["STUDENTS_SAMPLER", "SamplerSpec", "Solver", "SolverType"]

Solver = Literal["euler", "unipc", "renoise", "fitted"]
SolverType = Literal["bh1", "bh2"]

STUDENTS_SAMPLER = "sampler.json"
"""in a distilled model's folder: a SamplerSpec, which goes before its scheduler"""
_EPS = 1e-6  # UniPC starts at 1 - eps: at sigma 1 the signal's logarithm is infinite
_MOST_STEPS, _MOST_TIMESTEPS = 1000, 1_000_000
_A = (0.5, 2.0)  # a correction beyond them mends nothing: the model is broken

# Options that must keep this value: option -> the only value supported.
_EULER_ONLY: Mapping[str, object] = {
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}
_UNIPC_ONLY: Mapping[str, object] = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "predict_x0": True,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "thresholding": False,
    "solver_p": None,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
# What diffusers assumes where a config is silent and that differs from what we need.
_UNIPC_DEFAULTS: Mapping[str, object] = {"prediction_type": "epsilon", "use_flow_sigmas": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSpec:
    """How latents are denoised: solver, steps, schedule and guidance.

    Guidance follows diffusers: v = v_uncond + guidance * (v_cond - v_uncond); 1.0 means one forward
    a step. With two experts, `transformer` serves timesteps >= boundary * n_train_timesteps and
    `transformer_2` the rest, with `guidance_2` (None: the same guidance).
    solver_order, solver_type and disable_corrector (steps without the corrector) are UniPC's.
    corrections: (timestep, a, b) by rising timestep, fitted to a quantized model: the solver takes
    a * v + b * x for the guided velocity v at latents x; none: v itself.
    levels: noise levels that the steps start at, falling within 0..1; none: solver and shift say.
    renoise predicts the clean latents at each level and takes them to the next with fresh noise.
    coefficients, of fitted: step k gives c_0 eps + sum_j c_(j+1) v_j from the initial noise eps and
    the velocities v_0..v_k so far, so it has k + 2 of them.
    """

    solver: Solver
    n_steps: int
    shift: float
    guidance: float
    guidance_2: float | None = None
    boundary: float | None = None
    n_train_timesteps: int = 1000
    solver_order: int = 2
    solver_type: SolverType = "bh2"
    disable_corrector: tuple[int, ...] = ()
    corrections: tuple[tuple[float, float, float], ...] = ()
    levels: tuple[float, ...] = ()
    coefficients: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        problems = list(_type_problems(self))
        if problems:
            raise UsageError(f"the sampler cannot run:\n{listing(problems)}")
        if self.solver not in get_args(Solver):
            problems.append(f"solver {self.solver!r}: must be one of {', '.join(get_args(Solver))}")
        if not 1 <= self.n_steps <= _MOST_STEPS:
            problems.append(f"n_steps {self.n_steps}: must be 1 to {_MOST_STEPS}")
        if not (math.isfinite(self.shift) and self.shift > 0):
            problems.append(f"shift {self.shift}: must be a positive number")
        for name, guidance in (("guidance", self.guidance), ("guidance_2", self.guidance_2)):
            if guidance is not None and not (math.isfinite(guidance) and guidance >= 1):
                problems.append(f"{name} {guidance}: must be at least 1.0, which turns it off")
        if self.boundary is not None and not 0 <= self.boundary <= 1:
            problems.append(f"boundary {self.boundary}: must lie in 0..1")
        if self.guidance_2 is not None and self.boundary is None:
            problems.append(f"guidance_2 {self.guidance_2}: needs a boundary and a second expert")
        if not 1 <= self.n_train_timesteps <= _MOST_TIMESTEPS:
            problems.append(
                f"n_train_timesteps {self.n_train_timesteps}: must be 1 to {_MOST_TIMESTEPS}"
            )
        if self.solver_order not in (1, 2, 3):
            problems.append(f"solver_order {self.solver_order}: must be 1, 2 or 3")
        if self.solver_type not in ("bh1", "bh2"):
            problems.append(f"solver_type {self.solver_type!r}: must be 'bh1' or 'bh2'")
        problems += _correction_problems(self.corrections, self.n_train_timesteps)
        problems += _level_problems(self)
        if problems:
            raise UsageError(f"the sampler cannot run:\n{listing(problems)}")

    def with_steps(self, n_steps: int | None) -> Self:
        """This spec with another number of steps; itself for None.

        Raises:
            UsageError: it has levels of its own, and another number of them.
        """
        if n_steps is None or n_steps == self.n_steps:
            return self
        if self.levels:
            raise UsageError(
                f"{n_steps} steps: this model denoises in {self.n_steps}, at the noise levels that "
                "it was distilled for; leave the number of steps out"
            )
        return replace(self, n_steps=n_steps)

    def observed(self, n_steps: int, steps: Sequence[int]) -> tuple[Self, tuple[int, ...]]:
        """This spec with n_steps, and which of them calibration looks at; with own levels, all."""
        if self.levels:
            return self, tuple(range(self.n_steps))
        return self.with_steps(n_steps), tuple(steps)

    def with_guidance(self, guidance: float | None) -> Self:
        """This spec with one guidance for all steps and experts; itself for None.

        Corrections were fitted to the velocity at the old guidance: another one drops them.
        """
        if guidance is None:
            return self
        same = guidance == self.guidance and self.guidance_2 in (None, guidance)
        corrections = self.corrections if same else ()
        return replace(self, guidance=guidance, guidance_2=None, corrections=corrections)

    def guidance_at(self, timestep: float) -> float:
        """The guidance of a step; 1.0 or more."""
        second = self.guidance if self.guidance_2 is None else self.guidance_2
        return second if self.second_expert(timestep) else self.guidance

    def second_expert(self, timestep: float) -> bool:
        """Whether `transformer_2` serves this timestep."""
        return self.boundary is not None and timestep < self.boundary * self.n_train_timesteps

    def correction_at(self, timestep: float) -> tuple[float, float]:
        """(a, b) of a step: linear between its expert's entries, constant outside; else (1, 0)."""
        second = self.second_expert(timestep)
        own = [one for one in self.corrections if self.second_expert(one[0]) == second]
        if not own:
            return 1.0, 0.0
        timesteps, a, b = zip(*own, strict=True)
        at = float(timestep)
        return float(np.interp(at, timesteps, a)), float(np.interp(at, timesteps, b))

    def to_json(self) -> dict[str, object]:
        """Plain JSON values; corrections, levels and coefficients only where there are any."""
        document = {**asdict(self), "disable_corrector": list(self.disable_corrector)}
        fitted: dict[str, list[object]] = {
            "corrections": [list(one) for one in document.pop("corrections")],
            "levels": list(document.pop("levels")),
            "coefficients": [list(one) for one in document.pop("coefficients")],
        }
        return document | {key: values for key, values in fitted.items() if values}

    @classmethod
    def from_json(cls, document: Mapping[str, object]) -> Self:
        """The spec a manifest holds; ArtifactError for keys or values that are not a sampler's."""
        known = {field.name for field in fields(cls)}
        problems = [f"sampler.{key}: unknown key" for key in sorted(set(document) - known)]
        required = {"solver", "n_steps", "shift", "guidance"}
        problems += [f"sampler.{key}: missing" for key in sorted(required - set(document))]
        if problems:
            raise ArtifactError(f"the sampler is not readable:\n{listing(problems)}")
        values = dict(document)
        try:
            values["disable_corrector"] = tuple(
                cast(list[int], values.get("disable_corrector", ()))
            )
            values["levels"] = tuple(cast(list[float], values.get("levels", ())))
            for key in ("corrections", "coefficients"):
                rows = cast(list[list[float]], values.get(key, ()))
                values[key] = tuple(tuple(one) for one in rows)
            return cls(**values)  # type: ignore[arg-type]
        except (TypeError, OverflowError, UsageError) as error:
            raise ArtifactError(f"the sampler is not readable: {error}") from error

    @classmethod
    def distilled(
        cls, steps: Sequence[int], shift: float, *, n_train_timesteps: int = 1000
    ) -> Self:
        """The sampler of a student that was distilled to a few timesteps, without guidance.

        It predicts the clean latents at each step and adds noise again. A step s of n starts at the
        level shift * l / (1 + (shift - 1) * l) with l = s / n, as DMD trainers warp theirs.

        Raises:
            UsageError: the steps do not fall within 1..n_train_timesteps, or shift is not positive.
        """
        n = n_train_timesteps
        if not steps or any(a <= b for a, b in pairwise((n + 1, *steps, 0))):
            shown = ",".join(str(step) for step in steps)
            raise UsageError(f"steps {shown}: must fall within 1..{n}, such as 1000,750,500")
        if not (math.isfinite(shift) and shift > 0):
            raise UsageError(f"shift {shift}: must be a positive number; Hummingbird-XT's is 5")
        levels = tuple(shift * (s / n) / (1 + (shift - 1) * (s / n)) for s in steps)
        return cls(
            solver="renoise", n_steps=len(levels), shift=shift, guidance=1.0, levels=levels,
            n_train_timesteps=n,
        )  # fmt: skip

    @classmethod
    def from_diffusers(
        cls,
        config: Mapping[str, object],
        *,
        n_steps: int,
        guidance: float,
        guidance_2: float | None = None,
        boundary: float | None = None,
    ) -> Self:
        """The spec of a diffusers scheduler_config.json.

        Raises:
            SourceError: another scheduler class, or options not followed here (all named).
        """
        name = config.get("_class_name")
        if name == "FlowMatchEulerDiscreteScheduler":
            _refuse_others(config, _EULER_ONLY, {}, str(name))
            own = {"solver": "euler", "shift": config.get("shift", 1.0)}
        elif name == "UniPCMultistepScheduler":
            _refuse_others(config, _UNIPC_ONLY, _UNIPC_DEFAULTS, str(name))
            own = {
                "solver": "unipc",
                "shift": config.get("flow_shift", 1.0),
                "solver_order": config.get("solver_order", 2),
                "solver_type": config.get("solver_type", "bh2"),
                "disable_corrector": _as_tuple(config.get("disable_corrector") or ()),
            }
        else:
            raise SourceError(
                f"scheduler class {name!r} is not supported: set scheduler/scheduler_config.json "
                "to UniPCMultistepScheduler with flow sigmas or FlowMatchEulerDiscreteScheduler"
            )
        try:
            return cls(
                n_steps=n_steps,
                guidance=guidance,
                guidance_2=guidance_2,
                boundary=boundary,
                n_train_timesteps=cast(int, config.get("num_train_timesteps", 1000)),
                **own,  # type: ignore[arg-type]
            )
        except (TypeError, UsageError) as error:
            raise SourceError(f"{name}: {error}") from error

    def sigmas(self) -> np.ndarray:
        """n_steps + 1 noise levels from 1 down to 0, float32, as diffusers' scheduler has them."""
        return np.append(self._levels(), 0.0).astype(np.float32)

    def timesteps(self) -> np.ndarray:
        """n_steps timesteps as the transformer receives them, float32; whole numbers for UniPC."""
        if self.solver == "unipc" and not self.levels:
            return np.trunc(self._levels() * self.n_train_timesteps).astype(np.float32)
        return np.asarray(self.sigmas()[:-1] * np.float32(self.n_train_timesteps))

    def _levels(self) -> np.ndarray:
        """The noise levels without the final 0, float64."""
        if self.levels:
            return np.array(self.levels, dtype=np.float64)
        if self.solver == "unipc":
            levels = np.linspace(1, 1 / self.n_train_timesteps, self.n_steps + 1)[:-1]
            levels = _shifted(levels, self.shift)
            if abs(levels[0] - 1) < _EPS:
                levels[0] -= _EPS
            return levels
        # diffusers shifts its whole training schedule and then what it picks between its ends.
        n = self.n_train_timesteps
        ends = np.array([n, 1], dtype=np.float32) / np.float32(n)
        highest, lowest = (float(level) for level in _shifted(ends, self.shift))
        return _shifted(np.linspace(highest * n, lowest * n, self.n_steps) / n, self.shift)


def _as_tuple(value: object) -> object:
    """What JSON has lists for; anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def _type_problems(spec: SamplerSpec) -> Iterator[str]:
    """Fields that JSON gave another type; what they hold is looked at afterwards."""

    def problem(name: str, kind: type, wanted: str) -> Iterator[str]:
        value = getattr(spec, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            yield f"{name} {value!r:.60}: must be {wanted}"

    for name in ("n_steps", "n_train_timesteps", "solver_order"):
        yield from problem(name, Integral, "a whole number")
    for name in ("shift", "guidance", "guidance_2", "boundary"):
        if name in ("shift", "guidance") or getattr(spec, name) is not None:
            yield from problem(name, Real, "a number")
    for name in ("solver", "solver_type"):
        yield from problem(name, str, "text")
    steps = spec.disable_corrector
    if not isinstance(steps, tuple) or not all(isinstance(step, Integral) for step in steps):
        yield f"disable_corrector {spec.disable_corrector!r:.60}: must be whole numbers"


def _correction_problems(
    corrections: tuple[tuple[float, float, float], ...], n_train_timesteps: int
) -> list[str]:
    problems, before = [], -math.inf
    for i, one in enumerate(corrections):
        numbers = all(type(x) in (int, float) and math.isfinite(x) for x in one)
        if len(one) != 3 or not numbers:
            problems.append(
                f"corrections[{i}] {one}: must be three finite numbers (timestep, a, b)"
            )
            continue
        timestep, a, _ = one
        if not 0 <= timestep <= n_train_timesteps or timestep <= before:
            problems.append(
                f"corrections[{i}] timestep {timestep}: must rise within 0..{n_train_timesteps}"
            )
        if not _A[0] <= a <= _A[1]:
            problems.append(f"corrections[{i}] a {a}: must lie in {_A[0]}..{_A[1]}")
        before = timestep
    return problems


def _level_problems(spec: SamplerSpec) -> list[str]:
    """Of levels and coefficients; the solver decides which of them it needs."""
    problems, n = [], spec.n_steps
    numbers = all(type(x) in (int, float) for x in spec.levels)
    falling = numbers and all(a > b for a, b in pairwise((1.0 + _EPS, *spec.levels, 0.0)))
    if spec.levels and (len(spec.levels) != n or not falling):
        problems.append(f"levels {spec.levels}: must be {n} numbers that fall from 1 to above 0")
    if spec.solver in ("renoise", "fitted") and not spec.levels:
        problems.append(f"solver {spec.solver}: needs the noise levels of its {n} steps")
    if spec.solver == "unipc" and spec.levels and spec.levels[0] > 1 - _EPS:
        problems.append(f"levels[0] {spec.levels[0]}: unipc cannot start at a level of 1")
    if (spec.solver == "fitted") != bool(spec.coefficients):
        problems.append(f"coefficients: {spec.solver} has {len(spec.coefficients)} rows of them")
    elif spec.coefficients:
        wanted = [k + 2 for k in range(n)]
        if [len(row) for row in spec.coefficients] != wanted:
            problems.append(f"coefficients: must be {n} rows of {wanted} numbers")
        elif not all(
            type(x) in (int, float) and math.isfinite(x) for row in spec.coefficients for x in row
        ):
            problems.append("coefficients: must be finite numbers")
    return problems


def _shifted(levels: np.ndarray, shift: float) -> np.ndarray:
    return shift * levels / (1 + (shift - 1) * levels)


def _refuse_others(
    config: Mapping[str, object],
    only: Mapping[str, object],
    defaults: Mapping[str, object],
    name: str,
) -> None:
    problems = []
    for option, wanted in only.items():
        value = config.get(option, defaults.get(option, wanted))
        if value != wanted:
            problems.append(f"{option}: {value!r} (only {wanted!r} is supported)")
    if problems:
        raise SourceError(
            f"{name} has options this sampler does not follow; change them in "
            f"scheduler/scheduler_config.json:\n{listing(problems)}"
        )
