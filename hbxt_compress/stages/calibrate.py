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
from torch import Tensor

from hbxt_compress.errors import CalibrationError
from hbxt_compress.machine import Machine
from hbxt_compress.models import family_of
from hbxt_compress.prompts import PromptSet
from hbxt_compress.runtime.generate import noise
from hbxt_compress.runtime.scheduler import Denoiser
from hbxt_compress.runtime.text import PromptTokenizer
from hbxt_compress.source import Source
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
    model = None
    work.expect(len(prompts.prompts))
    for i, (prompt, seed) in enumerate(prompts.items()):
        if not work.ranks.owns(i):
            continue
        log.info(
            "calibrate: %s", prompt, extra={"progress": (i, len(prompts.prompts), "calibrate")}
        )

        def make(path: Path, prompt: str = prompt, seed: int = seed) -> None:
            nonlocal model
            model = model or _FullPrecision(source, prompts, torch.device(on.device))
            model.denoise(prompt, seed).save(path)

        work.piece(f"prompt-{i:03d}.safetensors", make)
    work.ranks.barrier()
    done = len(prompts.prompts)
    log.info("calibrate: done", extra={"progress": (done, done, "calibrate")})


class _FullPrecision:
    """The model as it came, without its VAE."""

    def __init__(self, source: Source, prompts: PromptSet, device: torch.device) -> None:
        family = family_of(source)
        self.chains = {
            component: family.chain(source, component, family.load(source, component).to(device))
            for component in family.components(source)
            if component in family.chained
        }
        self.tokenizer = PromptTokenizer(source.folder / "tokenizer", family.text_length(source))
        self.sampler = family.sampler(source).with_steps(prompts.n_steps)
        self.latent_shape = family.latent_shape(source)
        self.observed = frozenset(prompts.observe)
        self.device = device

    @torch.no_grad()
    def denoise(self, prompt: str, seed: int) -> Trajectory:
        """The states of one prompt's whole trajectory."""
        tokens = [self._tokens(text) for text in (prompt, "")]
        texts = torch.cat([self.chains["text_encoder"].whole(*pair) for pair in tokens])
        spec = self.sampler
        denoiser, x = Denoiser(spec), noise(seed, self.latent_shape)
        latents, timesteps, guidances = [], [], []
        for k, t in enumerate(denoiser.timesteps):
            guidance = spec.guidance_at(float(t))
            if k in self.observed:
                latents.append(torch.from_numpy(x.copy()))
                timesteps.append(float(t))
                guidances.append(guidance)
            expert = "transformer_2" if spec.second_expert(float(t)) else "transformer"
            n = 1 if guidance == 1.0 else 2
            v = self._velocities(expert, x, float(t), texts[:n])
            x = denoiser.step(v[-1] + np.float32(guidance) * (v[0] - v[-1]), x)
        if not np.isfinite(x).all():
            raise CalibrationError(
                f"prompt {prompt!r}: the full-precision model's latents are not finite"
            )
        (ids, mask), (none_ids, none_mask) = tokens
        return Trajectory(
            latents_KCTHW=torch.stack(latents),
            timesteps_K=torch.tensor(timesteps),
            guidance_K=torch.tensor(guidances),
            ids_1S=ids.cpu(),
            mask_1S=mask.cpu(),
            none_ids_1S=none_ids.cpu(),
            none_mask_1S=none_mask.cpu(),
        )

    def _tokens(self, text: str) -> tuple[Tensor, Tensor]:
        ids, mask = (torch.from_numpy(a).to(self.device) for a in self.tokenizer(text))
        return ids, mask

    def _velocities(self, expert: str, x: np.ndarray, t: float, texts: Tensor) -> np.ndarray:
        """B C T H W, one for each text."""
        latents = torch.from_numpy(x).to(self.device).expand(len(texts), *x.shape)
        timestep = torch.full((len(texts),), t, device=self.device)
        return self.chains[expert].whole(latents, timestep, texts).float().cpu().numpy()
