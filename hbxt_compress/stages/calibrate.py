"""Calibrate: run the real model on its own trajectories and keep the states it passes through.

Every prompt is denoised in full precision with the sampler that ships, from the noise the runtime
would draw. What layers see at these states is summed up by `quantize`, for the full-precision model
and for the half quantized one at once. One file a prompt; a killed run goes on with the next one.
Ranks share the prompts, each with the whole model.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch

from hbxt_compress.errors import CalibrationError
from hbxt_compress.machine import Machine
from hbxt_compress.prompts import PromptSet
from hbxt_compress.source import Source
from hbxt_compress.stages.full_model import FullModel
from hbxt_compress.store import Work
from hbxt_compress.trajectories import Trajectory

__all__ = ["FACTS", "VERSION", "calibrate"]

VERSION = 2
FACTS = ("torch", "diffusers", "transformers")
log = logging.getLogger(__name__)


def calibrate(work: Work, source: Source, prompts: PromptSet, on: Machine) -> None:
    """Writes `prompt-NNN.safetensors`, each the Trajectory of one prompt.

    Raises:
        CalibrationError: the model's latents are not finite.
    """
    teacher: FullModel | None = None
    work.expect(len(prompts.prompts))
    for i, (prompt, seed) in enumerate(prompts.items()):
        if not work.ranks.owns(i):
            continue
        log.info(
            "calibrate: %s", prompt, extra={"progress": (i, len(prompts.prompts), "calibrate")}
        )

        def make(path: Path, prompt: str = prompt, seed: int = seed) -> None:
            nonlocal teacher
            teacher = teacher or FullModel(source, torch.device(on.device))
            _observed(teacher, prompts, prompt, seed).save(path)

        work.piece(f"prompt-{i:03d}.safetensors", make)
    work.ranks.barrier()
    done = len(prompts.prompts)
    log.info("calibrate: done", extra={"progress": (done, done, "calibrate")})


def _observed(teacher: FullModel, prompts: PromptSet, prompt: str, seed: int) -> Trajectory:
    """The states of one prompt's whole trajectory."""
    spec, steps = teacher.sampler.observed(prompts.n_steps, prompts.observe)
    texts = teacher.encode([prompt, ""])
    states = list(teacher.states(spec, [seed], texts[:1], texts[1:]))
    if not np.isfinite(states[-1].x).all():
        raise CalibrationError(
            f"prompt {prompt!r}: the full-precision model's latents are not finite"
        )
    seen = [states[k] for k in steps]
    (ids, mask), (none_ids, none_mask) = (teacher.tokens(text) for text in (prompt, ""))
    return Trajectory(
        latents_KCTHW=torch.from_numpy(np.concatenate([one.x for one in seen])),
        timesteps_K=torch.tensor([one.timestep for one in seen]),
        guidance_K=torch.tensor([one.guidance for one in seen]),
        ids_1S=ids.cpu(),
        mask_1S=mask.cpu(),
        none_ids_1S=none_ids.cpu(),
        none_mask_1S=none_mask.cpu(),
    )
