"""Distilling: what lessons and students take, see stages/teach.py and stages/distill.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hbxt_compress.algorithms import AnyDistiller
from hbxt_compress.costs.rounding import numbers
from hbxt_compress.costs.shown import Forwards, alive_bytes
from hbxt_compress.costs.stages import BASE_BYTES, StageCost
from hbxt_compress.costs.work import Work
from hbxt_compress.models import Family
from hbxt_compress.source import Source
from hbxt_compress.stages.distill import AT_ONCE as FITTED_AT_ONCE
from hbxt_compress.stages.teach import AT_ONCE

__all__ = ["distilling_costs"]


def distilling_costs(
    family: Family, source: Source, how: Sequence[AnyDistiller]
) -> list[StageCost]:
    """Both stages of every distiller; how many sets of levels a search tries is a guess."""
    spec, latent = family.sampler(source), family.latent_shape(source)
    forwards, timesteps = Forwards(family, source, latent), [float(t) for t in spec.timesteps()]
    held = sum(n for one, n in family.parameters(source).items() if one in family.chained)
    model_bytes = sum(size for size, _ in source.stamps.values())
    loaded = numbers(held, 2, 4)
    found = []
    for one in how:
        work = loaded + forwards.work("text_encoder") * one.n_clips
        peak = 0.0
        for t in timesteps:
            work += _velocities(family, source, forwards, t, AT_ONCE) * (one.n_clips / AT_ONCE)
        for expert in {_expert(family, source, t) for t in timesteps}:
            peak = max(peak, alive_bytes(forwards.passes(expert, 2 * AT_ONCE)))
        n_states = len(one.levels(spec.sigmas().tolist())) + 1
        kept = 4.0 * one.n_clips * n_states * math.prod(latent)
        fixed = BASE_BYTES + 4.0 * held
        found.append(StageCost(stage="teach", work=work, peak_bytes=fixed + peak, kept_bytes=kept))
        each = _velocities(family, source, forwards, timesteps[0], FITTED_AT_ONCE)
        fitting = each * (one.n_velocities(len(timesteps)) / FITTED_AT_ONCE)
        copied = Work.of(read=model_bytes, write=model_bytes, hash=2 * model_bytes)
        found.append(
            StageCost(
                stage="distill",
                work=loaded + fitting + copied,
                peak_bytes=fixed + 3 * kept + peak * FITTED_AT_ONCE / AT_ONCE,
                kept_bytes=model_bytes,
            )
        )
    return found


def _expert(family: Family, source: Source, timestep: float) -> str:
    second = family.sampler(source).second_expert(timestep)
    return "transformer_2" if second else "transformer"


def _velocities(
    family: Family, source: Source, forwards: Forwards, timestep: float, n: int
) -> Work:
    """The guided velocities of n states."""
    sides = 1 if family.sampler(source).guidance_at(timestep) == 1 else 2
    expert = _expert(family, source, timestep)
    return forwards.work(expert, n * sides)
