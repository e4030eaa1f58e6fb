"""Weights: the tensors of one component, read one at a time from its safetensors files.

Nothing is kept: walking over a component costs the memory of its largest tensor. Files are read and
not mapped: one that is cut short, or that the disk cannot read, would end the process by SIGBUS.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Final

import torch
from torch import Tensor

from hbxt_compress import disk
from hbxt_compress.errors import SourceError, listing
from hbxt_compress.source import Header, read_headers

__all__ = ["DTYPES", "Weights"]

_NONE: Mapping[str, str] = MappingProxyType({})
_UNKNOWN: Mapping[Path, tuple[int, int]] = MappingProxyType({})
_AT_ONCE = 1 << 20  # bytes
DTYPES: Final = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""by the names that safetensors has for them"""


class Weights:
    """A component folder's tensors by name, sharded or not; or those of one file.

    second_names: name -> the name under which the files hold that tensor, for those (tied) that
    they may hold only once. stamps: file -> (bytes, mtime in ns) that it must have when it is read.
    Raises SourceError for a folder without weights or with damaged ones.
    """

    def __init__(
        self,
        folder: Path,
        second_names: Mapping[str, str] = _NONE,
        stamps: Mapping[Path, tuple[int, int]] = _UNKNOWN,
    ) -> None:
        self.folder, self.second_names, self._stamps = folder, second_names, stamps
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
            SourceError: there is no such tensor, it holds NaN or infinity, or its file has changed.
        """
        stored, header = self._place(name)
        tensor = self.unchecked(name)
        _require_finite(tensor, stored, header)
        return tensor

    def unchecked(self, name: str) -> Tensor:
        """A float32 copy of the tensor, finite or not.

        Raises:
            SourceError: there is no such tensor, or its file has changed.
        """
        header = self._place(name)[1]
        values = torch.empty(header.shape)
        with self._open(header) as file:
            self._fill(file, header, 0, values.view(-1))
        return values

    def stored(self, name: str) -> Tensor:
        """A copy of the tensor in the dtype that it is stored in, finite or not.

        Raises:
            SourceError: there is no such tensor, or its file has changed.
        """
        header = self._place(name)[1]
        values = torch.empty(header.shape, dtype=DTYPES[header.dtype])
        with self._open(header) as file:
            self._fill(file, header, 0, values.view(-1))
        return values

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """A float32 copy of rows start..stop along the first axis, checked finite.

        Of a table larger than memory no more is read. Raises SourceError as `tensor` does.
        """
        stored, header = self._place(name)
        stop = min(stop, header.shape[0])
        rows = torch.empty(max(0, stop - start), *header.shape[1:])
        with self._open(header) as file:
            self._fill(file, header, start * math.prod(header.shape[1:]), rows.view(-1))
        _require_finite(rows, stored, header)
        return rows

    def looked_up(self, name: str, ids_N: Tensor) -> Tensor:
        """Float32 copies of some rows of a matrix, N by its width; only they are read.

        Raises:
            SourceError: there is no such tensor, or its file has changed.
        """
        header = self._place(name)[1]
        values_ND = torch.empty(len(ids_N), header.shape[1])
        with self._open(header) as file:
            for i, row in enumerate(ids_N.tolist()):
                self._fill(file, header, row * header.shape[1], values_ND[i])
        return values_ND

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

    def _open(self, header: Header) -> BinaryIO:
        """The file of a tensor, if it is still the one that was found."""
        with disk.reading(header.file):
            file = header.file.open("rb", buffering=0)
        stat = os.fstat(file.fileno())
        known = self._stamps.get(header.file)
        if known is not None and known != (stat.st_size, stat.st_mtime_ns):
            file.close()
            raise SourceError(_changed(header.file, f"it had {known[0]} bytes, has {stat.st_size}"))
        return file

    def _fill(self, file: BinaryIO, header: Header, first: int, values_N: Tensor) -> None:
        """Puts a tensor's numbers, from the `first` on, into a flat tensor of any dtype."""
        dtype = DTYPES[header.dtype]
        step = _AT_ONCE // dtype.itemsize
        buffer = torch.empty(min(step, len(values_N)), dtype=dtype)
        file.seek(header.offset + first * dtype.itemsize)
        for start in range(0, len(values_N), step):
            part = buffer[: min(step, len(values_N) - start)]
            view = part.view(torch.uint8).numpy().data
            done = 0
            while done < len(view):
                with disk.reading(header.file):
                    n = file.readinto(view[done:])  # type: ignore[attr-defined]
                if not n:
                    raise SourceError(_changed(header.file, f"it ends at byte {file.tell()}"))
                done += n
            values_N[start : start + len(part)] = part


def _changed(file: Path, how: str) -> str:
    return (
        f"{file}: changed while the run went on ({how}); put the file back as it was and run the "
        "same command, or start anew with the new one"
    )


def _require_finite(tensor: Tensor, stored: str, header: Header) -> None:
    if tensor.numel() and not bool(torch.isfinite(torch.stack(tensor.aminmax())).all()):
        raise SourceError(f"{header.file}: {stored} holds NaN or infinity; download it again")
