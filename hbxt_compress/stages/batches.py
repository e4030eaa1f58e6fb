"""What a component is shown at the observed states: batches for both models, prompts kept apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hbxt_compress.sampler import SamplerSpec
from hbxt_compress.stages.side_by_side import Batch
from hbxt_compress.trajectories import Trajectory

__all__ = ["PROMPTS_AT_ONCE", "Texts", "text_batches", "transformer_batches"]

PROMPTS_AT_ONCE = 8

Texts = Mapping[int, tuple[Tensor, Tensor]]
"""By prompt index, -1 the empty one: hidden states of both text encoders, 1 S D."""


def text_batches(trajectories: Sequence[Trajectory], n_held_out: int) -> list[tuple[int, Batch]]:
    """(prompt index, batch) for every prompt and, first, for the empty one, index -1."""
    first = trajectories[0]
    tokens = [(-1, first.none_ids_1S, first.none_mask_1S)]
    tokens += [(i, one.ids_1S, one.mask_1S) for i, one in enumerate(trajectories)]
    least = len(trajectories) - n_held_out
    return [
        (
            i,
            Batch(
                full=(ids, mask),
                half=(ids, mask),
                weight=1.0,
                held_out=i >= least,
                rows_BS=mask.bool(),
            ),
        )
        for i, ids, mask in tokens
    ]


def transformer_batches(
    trajectories: Sequence[Trajectory],
    texts: Texts,
    n_held_out: int,
    sampler: SamplerSpec,
    *,
    second: bool,
) -> list[Batch]:
    """Both guidance branches of every observed state that one expert serves.

    A branch counts by what it adds to the velocity: guidance^2 and (guidance - 1)^2, scaled so that
    the mean is 1.
    """
    batches = []
    least = len(trajectories) - n_held_out
    indices = list(range(len(trajectories)))
    chunks = [*_chunks(indices[:least]), *_chunks(indices[least:])]
    for chunk in chunks:
        own = [torch.cat([texts[i][side] for i in chunk]) for side in (0, 1)]
        none = [texts[-1][side].expand(len(chunk), -1, -1) for side in (0, 1)]
        for k, t in enumerate(trajectories[0].timesteps_K.tolist()):
            if sampler.second_expert(t) != second:
                continue
            guidance = float(trajectories[0].guidance_K[k])
            latents = torch.stack([trajectories[i].latents_KCTHW[k] for i in chunk])
            timestep = torch.full((len(chunk),), t)
            total = guidance**2 + (guidance - 1) ** 2
            for sides, factor in ((own, guidance), (none, guidance - 1)):
                if factor == 0:
                    continue
                batches.append(
                    Batch(
                        full=(latents, timestep, sides[0]),
                        half=(latents, timestep, sides[1]),
                        weight=factor**2 / total * (1 if guidance == 1 else 2),
                        held_out=chunk[0] >= least,
                    )
                )
    return batches


def _chunks(indices: Sequence[int]) -> list[Sequence[int]]:
    return [indices[i : i + PROMPTS_AT_ONCE] for i in range(0, len(indices), PROMPTS_AT_ONCE)]
