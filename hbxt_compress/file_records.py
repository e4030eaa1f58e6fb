"""What is recorded of a folder's files, and how a folder differs from what is recorded.

A record itself is sealed: JSON in one spelling, whose last key is the digest of what stands before,
so that any changed byte of it shows, too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

from hbxt_compress.manifest import FileRecord

__all__ = [
    "SEAL",
    "is_inside",
    "is_sealed",
    "paths_under",
    "record",
    "record_problems",
    "sealed",
    "sha256_of",
]

SEAL: Final = "digest"
"""the last key of a sealed document"""


def record(folder: Path, path: str) -> FileRecord:
    """A file of the folder with its sha256 and size."""
    file = folder / path
    return FileRecord(path=path, sha256=sha256_of(file), size_bytes=file.stat().st_size)


def record_problems(
    folder: Path, files: Sequence[FileRecord], *, by: str, verify: bool
) -> Iterator[str]:
    """What is missing, changed or outside the folder, a line each. by: what says so.

    verify=False compares sizes alone.
    """
    for one in files:
        path = folder / one.path
        if not is_inside(folder, one.path):
            yield f"{one.path}: leaves the artifact's folder (a link, '..' or an absolute path)"
        elif not path.is_file():
            yield f"{one.path}: missing"
        elif (size := path.stat().st_size) != one.size_bytes:
            yield f"{one.path}: {size} bytes, {by} says {one.size_bytes}"
        elif verify and (found := sha256_of(path)) != one.sha256:
            yield f"{one.path}: sha256 {found[:12]}, {by} says {one.sha256[:12]}"


def is_inside(folder: Path, path: str) -> bool:
    """Whether a recorded path, links followed, stays in the folder."""
    pure = PurePosixPath(path)
    if not path or {"\\", "\0"} & set(path) or pure.is_absolute() or ".." in pure.parts:
        return False
    try:
        return (folder / path).resolve().is_relative_to(folder.resolve())
    except RuntimeError:  # a link that leads to itself
        return False


def paths_under(folder: Path) -> list[str]:
    """Files and linked folders under the folder, sorted; links are not walked into."""
    found = []
    for where, folders, files in os.walk(folder):
        linked = [name for name in folders if Path(where, name).is_symlink()]
        found += [Path(where, name).relative_to(folder).as_posix() for name in [*files, *linked]]
    return sorted(found)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(document: Mapping[str, object]) -> str:
    """The document's only spelling, with its sha256 as the last key."""
    digest = hashlib.sha256(_spelt(document).encode()).hexdigest()
    return _spelt({**document, SEAL: digest})


def is_sealed(content: bytes, document: Mapping[str, Any]) -> bool:
    """Whether a file's content, and what was read from it, are what `sealed` made."""
    told = {key: value for key, value in document.items() if key != SEAL}
    return list(document)[-1:] == [SEAL] and sealed(told).encode() == content


def _spelt(document: Mapping[str, object]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
