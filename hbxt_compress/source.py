"""Source: a full-precision diffusers folder, found and checked before anything long starts."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from hbxt_compress import disk
from hbxt_compress.errors import SourceError, listing
from hbxt_compress.journal import file_sha256
from hbxt_compress.json_text import parse_json, read_json
from hbxt_compress.licences import PATTERNS, licence_files

__all__ = ["BUILTIN", "Header", "Source", "locate", "read_headers"]

BUILTIN = "builtin/tiny-wan"
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?")
_READ = ("*.json", "*.safetensors", "*.model", "*.txt")
_MOST_HEADER = 100_000_000  # bytes, safetensors' own limit
_MUCH = 100_000_000  # bytes: hashing them again would be missed
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "BOOL": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model folder. model: what the user asked for. files: path in the folder -> sha256.

    stamps: file -> (bytes, mtime in ns) when it was found, so that a later change is noticed.
    licences: name -> licence or notice file; what is made of the model carries them, they are no
    part of its key.
    """

    model: str
    folder: Path
    files: Mapping[str, str]
    stamps: Mapping[Path, tuple[int, int]] = field(default_factory=dict)
    licences: Mapping[str, Path] = field(default_factory=dict)

    def key(self) -> dict[str, str]:
        """What stands for this model in a result's key: its bytes, not where they lie."""
        return dict(self.files)

    def config(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder; SourceError if it is missing or broken."""
        path = self.folder / name
        try:
            document = read_json(path)
        except FileNotFoundError:
            raise SourceError(f"{path}: missing; is this a whole diffusers folder?") from None
        except ValueError as error:
            raise SourceError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(document, dict):
            raise SourceError(f"{path}: expected a JSON object")
        return document


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A tensor as its safetensors header describes it; dtype as there (BF16, F16, F32, ...).

    offset: of its first byte in the file.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def n_bytes(self) -> int:
        return _BYTES[self.dtype] * math.prod(self.shape)


def locate(model: str, memo: Path | None = None, *, hashed: bool = True) -> Source:
    """The source for `builtin/tiny-wan`, a local folder, or a Hub id with revision (org/name@rev).

    memo: a JSON file that remembers hashes by path, size and mtime. hashed=False leaves the hashes
    empty and reads no weights. Raises SourceError.
    """
    folder = _folder(model)
    if not (folder / "model_index.json").is_file():
        raise SourceError(f"{folder}: no model_index.json; expected a diffusers pipeline folder")
    paths = sorted(p for pattern in _READ for p in folder.rglob(pattern) if ".cache" not in p.parts)
    return Source(
        model=model,
        folder=folder,
        stamps={path: _stamp(path) for path in paths},
        licences=licence_files(folder),
        files=_hashes(folder, paths, memo)
        if hashed
        else dict.fromkeys((p.relative_to(folder).as_posix() for p in paths), ""),
    )


def _folder(model: str) -> Path:
    if model == BUILTIN:
        return Path(str(files("hbxt_compress"))) / "reference" / "tiny-wan"
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:  # of ~nobody
        raise SourceError(f"model {model!r}: {error}") from None
    if path.is_dir():
        return path.resolve()
    match = _HUB_ID.fullmatch(model)
    if match is None or model.startswith((".", "/", "~")):
        raise SourceError(f"model {model!r}: no such folder (nor a Hub id like org/name@revision)")
    if match["revision"] is None:
        raise SourceError(
            f"model {model!r}: no such folder; if it is a Hub id, pin its revision: "
            f"{model}@<commit hash>"
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = [*_READ, *(f"*/{pattern}" for pattern in _READ), *PATTERNS]
        found = snapshot_download(
            match["repo"], revision=match["revision"], allow_patterns=patterns
        )
    except Exception as error:  # the hub raises a dozen kinds; all mean "not to be had"
        raise SourceError(
            f"model {model!r}: could not be fetched from the Hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); "
            "without network, give the path of a local folder"
        ) from None
    return Path(found)


def _hashes(folder: Path, paths: list[Path], memo: Path | None) -> dict[str, str]:
    known: dict[str, str] = {}
    if memo is not None and memo.is_file():
        try:
            read = read_json(memo)
        except ValueError:
            read = {}
        if isinstance(read, dict):
            known = {key: one for key, one in read.items() if isinstance(one, str)}
    stamps = [_stamp(path) for path in paths]
    keys = [f"{p.resolve()}|{stamp[0]}|{stamp[1]}" for p, stamp in zip(paths, stamps, strict=True)]
    found, fresh = {}, 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing holds no lock, and shards are many
        hashes = pool.map(lambda path, key: known.get(key) or file_sha256(path), paths, keys)
        for path, stamp, key, digest in zip(paths, stamps, keys, hashes, strict=True):
            if _stamp(path) != stamp:
                raise SourceError(f"{path}: changed while it was read; wait until it is written")
            fresh += 0 if key in known else stamp[0]
            known[key] = found[path.relative_to(folder).as_posix()] = digest
            if memo is not None and (fresh > _MUCH or (fresh and path == paths[-1])):
                memo.parent.mkdir(parents=True, exist_ok=True)
                disk.write_text(memo, json.dumps(known))
                fresh = 0
    return found


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def read_headers(folder: Path) -> dict[str, Header]:
    """Every tensor of a component folder from its safetensors headers alone, sharded or not.

    A single file will do as well. Raises SourceError for a folder without weights, and for files
    cut short or not safetensors.
    """
    paths = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise SourceError(f"{folder}: no .safetensors file (pickled checkpoints are never loaded)")
    found: dict[str, Header] = {}
    problems = []
    for path in paths:
        try:
            found |= _read_header(path)
        except ValueError as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise SourceError("damaged weights; download them again:\n" + listing(problems))
    return found


def _read_header(path: Path) -> dict[str, Header]:
    size = path.stat().st_size
    with disk.reading(path), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"not a safetensors file, or cut short at {size} bytes")
        if length > _MOST_HEADER:
            raise ValueError(f"its header has {length:,} bytes, at most {_MOST_HEADER:,} are read")
        try:
            header = parse_json(file.read(length))
        except ValueError as error:
            raise ValueError(f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    header.pop("__metadata__", None)
    unknown = sorted({str(about.get("dtype")) for about in header.values()
                      if isinstance(about, dict)} - _BYTES.keys())  # fmt: skip
    if unknown:
        raise ValueError(f"holds dtypes {unknown[:9]}; expected full-precision weights")
    end = 0
    for (start, stop), name in sorted((_extent(*entry), entry[0]) for entry in header.items()):
        if start != end:
            raise ValueError(f"{name[:200]} begins at byte {start} of the data, expected {end}")
        end = stop
    if 8 + length + end != size:
        raise ValueError(f"has {size} bytes where its header promises {8 + length + end}")
    return {
        name: Header(
            file=path,
            shape=tuple(about["shape"]),
            dtype=about["dtype"],
            offset=8 + length + about["data_offsets"][0],
        )
        for name, about in header.items()
    }


def _extent(name: str, about: object) -> tuple[int, int]:
    """Where a tensor of a known dtype begins and ends; ValueError if its entry makes no sense."""
    match about:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]}:
            whole = all(type(n) is int and n >= 0 for n in shape)
            if whole and start >= 0 and end - start == _BYTES[dtype] * math.prod(shape):
                return start, end
            shown = f"{dtype} {str(shape)[:60]} at {start}..{end}"
            raise ValueError(f"{name[:200]}: {shown} is no tensor's size and place")
    raise ValueError(f"{name[:200]}: its entry lacks a dtype, a shape or two data_offsets")
