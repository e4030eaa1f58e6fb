"""Publish: a copy of a result where the user wants it, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from hbxt_compress import disk
from hbxt_compress.errors import UsageError
from hbxt_compress.store import Entry

__all__ = ["publish"]


def publish(entry: Entry, out: Path, *, mark: str) -> Path:
    """Copies a result to `out`, whole or not at all, in place of an earlier one.

    mark: the file that tells such a result; a non-empty folder without it is not ours to replace
    and raises UsageError.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / mark).exists())):
        raise UsageError(f"{out}: exists and holds no {mark}; choose another folder or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (out.with_name(f".{out.name}.{kind}") for kind in ("new", "old"))
    if old.exists() and not out.exists():  # killed between the two renames below
        os.replace(old, out)
    for leftover in (fresh, old):
        disk.remove(leftover)
    paths = sorted(entry.folder.rglob("*"))
    size = sum(path.stat().st_size for path in paths if path.is_file())
    remedy = f"make room, or give an --out elsewhere; the result is whole in {entry.folder}"
    try:
        with disk.writing(out, needs_bytes=size, remedy=remedy):
            _copy(entry.folder, paths, fresh)
            disk.sync(fresh)
    except BaseException:
        disk.remove(fresh)
        raise
    if out.exists():
        os.replace(out, old)
    disk.put(fresh, out)
    disk.remove(old)
    return out


def _copy(folder: Path, paths: Sequence[Path], to: Path) -> None:
    """Unlike shutil.copytree, stops at the first error and keeps its number."""
    to.mkdir()
    for path in paths:
        copy = to / path.relative_to(folder)
        if path.is_dir():
            copy.mkdir()
        else:
            with disk.reading(path):
                shutil.copy2(path, copy)
