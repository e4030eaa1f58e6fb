"""Views: latents and the frames that a decoder is to make of them, some clips a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self, get_args

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["KINDS", "Kind", "View", "Views"]

Kind = Literal["real", "made"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_FEATURE = "feature_"


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """N clips. latents_NCTHW: float32, as a VAE's decoder takes them.

    frames_N3THW: uint8, 255 is white. features: what the full decoder's low-resolution blocks gave
    on the way, bfloat16 N C T H W each, or none.
    """

    latents_NCTHW: Tensor
    frames_N3THW: Tensor
    features: Sequence[Tensor] = field(default=())

    def save(self, path: Path) -> None:
        """Writes one safetensors file."""
        tensors = {"latents": self.latents_NCTHW, "frames": self.frames_N3THW}
        tensors |= {f"{_FEATURE}{i}": one for i, one in enumerate(self.features)}
        save_file({name: one.contiguous() for name, one in tensors.items()}, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote."""
        tensors = load_file(path)
        features = [tensors[name] for name in sorted(tensors) if name.startswith(_FEATURE)]
        return cls(
            latents_NCTHW=tensors["latents"], frames_N3THW=tensors["frames"], features=features
        )


class Views:
    """The clips of a folder, read when they are asked for: real ones, and those a model made."""

    def __init__(self, folder: Path) -> None:
        self._rows = {}
        for kind in KINDS:
            files = [safe_open(p, framework="pt") for p in sorted(folder.glob(f"{kind}-*"))]
            self._rows[kind] = [
                (file, row)
                for file in files
                for row in range(file.get_slice("frames").get_shape()[0])
            ]

    def n(self, kind: Kind) -> int:
        """How many there are of a kind."""
        return len(self._rows[kind])

    def rows(self, kind: Kind, rows: Sequence[int]) -> View:
        """Some clips of a kind."""
        chosen = [self._rows[kind][row] for row in rows]

        def stacked(name: str) -> Tensor:
            return torch.stack([file.get_slice(name)[row] for file, row in chosen])

        names = sorted(n for n in chosen[0][0].keys() if n.startswith(_FEATURE))  # noqa: SIM118
        return View(
            latents_NCTHW=stacked("latents"),
            frames_N3THW=stacked("frames"),
            features=[stacked(name) for name in names],
        )
