"""Checkpoint: named tensors in the files that others publish, read one by one in their own dtype.

A safetensors file, a folder of them with or without an index, or what torch.save made of a state
dict, perhaps among others of a training run. Pickled objects other than tensors are never loaded.
"""

from __future__ import annotations

import pickle
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from hbxt_compress.errors import SourceError, UsageError, listing
from hbxt_compress.json_text import read_json
from hbxt_compress.weights import DTYPES, Weights

__all__ = ["Checkpoint", "Stored", "bare"]

_PICKLED: Final = (".pt", ".pth", ".bin")
_PARTS: Final = ("generator", "generator_ema")  # the student of a training run, and its average
_WRAPPERS: Final = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_PREFIXES: Final = (
    "model.", "diffusion_model.", "generator.", "generator_ema.", "state_dict.", "module.",
    "transformer.", "base_model.",
)  # fmt: skip
# what a damaged archive, or a damaged pickle within it, ends torch.load with
_DAMAGED: Final = (
    RuntimeError, ValueError, EOFError, AssertionError, AttributeError, KeyError, IndexError,
    TypeError, OverflowError, MemoryError, struct.error, ModuleNotFoundError,
)  # fmt: skip
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A tensor in a file; dtype as safetensors calls it. read: a copy in that dtype, unchecked."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a file or folder holds. tensors: by the names that they have there.

    part: which of the models that a training run saved side by side these are; None: there is one.
    stamps: file -> (bytes, mtime in ns) when it was opened.
    """

    path: Path
    tensors: Mapping[str, Stored]
    stamps: Mapping[Path, tuple[int, int]]
    part: str | None = None

    @classmethod
    def open(cls, path: Path, part: str | None = None) -> Checkpoint:
        """The checkpoint at a path, from headers alone.

        Raises:
            SourceError: it is missing, damaged, incomplete, or no file of tensors.
            UsageError: it holds several models and `part` names none, or one that is not there.
        """
        files = _files(path)
        stamps = {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in files}
        found: dict[str, Stored] = {}
        problems = []
        for file in files:
            own = _pickled(file) if file.suffix in _PICKLED else _safe(file, stamps)
            problems += [f"{name}: in {file.name} and before" for name in own if name in found]
            found |= own
        if problems:
            raise SourceError(f"{path}: several files hold the same tensors:\n{listing(problems)}")
        part = _part(path, found, part)
        if part is not None:
            found = {n: one for n, one in found.items() if n.startswith(f"{part}.")}
        return cls(path=path, tensors=found, stamps=stamps, part=part)

    def require_unchanged(self) -> None:
        """Raises SourceError if a file is not the one that was opened any more."""
        for file, stamp in self.stamps.items():
            if (file.stat().st_size, file.stat().st_mtime_ns) != stamp:
                raise SourceError(f"{file}: changed while it was read; run the command again")


def bare(name: str) -> str:
    """A tensor's name without what wrappers and containers put before and into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    while prefix := next((one for one in _PREFIXES if name.startswith(one)), ""):
        name = name.removeprefix(prefix)
    return name


def _files(path: Path) -> list[Path]:
    """The files of a checkpoint, sorted; those of its index where a folder has one."""
    if path.is_file():
        if path.suffix not in (".safetensors", *_PICKLED):
            kinds = ", ".join((".safetensors", *_PICKLED))
            raise SourceError(f"{path}: not a checkpoint; expected a folder or one of {kinds}")
        return [path]
    if not path.is_dir():
        raise SourceError(f"{path}: no such file or folder")
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        names = [index.name for index in indices]
        raise SourceError(f"{path}: has several indices; name one file, or remove the others:\n"
                          + listing(names))  # fmt: skip
    if indices:
        try:
            named = set(read_json(indices[0])["weight_map"].values())
            if not named or any(
                Path(name).name != name or name == ".." or "\0" in name for name in named
            ):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SourceError(
                f"{indices[0]}: not an index of safetensors files in this folder"
            ) from None
        files = {path / name for name in named}
        if missing := sorted(file.name for file in files if not file.is_file()):
            raise SourceError(f"{path}: files that {indices[0].name} names are missing; download "
                              f"them again:\n{listing(missing)}")  # fmt: skip
        return sorted(files)
    files = set(path.glob("*.safetensors"))
    if not files:
        raise SourceError(f"{path}: no .safetensors file in it; of a .pt file give the path itself")
    return sorted(files)


def _safe(file: Path, stamps: Mapping[Path, tuple[int, int]]) -> dict[str, Stored]:
    weights = Weights(file, stamps=stamps)
    return {
        name: Stored(
            shape=weights.shape(name),
            dtype=weights.dtype(name),
            read=partial(weights.stored, name),
        )
        for name in weights.names
    }


def _pickled(file: Path) -> dict[str, Stored]:
    try:
        document = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise SourceError(
            f"{file}: holds objects that are no tensors, which could run code and are not loaded; "
            "save its state dict alone, or as .safetensors"
        ) from None
    except _DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise SourceError(
            f"{file}: damaged, or not written by torch 1.6 or later ({reason}); download it again, "
            "or save it as .safetensors"
        ) from None
    tensors = dict(_flat("", document))
    if not tensors:
        raise SourceError(f"{file}: holds no tensors by name; expected a state dict")
    return {
        name: Stored(
            shape=tuple(one.shape), dtype=_NAMES.get(one.dtype, str(one.dtype)), read=one.clone
        )
        for name, one in tensors.items()
    }


def _flat(at: str, document: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors of dicts in dicts, by dotted names; a run's numbers and texts are passed over."""
    if isinstance(document, Tensor):
        yield at, document.detach()
    elif isinstance(document, Mapping):
        for key, value in document.items():
            yield from _flat(f"{at}.{key}" if at else str(key), value)


def _part(path: Path, tensors: Mapping[str, Stored], asked: str | None) -> str | None:
    found = Counter(name.split(".")[0] for name in tensors)
    parts = [part for part in _PARTS if part in found]
    shown = " and ".join(parts) or "none by name"
    if asked is not None and asked not in found:
        raise UsageError(f"--part {asked}: {path} holds no such model; it has {shown}")
    if asked is None and len(parts) > 1:
        raise UsageError(f"{path}: holds {shown}; say --part {parts[0]} or --part {parts[1]}")
    return asked or (parts[0] if parts else None)
