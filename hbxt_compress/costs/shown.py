"""Shown: how a model passes what calibration shows it, counted without any values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hbxt_compress.costs.counting import Counted, Passes, count, count_passes
from hbxt_compress.costs.work import Work
from hbxt_compress.models import Family
from hbxt_compress.plan import Shown
from hbxt_compress.prompts import PromptSet
from hbxt_compress.runtime.text import PromptTokenizer
from hbxt_compress.source import Source
from hbxt_compress.stages.batches import PROMPTS_AT_ONCE

__all__ = ["Batches", "Forwards", "ShownModel", "alive_bytes", "memo_bytes", "whole"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """Batches of one size. n, n_held_out: how many. passes: of one. states: latents in each.

    share: of its rows that count; a prompt's padding does not.
    """

    n: int
    n_held_out: int
    states: int
    passes: Passes
    share: float = 1.0


class Forwards:
    """A model's chained components on inputs of some latents' size (C T H W), each counted once."""

    def __init__(self, family: Family, source: Source, latent: tuple[int, int, int, int]) -> None:
        self._family, self._source, self._latent = family, source, latent
        self._known: dict[tuple[str, int], Passes] = {}

    def passes(self, component: str, n: int = 1) -> Passes:
        """A forward of n prompts or states."""
        if (component, n) not in self._known:
            module = self._family.skeleton(self._source, component).to("meta")
            chain = self._family.chain(self._source, component, module)
            length = self._family.text_length(self._source)
            with torch.device("meta"):
                if component == "text_encoder":
                    ids = torch.zeros(n, length, dtype=torch.long)
                    inputs: tuple[Tensor, ...] = (ids, torch.ones_like(ids))
                else:
                    width = self.passes("text_encoder").output_shape[-1]
                    latents = torch.zeros(n, *self._latent)
                    inputs = (latents, torch.zeros(n), torch.zeros(n, length, width))
            self._known[component, n] = count_passes(chain, inputs)
        return self._known[component, n]

    def work(self, component: str, n: int = 1) -> Work:
        """What a forward of n prompts or states is, all blocks passed."""
        specs = self._family.layers(self._source)
        blocks = {one.block for one in specs if one.component == component}
        found = Work()
        for piece, times in whole(self.passes(component, n), len(blocks - {None})):
            found += piece.work() * times
        return found


class ShownModel:
    """A model's components and what each is shown, batch by batch."""

    def __init__(self, family: Family, source: Source, prompts: PromptSet, shown: Shown) -> None:
        self.family, self.source, self._prompts, self._shown = family, source, prompts, shown
        self.chained = [one for one in family.components(source) if one in family.chained]
        self.latent = family.latent_shape(source, shown.size)
        self._forwards = Forwards(family, source, self.latent)
        spec, steps = family.sampler(source).observed(prompts.n_steps, prompts.observe)
        every = [float(t) for t in spec.timesteps()]
        self._every = [(spec.second_expert(t), spec.guidance_at(t)) for t in every]
        self._steps = [self._every[k] for k in steps]

    def passes(self, component: str, n: int = 1) -> Passes:
        """A forward of n prompts or states."""
        return self._forwards.passes(component, n)

    def work(self, component: str, n: int) -> Work:
        """What such a forward is, all blocks passed."""
        return self._forwards.work(component, n)

    def batches(self, component: str, n_learnt: int, n_held_out: int) -> list[Batches]:
        """As stages/batches.py makes them of so many prompts."""
        if component == "text_encoder":
            return [
                Batches(
                    n=n_learnt + n_held_out + 1,
                    n_held_out=n_held_out,
                    states=1,
                    passes=self.passes(component),
                    share=self._text_share(),
                )
            ]
        second = component == "transformer_2"
        n_branches = sum(1 if g == 1.0 else 2 for own, g in self._steps if own == second)
        found: dict[int, tuple[int, int]] = {}
        for prompts, held_out in ((n_learnt, False), (n_held_out, True)):
            for size in _chunks(prompts):
                n, held = found.get(size, (0, 0))
                found[size] = n + n_branches, held + (n_branches if held_out else 0)
        return [
            Batches(n=n, n_held_out=held, states=size, passes=self.passes(component, size))
            for size, (n, held) in found.items()
            if n
        ]

    def denoised(self) -> Mapping[str, Sequence[int]]:
        """By expert, how many states each forward of one trajectory has."""
        found: dict[str, list[int]] = {}
        for second, guidance in self._every:
            expert = "transformer_2" if second else "transformer"
            found.setdefault(expert, []).append(1 if guidance == 1.0 else 2)
        return found

    def encoded(self) -> Counted:
        """The VAE's encoder on one clip."""
        module = self.family.skeleton(self.source, "vae").to("meta")
        size = self._shown.size
        with torch.device("meta"):
            frames = torch.zeros(1, 3, size.n_frames, size.height, size.width)
        return count(lambda: self.family.encode(self.source, module, frames))[1]

    def _text_share(self) -> float:
        """Tokens of the prompts over those that they are padded to."""
        length = self.family.text_length(self.source)
        tokenize = PromptTokenizer(self.source.folder / "tokenizer", length)
        texts = self._prompts.prompts
        return sum(float(tokenize(text)[1].mean()) for text in texts) / len(texts)


def whole(passes: Passes, n_blocks: int) -> Sequence[tuple[Counted, int]]:
    """The pieces of a forward, and how often each is passed."""
    return (passes.head, 1), (passes.block, n_blocks), (passes.tail, 1)


def alive_bytes(passes: Passes) -> float:
    """Of a forward's results that are alive at the same time."""
    return float(max(passes.head.peak_bytes, passes.block.peak_bytes, passes.tail.peak_bytes))


def memo_bytes(passes: Passes) -> float:
    """stages/memo at its fullest, in bfloat16: what two attentions gave, and the widest input."""
    return passes.hidden_bytes + max(2.0 * one.n_rows * one.n_in for one in passes.groups)


def _chunks(n: int) -> list[int]:
    return [min(PROMPTS_AT_ONCE, n - start) for start in range(0, n, PROMPTS_AT_ONCE)]
