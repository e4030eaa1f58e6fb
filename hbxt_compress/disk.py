"""What a disk may do to a long run: writes that a kill leaves whole, and errors that tell where.

A name is given to bytes only after they have reached the disk, so that neither a kill nor a power
cut leaves a file that is complete in name only.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from hbxt_compress.errors import DiskFull, HbxtError

__all__ = ["put", "reading", "remove", "sync", "write_text", "writing"]

_FULL: Final = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file may not grow any more (see `ulimit -f`)",
}
_RUST: Final = re.compile(r"\(os error (\d+)\)")  # how safetensors tells the number


def sync(path: Path) -> None:
    """Waits until a file, or a folder with all that is in it, has reached the disk."""
    for one in (*sorted(path.rglob("*")), path) if path.is_dir() else (path,):
        handle = os.open(one, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def put(unfinished: Path, path: Path) -> None:
    """Gives a file or folder its name, once its bytes are on the disk."""
    sync(unfinished)
    os.replace(unfinished, path)
    _sync_names(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    put(unfinished, path)


def remove(path: Path) -> None:
    """Removes a file or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, *, needs_bytes: int | None = None, remedy: str) -> Iterator[None]:
    """Tells a disk without room what did not fit, and how to go on.

    needs_bytes: what the block will write, if that is known; it does not begin without as much.

    Raises:
        DiskFull: for want of space, of quota, or because a file may not grow.
    """
    if needs_bytes is not None and (free := _free_bytes(path)) < needs_bytes:
        raise DiskFull(_told(path, _FULL[errno.ENOSPC], free, needs_bytes, remedy))
    try:
        yield
    except (KeyboardInterrupt, HbxtError):
        raise
    except Exception as error:
        why = _FULL.get(_number(error))
        if why is None:
            raise
        raise DiskFull(_told(path, why, _free_bytes(path), needs_bytes, remedy)) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Gives an error of the system the name of the file, where it has none."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def _sync_names(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _number(error: BaseException) -> int:
    """The system's error number, 0 for an error of another kind."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _RUST.search(str(error))
    return int(found[1]) if found else 0


def _told(path: Path, why: str, free: int, needs_bytes: int | None, remedy: str) -> str:
    needed = "" if needs_bytes is None else f", {needs_bytes / 1e6:.1f} MB are needed"
    return f"{path}: {why}: {free / 1e6:.1f} MB are free{needed}; {remedy}"


def _free_bytes(path: Path) -> int:
    """Free bytes where a path lies or will lie."""
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    return shutil.disk_usage(there).free
