"""Teach: the original model denoises many prompts; what it makes of noise is what students learn.

One file for some clips; a killed run goes on with the next one. Ranks share the files.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hbxt_compress.errors import CalibrationError
from hbxt_compress.lessons import Lesson
from hbxt_compress.machine import Machine
from hbxt_compress.prompts import PromptSet, seed_of
from hbxt_compress.source import Source
from hbxt_compress.stages.full_model import FullModel
from hbxt_compress.store import Work

__all__ = ["AT_ONCE", "FACTS", "VERSION", "nearest_steps", "teach"]

VERSION = 1
FACTS = ("torch", "diffusers", "transformers")
AT_ONCE = 32
log = logging.getLogger(__name__)


def teach(
    work: Work, source: Source, prompts: PromptSet, n_clips: int, levels: Sequence[float],
    on: Machine,
) -> None:  # fmt: skip
    """Writes `clips-NNNNN.safetensors`, each a Lesson of up to 32 clips.

    n_clips: the prompts in turn, each time from other noise. levels: noise levels at which states
    are kept, as near as the sampler's own steps come, beside the noise and the clean latents.

    Raises:
        CalibrationError: latents that are not finite.
    """
    teacher: FullModel | None = None
    items = _items(prompts, n_clips)
    chunks = [items[i : i + AT_ONCE] for i in range(0, n_clips, AT_ONCE)]
    work.expect(len(chunks))
    for i, chunk in enumerate(chunks):
        if not work.ranks.owns(i):
            continue
        log.info("teach: %d clips", len(chunk), extra={"progress": (i, len(chunks), "teach")})

        def make(path: Path, chunk: Sequence[tuple[str, int]] = chunk) -> None:
            nonlocal teacher
            teacher = teacher or FullModel(source, torch.device(on.device))
            _lesson(teacher, chunk, levels).save(path)

        work.piece(f"clips-{i:05d}.safetensors", make)
    work.ranks.barrier()
    log.info("teach: done", extra={"progress": (len(chunks), len(chunks), "teach")})


def nearest_steps(sigmas: np.ndarray, levels: Sequence[float]) -> tuple[int, ...]:
    """The steps whose noise levels are nearest to those asked for, each once and rising."""
    found = {int(np.argmin(np.abs(sigmas[:-1] - level))) for level in levels}
    return tuple(sorted(found | {0}))


def _items(prompts: PromptSet, n_clips: int) -> list[tuple[str, int]]:
    """(prompt, seed of its noise) of every clip."""
    texts = prompts.prompts
    return [
        (texts[i % len(texts)], seed_of(prompts.seed, f"{i // len(texts)}:{texts[i % len(texts)]}"))
        for i in range(n_clips)
    ]


def _lesson(
    teacher: FullModel, items: Sequence[tuple[str, int]], levels: Sequence[float]
) -> Lesson:
    spec = teacher.sampler
    prompts, seeds = [prompt for prompt, _ in items], [seed for _, seed in items]
    text, none = teacher.encode(prompts), teacher.encode([""])
    steps = (*nearest_steps(spec.sigmas(), levels), spec.n_steps)
    seen = {s.k: s.x for s in teacher.states(spec, seeds, text, none) if s.k in steps}
    states = torch.from_numpy(np.stack([seen[k] for k in steps], axis=1))
    finite = torch.isfinite(states).flatten(1).all(1)
    if not bool(finite.all()):
        bad = [prompt for prompt, ok in zip(prompts, finite.tolist(), strict=True) if not ok]
        raise CalibrationError(f"the teacher's latents are not finite: {', '.join(bad)}")
    return Lesson(
        states_NKCTHW=states,
        levels_K=torch.from_numpy(spec.sigmas()[list(steps)]),
        text_NSD=_trimmed(text),
        none_1SD=_trimmed(none),
        n_tokens=torch.tensor(text.shape[1]),
    )


def _trimmed(text_NLD: Tensor) -> Tensor:
    """Without the tokens at the end that are padding, and so 0, in every row."""
    used = text_NLD.abs().sum((0, 2)).nonzero()
    return text_NLD[:, : int(used.max()) + 1 if len(used) else 1].cpu()
