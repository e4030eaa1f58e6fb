"""Distilling: what lessons and students take, see stages/teach.py and stages/distill.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hbxt_compress.algorithms import AnyDecoder, AnyDistiller
from hbxt_compress.costs.counting import count
from hbxt_compress.costs.rounding import numbers
from hbxt_compress.costs.shown import Forwards, alive_bytes
from hbxt_compress.costs.stages import BASE_BYTES, StageCost
from hbxt_compress.costs.work import Work
from hbxt_compress.models import Family
from hbxt_compress.source import Source
from hbxt_compress.stages.distill import AT_ONCE as FITTED_AT_ONCE
from hbxt_compress.stages.teach import AT_ONCE
from hbxt_compress.stages.view import AT_ONCE as VIEWED_AT_ONCE
from hbxt_compress.stages.view import n_real_clips

__all__ = ["distilling_costs", "lightening_costs"]


def distilling_costs(
    family: Family, source: Source, how: Sequence[AnyDistiller]
) -> list[StageCost]:
    """Both stages of every distiller; how many sets of levels a search tries is a guess."""
    spec, latent = family.sampler(source), family.latent_shape(source)
    forwards, timesteps = Forwards(family, source, latent), [float(t) for t in spec.timesteps()]
    held = _held(family, source)
    model_bytes = sum(size for size, _ in source.stamps.values())
    loaded = numbers(held, 2, 4)
    found, shared = list[StageCost](), set[tuple[object, ...]]()
    for one in how:
        levels = tuple(one.levels(spec.sigmas().tolist()))
        taught = _teach(family, source, forwards, one.n_clips, len(levels) + 1)
        if (lesson := (one.prompts, one.n_clips, levels)) not in shared:
            found.append(taught)
            shared.add(lesson)
        kept, fixed = taught.kept_bytes, BASE_BYTES + 4.0 * held
        peak = taught.peak_bytes - fixed
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


def lightening_costs(family: Family, source: Source, how: AnyDecoder | None) -> list[StageCost]:
    """Clips that the model makes, views of these and of real ones, and a decoder's training.

    source: has such a decoder already, or one of its sizes.
    """
    if how is None:
        return []
    clip, latent = family.geometry(source), family.latent_shape(source)
    vae = family.skeleton(source, "vae").to("meta")
    light = family.skeleton(source, "vae_decoder").to("meta")
    frames = torch.zeros(1, 3, clip.n_frames, clip.height, clip.width, device="meta")
    z = torch.zeros(1, *latent, device="meta")
    encoded, decoded, drawn = (
        count(run)[1]
        for run in (
            lambda: family.encode(source, vae, frames),
            lambda: family.decode(source, vae, z),
            lambda: family.decode(source, light, z),
        )
    )
    n_real, n_clips = n_real_clips(source, how.n_real), how.n_clips
    held = sum(one.numel() for one in vae.parameters())
    kept = float((n_real + n_clips) * (frames.numel() + 4 * z.numel()))
    learnt = sum(one.numel() for one in light.parameters())
    model_bytes = sum(size for size, _ in source.stamps.values())
    copied = Work.of(read=model_bytes, write=model_bytes, hash=2 * model_bytes)
    return [
        _teach(family, source, Forwards(family, source, latent), n_clips, 1),
        StageCost(
            stage="view",
            work=numbers(held, 2, 4) + encoded.work() * n_real + decoded.work() * n_clips,
            peak_bytes=BASE_BYTES + 4.0 * held
            + VIEWED_AT_ONCE * max(encoded.peak_bytes, decoded.peak_bytes),
            kept_bytes=kept,
        ),
        StageCost(
            stage="lighten",
            work=drawn.work() * how.n_decoded + copied,
            peak_bytes=BASE_BYTES + 16.0 * learnt + kept + 3.0 * how.at_once * drawn.written,
            kept_bytes=model_bytes,
        ),
    ]  # fmt: skip


def _teach(
    family: Family, source: Source, forwards: Forwards, n_clips: int, n_states: int
) -> StageCost:
    """n_states: of each clip, that are kept."""
    spec, held = family.sampler(source), _held(family, source)
    timesteps = [float(t) for t in spec.timesteps()]
    work = numbers(held, 2, 4) + forwards.work("text_encoder") * n_clips
    peak = 0.0
    for t in timesteps:
        work += _velocities(family, source, forwards, t, AT_ONCE) * (n_clips / AT_ONCE)
    for expert in {_expert(family, source, t) for t in timesteps}:
        peak = max(peak, alive_bytes(forwards.passes(expert, 2 * AT_ONCE)))
    kept = 4.0 * n_clips * n_states * math.prod(family.latent_shape(source))
    fixed = BASE_BYTES + 4.0 * held
    return StageCost(stage="teach", work=work, peak_bytes=fixed + peak, kept_bytes=kept)


def _held(family: Family, source: Source) -> int:
    """Parameters of what denoises."""
    return sum(n for one, n in family.parameters(source).items() if one in family.chained)


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
