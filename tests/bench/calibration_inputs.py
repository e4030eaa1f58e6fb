"""The inputs every tool of the bench gets: calibration samples, and held-out states to judge on.

    python tests/bench/calibration_inputs.py OUT

writes, made by the full-precision model on its own trajectories:
    OUT/calibration.safetensors  latents N C T H W, timestep N, text N L D: the calls of the
        transformer at the observed steps of calibration/wide.yaml, both guidance branches
    OUT/held_out.safetensors     the same at 8 steps of prompts that calibration has not seen, with
        the velocities v N C T H W to hit; rows come in pairs (cond, uncond) of one state
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hbxt_compress.models import family_of
from hbxt_compress.prompts import load_prompts
from hbxt_compress.runtime.noise import noise
from hbxt_compress.runtime.scheduler import Denoiser
from hbxt_compress.runtime.text import PromptTokenizer
from hbxt_compress.sampler import SamplerSpec
from hbxt_compress.source import BUILTIN, locate
from hbxt_compress.suite import load_suite

__all__ = ["CALIBRATION", "HELD_OUT", "make_inputs", "velocity"]

CALIBRATION, HELD_OUT = "calibration.safetensors", "held_out.safetensors"
N_HELD_OUT, N_TIMESTEPS, BATCH = 16, 8, 32


def make_inputs(out: Path, model: str = BUILTIN) -> None:
    """Writes both files into `out`, unless those there are of the same prompts and steps."""
    prompts, suite = load_prompts("wide"), load_suite("standard")
    wanted, stamp = [out / CALIBRATION, out / HELD_OUT], out / "made_from.txt"
    made_from = f"{model} {prompts.digest} {suite.digest}"
    if stamp.exists() and stamp.read_text() == made_from:
        return
    out.mkdir(parents=True, exist_ok=True)
    trajectories = _Trajectories.open(model)
    calibration = trajectories.run(prompts.items(), prompts.n_steps, prompts.observe)
    calibration.pop("v")
    n_steps = suite.n_steps or 25
    steps = np.linspace(0, n_steps - 1, N_TIMESTEPS).round().astype(int).tolist()
    held_out = trajectories.run(suite.items()[:N_HELD_OUT], n_steps, steps)
    save_file(calibration, wanted[0])
    save_file(held_out, wanted[1])
    stamp.write_text(made_from)


@torch.no_grad()
def velocity(transformer: nn.Module, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    """The velocities N C T H W of any number of calls, float32."""
    parts = zip(latents.split(BATCH), timestep.split(BATCH), text.split(BATCH), strict=True)
    return torch.cat([transformer(*part, return_dict=False)[0].float() for part in parts])


@dataclass(frozen=True, slots=True)
class _Trajectories:
    """The full-precision model with the sampler that ships; all prompts advance together."""

    transformer: nn.Module
    text_encoder: nn.Module
    tokenizer: PromptTokenizer
    sampler: SamplerSpec
    latent_shape: tuple[int, ...]

    @classmethod
    def open(cls, model: str) -> _Trajectories:
        source = locate(model, hashed=False)
        family = family_of(source)
        return cls(
            transformer=family.load(source, "transformer"),
            text_encoder=family.load(source, "text_encoder"),
            tokenizer=PromptTokenizer(source.folder / "tokenizer", family.text_length(source)),
            sampler=family.sampler(source),
            latent_shape=family.latent_shape(source),
        )

    @torch.no_grad()
    def _encode(self, prompt: str) -> Tensor:
        ids, mask = (torch.from_numpy(a) for a in self.tokenizer(prompt))
        return self.text_encoder(ids, mask).last_hidden_state * mask.unsqueeze(-1)

    def run(
        self, items: Sequence[tuple[str, int]], n_steps: int, observe: Sequence[int]
    ) -> dict[str, Tensor]:
        denoiser = Denoiser(self.sampler.with_steps(n_steps))
        x = np.stack([noise(seed, self.latent_shape) for _, seed in items])
        empty = self._encode("").expand(len(items), -1, -1)
        texts = torch.stack([torch.cat([self._encode(p) for p, _ in items]), empty], dim=1)
        seen: dict[str, list[Tensor]] = {"latents": [], "timestep": [], "text": [], "v": []}
        for k, t in enumerate(denoiser.timesteps):
            latents = torch.from_numpy(x).repeat_interleave(2, dim=0)
            timestep = torch.full((len(latents),), float(t))
            v = velocity(self.transformer, latents, timestep, texts.flatten(0, 1))
            if k in observe:
                rows = (latents, timestep, texts.flatten(0, 1), v)
                for name, one in zip(seen, rows, strict=True):
                    seen[name].append(one)
            scale = self.sampler.guidance_at(float(t))
            cond, uncond = v[0::2].numpy(), v[1::2].numpy()
            x = denoiser.step(uncond + np.float32(scale) * (cond - uncond), x)
        found = {name: torch.cat(parts).contiguous() for name, parts in seen.items()}
        return found | {"guidance": torch.tensor([self.sampler.guidance])}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    make_inputs(parser.parse_args().out)
