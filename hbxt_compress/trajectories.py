"""Trajectories: the states at which a model is observed, one file a prompt.

From its own full-precision denoising or, in the same form, noised latents of real clips. They
depend on the model, its sampler and the prompt set alone, so one set serves every recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["Trajectory", "load_trajectories"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """What the model meets on the way to one clip, at K observed steps.

    latents_KCTHW: float32, before the step. timesteps_K, guidance_K: float32. ids_1S, mask_1S: the
    prompt's tokens, int64; none_ids_1S, none_mask_1S: those of the empty prompt.
    """

    latents_KCTHW: Tensor
    timesteps_K: Tensor
    guidance_K: Tensor
    ids_1S: Tensor
    mask_1S: Tensor
    none_ids_1S: Tensor
    none_mask_1S: Tensor

    def save(self, path: Path) -> None:
        """Writes one safetensors file."""
        save_file({name: getattr(self, name).contiguous() for name in self.__slots__}, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote."""
        return cls(**load_file(path))


def load_trajectories(
    folder: Path, *, first: int | None = None, last: int = 0
) -> Sequence[Trajectory]:
    """Every prompt's trajectory, in the prompts' order; or those of the first and last ones."""
    paths = sorted(folder.glob("prompt-*.safetensors"))
    if first is not None:
        paths = paths[:first] + paths[len(paths) - last :]
    return [Trajectory.load(path) for path in paths]
