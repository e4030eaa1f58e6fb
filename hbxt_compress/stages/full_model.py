"""FullModel: a model folder in float32 that denoises, without its VAE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hbxt_compress.models import family_of
from hbxt_compress.runtime.noise import noise
from hbxt_compress.runtime.scheduler import Denoiser
from hbxt_compress.runtime.text import PromptTokenizer
from hbxt_compress.sampler import SamplerSpec
from hbxt_compress.source import Source

__all__ = ["FullModel", "State"]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Latents before a step: its index, timestep and guidance, and x float32 N C T H W."""

    k: int
    timestep: float
    guidance: float
    x: np.ndarray


class FullModel:
    """Text encoder and transformers of a model folder, in float32 on a device.

    reads: False leaves the text encoder out, for those who have its features.
    """

    def __init__(self, source: Source, device: torch.device, *, reads: bool = True) -> None:
        family = family_of(source)
        self.chains = {
            component: family.chain(source, component, family.load(source, component).to(device))
            for component in family.components(source)
            if component in family.chained and (reads or component != "text_encoder")
        }
        self.tokenizer = PromptTokenizer(source.folder / "tokenizer", family.text_length(source))
        self.sampler = family.sampler(source)
        self.latent_shape = family.latent_shape(source)
        self.device = device
        self._whole = {name: chain.whole for name, chain in self.chains.items()}

    def compile(self, by: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> None:
        """Has the transformers' forwards go through what `by` makes of them."""
        for name in self._whole.keys() - {"text_encoder"}:
            self._whole[name] = by(self.chains[name].whole)

    def tokens(self, prompt: str) -> tuple[Tensor, Tensor]:
        """(ids, mask) of a prompt, each 1 L."""
        ids, mask = (torch.from_numpy(a).to(self.device) for a in self.tokenizer(prompt))
        return ids, mask

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text features N L D, 0 at padding."""
        whole = self.chains["text_encoder"].whole
        return torch.cat([whole(*self.tokens(prompt)) for prompt in prompts])

    def states(
        self, spec: SamplerSpec, seeds: Sequence[int], text_NLD: Tensor, none_1LD: Tensor
    ) -> Iterator[State]:
        """Of some prompts together: the states before every step, then the clean latents.

        Fresh noise, where the sampler takes any, is that of the first seed.
        """
        denoiser = Denoiser(spec, seeds[0])
        x = np.stack([noise(seed, self.latent_shape) for seed in seeds])
        for k, t in enumerate(denoiser.timesteps):
            guidance = spec.guidance_at(float(t))
            yield State(k=k, timestep=float(t), guidance=guidance, x=x)
            with torch.no_grad():
                v = self.velocity(torch.from_numpy(x), float(t), guidance, text_NLD, none_1LD, spec)
            x = denoiser.step(v.cpu().numpy(), x)
        yield State(k=spec.n_steps, timestep=0.0, guidance=1.0, x=x)

    def velocity(
        self,
        x_NCTHW: Tensor,
        timestep: float | Tensor,
        guidance: float,
        text_NLD: Tensor,
        none_1LD: Tensor,
        spec: SamplerSpec | None = None,
    ) -> Tensor:
        """The guided velocity, float32 N C T H W: v_none + guidance (v_text - v_none).

        timestep: of all, or N of them, which one expert must serve.
        """
        spec, t_N = spec or self.sampler, torch.as_tensor(timestep).expand(len(x_NCTHW))
        expert = "transformer_2" if spec.second_expert(float(t_N[0].detach())) else "transformer"
        n = len(x_NCTHW)
        sides = [text_NLD] if guidance == 1 else [text_NLD, none_1LD.expand(n, -1, -1)]
        latents = torch.cat([x_NCTHW.to(self.device)] * len(sides))
        t = torch.cat([t_N.to(self.device, torch.float32)] * len(sides))
        v = self._whole[expert](latents, t, torch.cat(sides).to(self.device)).float()
        none = v[-n:]
        return none + guidance * (v[:n] - none)
