"""Lessons: what a teacher made of noise, some clips a file."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["Lesson", "Lessons"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """N clips on their way: states_NKCTHW at the noise levels_K, the first noise, the last clean.

    text_NSD: the prompts' features without padding that all of them have; none_1SD: of the empty
    prompt, likewise. n_tokens: how many features there are with padding. All float32 but the last.
    """

    states_NKCTHW: Tensor
    levels_K: Tensor
    text_NSD: Tensor
    none_1SD: Tensor
    n_tokens: Tensor

    def save(self, path: Path) -> None:
        """Writes one safetensors file."""
        save_file({name: getattr(self, name).contiguous() for name in self.__slots__}, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote."""
        return cls(**load_file(path))


class Lessons:
    """The clips of a folder of lessons, read when they are asked for.

    levels_K: falling noise levels, the last 0. none_1LD: features of the empty prompt.
    """

    def __init__(self, folder: Path) -> None:
        self._files = [
            safe_open(path, framework="pt") for path in sorted(folder.glob("clips-*.safetensors"))
        ]
        self._rows = [
            (i, row)
            for i, file in enumerate(self._files)
            for row in range(file.get_slice("states_NKCTHW").get_shape()[0])
        ]
        first = self._files[0]
        self._kept: Sequence[int] = range(len(first.get_tensor("levels_K")))
        self.levels_K = first.get_tensor("levels_K")
        self._n_tokens = int(first.get_tensor("n_tokens"))
        self.none_1LD = self._padded(first.get_tensor("none_1SD"))

    def at(self, levels: Sequence[int]) -> Lessons:
        """The same clips at some of the levels only, told by their places."""
        fewer = copy(self)
        fewer._kept = [self._kept[k] for k in levels]
        fewer.levels_K = self.levels_K[list(levels)]
        return fewer

    def __len__(self) -> int:
        return len(self._rows)

    def states(self, rows: Sequence[int], at: Sequence[int]) -> Tensor:
        """N C T H W: of each row the state at one of the levels."""
        return torch.stack(
            [
                self._slice(row, "states_NKCTHW")[self._rows[row][1], self._kept[k]]
                for row, k in zip(rows, at, strict=True)
            ]
        )

    def text(self, rows: Sequence[int]) -> Tensor:
        """N L D: the features of the rows' prompts, 0 at padding."""
        return torch.cat(
            [
                self._padded(self._slice(row, "text_NSD")[self._rows[row][1]].unsqueeze(0))
                for row in rows
            ]
        )

    def _slice(self, row: int, name: str) -> Tensor:
        return self._files[self._rows[row][0]].get_slice(name)

    def _padded(self, text: Tensor) -> Tensor:
        return F.pad(text, (0, 0, 0, self._n_tokens - text.shape[1]))
