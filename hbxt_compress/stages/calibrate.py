"""Calibrate: run the real model on its own trajectories and sum up what its layers see.

Every prompt is denoised in full precision with the sampler that ships, from the noise the runtime
would draw. At the observed steps the inputs of the planned layers are added up for both guidance
branches, weighted by what each contributes to the velocity: guidance^2 and (guidance - 1)^2.
One file a prompt; a killed run goes on with the next prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hbxt_compress.errors import CalibrationError, listing
from hbxt_compress.layers import LayerName
from hbxt_compress.machine import Machine
from hbxt_compress.models import Family, family_of
from hbxt_compress.prompts import PromptSet
from hbxt_compress.runtime.generate import noise
from hbxt_compress.runtime.scheduler import Denoiser
from hbxt_compress.runtime.text import PromptTokenizer
from hbxt_compress.source import Source
from hbxt_compress.stats import CalibrationStats, LayerStats, Need
from hbxt_compress.store import Work

__all__ = ["FACTS", "VERSION", "calibrate"]

VERSION = 1
FACTS = ("torch", "diffusers", "transformers")
log = logging.getLogger(__name__)


def calibrate(
    work: Work,
    source: Source,
    prompts: PromptSet,
    layers: Sequence[LayerName],
    needs: frozenset[Need],
    on: Machine,
) -> None:
    """Writes `prompt-NNN.safetensors`, each the CalibrationStats of one prompt's trajectory."""
    pending = [i for i in range(len(prompts.prompts)) if not (work.folder / _file(i)).exists()]
    if not pending or not layers:
        return
    run = _Trajectory(source, prompts, layers, needs, torch.device(on.device))
    for i, (prompt, seed) in enumerate(prompts.items()):
        log.info(
            "calibrate: %s", prompt, extra={"progress": (i, len(prompts.prompts), "calibrate")}
        )

        def make(path: Path, prompt: str = prompt, seed: int = seed) -> None:
            run.observe(prompt, seed).save(path)

        work.piece(_file(i), make)
    done = len(prompts.prompts)
    log.info("calibrate: done", extra={"progress": (done, done, "calibrate")})


def _file(index: int) -> str:
    return f"prompt-{index:03d}.safetensors"


class _Trajectory:
    """The full-precision model with counters on the inputs of the chosen layers."""

    def __init__(
        self,
        source: Source,
        prompts: PromptSet,
        layers: Sequence[LayerName],
        needs: frozenset[Need],
        device: torch.device,
    ) -> None:
        family: Family = family_of(source)
        chosen = {name.split("/", 1)[0] for name in layers}
        self.modules = {
            component: family.load(source, component).to(device)
            for component in family.components(source)
            if component != "vae_decoder"
        }
        self.tokenizer = PromptTokenizer(source.folder / "tokenizer", family.text_length(source))
        self.sampler = family.sampler(source).with_steps(prompts.n_steps)
        self.latent_shape = family.latent_shape(source)
        self.observed = frozenset(prompts.observe)
        self.needs, self.device = needs, device
        self.layers = {c: [n for n in layers if n.startswith(f"{c}/")] for c in sorted(chosen)}
        self.stats: dict[LayerName, LayerStats] = {}

    @torch.no_grad()
    def observe(self, prompt: str, seed: int) -> CalibrationStats:
        """The statistics of one prompt's whole trajectory."""
        self.stats = {}
        texts = {"cond": self._encode(prompt), "uncond": self._encode("")}
        spec = self.sampler
        denoiser = Denoiser(spec)
        x = noise(seed, self.latent_shape)
        for k, t in enumerate(denoiser.timesteps):
            guidance = spec.guidance_at(float(t))
            expert = "transformer_2" if spec.second_expert(float(t)) else "transformer"
            weight = guidance**2 + (guidance - 1) ** 2
            v = {}
            for branch, factor in (("cond", guidance), ("uncond", guidance - 1)):
                if branch == "uncond" and guidance == 1.0:
                    continue
                share = factor**2 / weight * (1 if guidance == 1.0 else 2)
                with self._counting(expert, share) if k in self.observed else _nothing():
                    v[branch] = self._velocity(expert, x, float(t), texts[branch])
            uncond = v.get("uncond", v["cond"])
            x = denoiser.step(uncond + np.float32(guidance) * (v["cond"] - uncond), x)
        if not np.isfinite(x).all():
            raise CalibrationError(
                f"prompt {prompt!r}: the full-precision model's latents are not finite"
            )
        self._check_seen(prompt)
        return CalibrationStats(layers=self.stats)

    def _encode(self, prompt: str) -> Tensor:
        ids, mask = (torch.from_numpy(a).to(self.device) for a in self.tokenizer(prompt))
        with self._counting("text_encoder", 1.0, rows=mask.bool()):
            hidden = self.modules["text_encoder"](ids, mask).last_hidden_state
        return hidden * mask.unsqueeze(-1)

    def _velocity(self, expert: str, x: np.ndarray, t: float, text: Tensor) -> np.ndarray:
        timestep = torch.tensor([t], dtype=torch.float32, device=self.device)
        latents = torch.from_numpy(x[None]).to(self.device)
        return (
            self.modules[expert](latents, timestep, text, return_dict=False)[0][0]
            .float()
            .cpu()
            .numpy()
        )

    @contextmanager
    def _counting(
        self, component: str, weight: float, rows: Tensor | None = None
    ) -> Iterator[None]:
        """While open, inputs of the component's chosen layers are added up; rows masks padding."""
        hooks = []
        for name in self.layers.get(component, []):
            module = self.modules[component].get_submodule(name.split("/", 1)[1])
            hooks.append(module.register_forward_pre_hook(self._counter(name, weight, rows)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _counter(self, name: LayerName, weight: float, rows: Tensor | None):  # type: ignore[no-untyped-def]
        def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0] if rows is None else inputs[0][rows]
            if name not in self.stats:
                self.stats[name] = LayerStats.empty(x.shape[-1], self.needs)
            self.stats[name].add(x.cpu(), weight)

        return count

    def _check_seen(self, prompt: str) -> None:
        """Layers that no observed step reached are an error, not an empty statistic."""
        unseen = [n for names in self.layers.values() for n in names if n not in self.stats]
        if unseen:
            raise CalibrationError(
                f"prompt {prompt!r}: {len(unseen)} layers saw no input at steps "
                f"{sorted(self.observed)}; "
                f"observe steps of both experts:\n{listing(unseen)}"
            )


@contextmanager
def _nothing() -> Iterator[None]:
    yield
