"""Content-addressed results: found if finished, resumed if interrupted, never modified.

    <root>/<stage>/<key, 16 hex>/          one result, nothing but its own files
    <root>/<stage>/<key>.json              written last: the document whose sha256 is the key (why
                                           the result exists), size and sha256 of every file
    <root>/<stage>/<key>.partial/          being built; handed back after a crash
    <root>/files.json                      memo of input files' hashes by path, size and mtime

A key covers the stage's name and VERSION, the versions of the packages in its FACTS, its parameters
with defaults, and its inputs by *content*: a stage re-made with equal bytes leaves everything after
it valid. Failures are never stored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from filelock import FileLock
from pydantic import BaseModel

from hbxt_compress.errors import StoreError, UsageError, listing
from hbxt_compress.machine import Machine

__all__ = [
    "Entry",
    "Keyed",
    "Missing",
    "Peek",
    "Store",
    "Work",
    "canonical",
    "file_sha256",
    "publish",
]

log = logging.getLogger(__name__)
_KEY_DIGITS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A finished result. digest identifies its bytes, key the document that asked for them."""

    folder: Path
    stage: str
    key: str
    digest: str


@dataclass(frozen=True, slots=True)
class Work:
    """A result being built: a folder, and pieces that survive a kill."""

    folder: Path

    def piece(self, name: str, make: Callable[[Path], None]) -> Path:
        """The file `name`, made by `make(path)` unless an earlier run finished it."""
        path = self.folder / name
        if path.exists():
            log.info("%s: found", name)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".tmp")
        make(unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        return path


@runtime_checkable
class Keyed(Protocol):
    """An argument that says itself what stands for it in a key."""

    def key(self) -> object:
        """A JSON value."""


class Store:
    """Results under one folder; safe for several processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.memo = root / "files.json"

    def result(self, stage: Callable[..., None], **arguments: object) -> Entry:
        """The result of `stage(work, **arguments)`, computed unless it is there already.

        Arguments of type Machine say where to run and are not part of the key. Raises StoreError if
        a finished result has lost or changed files.
        """
        folder, document = self._address(stage, arguments)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not _record(folder).exists():
                self._build(stage, arguments, folder, document)
            return self._open(folder, document)

    def peek(self) -> Peek:
        """A view that builds nothing and remembers what was asked for."""
        return Peek(self.root)

    def _address(
        self, stage: Callable[..., None], arguments: Mapping[str, object]
    ) -> tuple[Path, str]:
        name, home = stage.__name__, sys.modules[stage.__module__]
        bound = inspect.signature(stage).bind(None, **arguments)
        bound.apply_defaults()
        given = dict(list(bound.arguments.items())[1:])
        document = {
            "stage": name,
            "version": home.VERSION,
            "facts": {package: _version(package) for package in home.FACTS},
            "arguments": {k: canonical(v) for k, v in given.items() if not isinstance(v, Machine)},
        }
        text = json.dumps(document, sort_keys=True, indent=1)
        key = hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]
        return self.root / name / key, text

    def _build(
        self,
        stage: Callable[..., None],
        arguments: Mapping[str, object],
        folder: Path,
        document: str,
    ) -> None:
        partial = folder.with_suffix(".partial")
        partial.mkdir(exist_ok=True)
        log.info("%s: started (%s)", stage.__name__, folder.name)
        stage(Work(partial), **arguments)
        for leftover in partial.rglob("*.tmp"):
            leftover.unlink()
        files = {
            path.relative_to(partial).as_posix(): {
                "size": path.stat().st_size,
                "sha256": file_sha256(path),
            }
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        unfinished = folder.with_suffix(".tmp")
        unfinished.write_text(
            json.dumps({"document": json.loads(document), "files": files}, indent=1)
        )
        os.replace(unfinished, _record(folder))

    def _open(self, folder: Path, document: str) -> Entry:
        record = json.loads(_record(folder).read_text())
        if record["document"] != json.loads(document):
            raise StoreError(
                f"{_record(folder)}: not what this key was made from; delete it and {folder}"
            )
        bad = [
            name
            for name, about in record["files"].items()
            if not (folder / name).is_file() or (folder / name).stat().st_size != about["size"]
        ]
        if bad:
            raise StoreError(
                f"{folder}: {len(bad)} files missing or truncated; delete {_record(folder)} "
                f"to re-make them:\n"
                f"{listing(bad)}"
            )
        content = {name: about["sha256"] for name, about in record["files"].items()}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return Entry(folder=folder, stage=folder.parent.name, key=folder.name, digest=digest)


def _version(package: str) -> str:
    """The installed version of a package; `a|b` means whichever of them is installed, by name."""
    for name in package.replace("_", "-").split("|"):
        with suppress(PackageNotFoundError):
            return f"{name} {version(name)}" if "|" in package else version(name)
    raise StoreError(f"none of {package.replace('|', ', ')} is installed; run `make setup`")


def _record(folder: Path) -> Path:
    return folder.with_suffix(".json")


class Missing(Exception):
    """Raised by Peek at the first result that is not there."""


class Peek(Store):
    """A store that only looks. seen: (stage, key, state) of every result asked for so far."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.seen: list[tuple[str, str, str]] = []

    def result(self, stage: Callable[..., None], **arguments: object) -> Entry:
        """The result if it is finished; raises Missing if it is not."""
        folder, document = self._address(stage, arguments)
        done = _record(folder).exists()
        state = (
            "done" if done else "partial" if folder.with_suffix(".partial").exists() else "missing"
        )
        self.seen.append((stage.__name__, folder.name, state))
        if not done:
            raise Missing
        return self._open(folder, document)


def publish(entry: Entry, out: Path, *, mark: str) -> Path:
    """Copies a result to `out`, whole or not at all, in place of an earlier one.

    mark: the file that tells such a result; a non-empty folder without it is not ours to replace
    and raises UsageError.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / mark).exists())):
        raise UsageError(f"{out}: exists and holds no {mark}; choose another folder or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (out.with_name(f".{out.name}.{kind}") for kind in ("new", "old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(entry.folder, fresh)
    if out.exists():
        os.replace(out, old)
    os.replace(fresh, out)
    shutil.rmtree(old, ignore_errors=True)
    return out


def canonical(value: object) -> Any:
    """The JSON that stands for an argument inside a key; raises TypeError for what has none."""
    if isinstance(value, Entry):
        return value.digest
    if isinstance(value, Keyed):
        return value.key()
    if isinstance(value, BaseModel):
        kind = type(value)
        own = {"VERSION": vars(kind)["VERSION"]} if "VERSION" in vars(kind) else {}
        return {
            "kind": kind.__name__,
            **{k: canonical(getattr(value, k)) for k in kind.model_fields},
            **own,
        }
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: canonical(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): canonical(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [canonical(v) for v in value]
    if isinstance(value, frozenset):
        return sorted(canonical(v) for v in value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"{type(value).__name__} cannot be part of a key")


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
