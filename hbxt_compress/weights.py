"""Weights: the tensors of one component, read one at a time from its safetensors files.

Nothing is kept: a call maps the file, copies one tensor out of it and lets go of its pages, so that
walking over a component costs the memory of its largest tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import safe_open
from torch import Tensor

from hbxt_compress.errors import SourceError, listing
from hbxt_compress.source import Header, read_headers

__all__ = ["Weights"]

_NONE: Mapping[str, str] = MappingProxyType({})


class Weights:
    """A component folder's tensors by name, sharded or not.

    second_names: name -> the name under which the files hold that tensor, for those (tied) that
    they may hold only once. Raises SourceError for a folder without weights or with damaged ones.
    """

    def __init__(self, folder: Path, second_names: Mapping[str, str] = _NONE) -> None:
        self.folder = folder
        self.second_names = second_names
        stored = read_headers(folder)
        self._places = {name: (name, header) for name, header in stored.items()}
        for second, first in second_names.items():
            if second not in stored and first in stored:
                self._places[second] = (first, stored[first])

    @property
    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted(self._places))

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from its header."""
        return self._place(name)[1].shape

    def dtype(self, name: str) -> str:
        """The dtype it is stored in, as safetensors calls it (BF16, F16, F32, ...)."""
        return self._place(name)[1].dtype

    def tensor(self, name: str) -> Tensor:
        """A float32 copy of the tensor, checked finite.

        Raises:
            SourceError: there is no such tensor, or it holds NaN or infinity.
        """
        stored, header = self._place(name)
        with safe_open(header.file, framework="pt") as file:
            tensor = file.get_tensor(stored).to(torch.float32, copy=True)
        _require_finite(tensor, stored, header)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """A float32 copy of rows start..stop along the first axis, checked finite.

        Of a table larger than memory no more is read. Raises SourceError as `tensor` does.
        """
        stored, header = self._place(name)
        with safe_open(header.file, framework="pt") as file:
            rows = file.get_slice(stored)[start:stop].to(torch.float32, copy=True)
        _require_finite(rows, stored, header)
        return rows

    def mapped(self, name: str) -> Tensor:
        """The tensor as it is stored, not checked; its pages are read from the file when touched.

        Raises:
            SourceError: there is no such tensor.
        """
        stored, header = self._place(name)
        with safe_open(header.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored)
        return tensor

    def tensors(self) -> dict[str, Tensor]:
        """All of them at once: a component in memory, what is tied in one copy.

        Raises:
            SourceError: as `tensor` does, but naming every tensor that holds NaN or infinity.
        """
        found: dict[str, Tensor] = {}
        problems = []
        for name in sorted({stored for stored, _ in self._places.values()}):
            try:
                found[name] = self.tensor(name)
            except SourceError as error:
                problems.append(str(error))
        if problems:
            raise SourceError(
                f"{self.folder}: {len(problems)} tensors are unusable:\n" + listing(problems)
            )
        return {name: found[stored] for name, (stored, _) in self._places.items()}

    def _place(self, name: str) -> tuple[str, Header]:
        if name not in self._places:
            raise SourceError(
                f"{self.folder}: no file holds a tensor {name!r}; is the checkpoint complete?"
            )
        return self._places[name]


def _require_finite(tensor: Tensor, stored: str, header: Header) -> None:
    if tensor.numel() and not bool(torch.isfinite(torch.stack(tensor.aminmax())).all()):
        raise SourceError(f"{header.file}: {stored} holds NaN or infinity; download it again")
