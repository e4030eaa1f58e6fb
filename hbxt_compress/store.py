"""Content-addressed results: found if finished, resumed if interrupted, never modified.

    <root>/<stage>/<key, 16 hex>/          one result, nothing but its own files
    <root>/<stage>/<key>.json              written last: the document whose sha256 is the key (why
                                           the result exists), size and sha256 of every file
    <root>/<stage>/<key>.seconds           how long each piece took
    <root>/<stage>/<key>.partial/          being built, with a journal of what is finished; handed
                                           back after a crash
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
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Protocol, TypeVar, runtime_checkable

from filelock import FileLock, Timeout
from pydantic import BaseModel
from safetensors import SafetensorError

from hbxt_compress import disk
from hbxt_compress.errors import StoreError, listing
from hbxt_compress.journal import Journal, scratch_of
from hbxt_compress.json_text import parse_json
from hbxt_compress.machine import Machine
from hbxt_compress.ranks import ALONE, Ranks

__all__ = ["Entry", "Keyed", "Missing", "Peek", "Store", "Work", "canonical"]

T = TypeVar("T")
log = logging.getLogger(__name__)
_KEY_DIGITS = 16
_REMEDY = "make room, or move the store to another disk and name it with --store"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A finished result. digest identifies its bytes, key the document that asked for them.

    version: the stage's. made_from: the results that it was given, as far as this run knows.
    """

    folder: Path
    stage: str
    key: str
    digest: str
    version: int = 0
    made_from: tuple[Entry, ...] = field(default=(), compare=False)

    def steps(self) -> tuple[Entry, ...]:
        """The results that led here, each once and after those it was made from; last this one."""
        found = {one.digest: one for made in self.made_from for one in made.steps()}
        return (*found.values(), self)


@dataclass(frozen=True, slots=True)
class Work:
    """A result being built: a folder, and pieces that survive a kill.

    journal: what earlier runs finished; None: what is there is trusted, and nothing noted.
    ranks: who builds it, each the pieces that it owns.
    """

    folder: Path
    journal: Journal | None = None
    ranks: Ranks = ALONE

    @property
    def scratch(self) -> Path:
        """A folder that is no part of the result; its `*.checkpoint` files survive a kill."""
        folder = scratch_of(self.folder)
        folder.mkdir(exist_ok=True)
        return folder

    def expect(self, n_pieces: int) -> None:
        """Tells how many pieces there will be, for those who watch."""
        if self.journal is not None and self.ranks.leads:
            self.journal.expect(n_pieces)

    def piece(
        self, name: str, make: Callable[[Path], None], *, needs_bytes: int | None = None
    ) -> Path:
        """The file or folder `name`, made by `make(path)` unless an earlier run finished it.

        needs_bytes: what `make` will write, if that is known.

        Raises:
            DiskFull: told before `make` is called, if there is less than it needs.
        """
        path = self.folder / name
        if self._has(name):
            log.info("%s: found", name)
        else:
            self._make(path, name, make, needs_bytes)
        return path

    def joint_piece(
        self, name: str, make: Callable[[], T], save: Callable[[Path, T], None]
    ) -> Path:
        """The file or folder `name`, made by all ranks together unless an earlier run finished it.

        All call `make`, the first one saves what it gets.
        """
        if self.ranks.by_first(lambda: self._has(name)):
            log.info("%s: found", name)
        elif self.ranks.leads:
            self._make(self.folder / name, name, lambda path: save(path, make()), None)
        else:
            make()
        self.ranks.barrier()
        return self.folder / name

    def _has(self, name: str) -> bool:
        journal = self.journal
        return (self.folder / name).exists() and (journal is None or journal.vouches_for(name))

    def _make(
        self, path: Path, name: str, make: Callable[[Path], None], needs_bytes: int | None
    ) -> None:
        room, began = self.scratch / f"{name.replace('/', '_')}.piece", time.monotonic()
        for leftover in (path, room):
            disk.remove(leftover)
        room.mkdir()
        unfinished = room / path.name
        try:
            with disk.writing(path, needs_bytes=needs_bytes, remedy=_REMEDY):
                make(unfinished)
                disk.sync(unfinished)
                if self.journal is not None:
                    self.journal.add(name, unfinished, time.monotonic() - began)
                path.parent.mkdir(parents=True, exist_ok=True)
                disk.put(unfinished, path)
            log.info("%s: made in %.1f s", name, time.monotonic() - began)
        finally:
            disk.remove(room)
            if self.ranks.world == 1:  # or another rank may be about to use it
                with suppress(OSError):  # not empty: a checkpoint, or a piece this one is part of
                    self.scratch.rmdir()


@runtime_checkable
class Keyed(Protocol):
    """An argument that says itself what stands for it in a key."""

    def key(self) -> object:
        """A JSON value."""


class Store:
    """Results under one folder; safe for several processes.

    ranks: the processes of this run, which build each result together.
    """

    def __init__(self, root: Path, ranks: Ranks = ALONE) -> None:
        self.root, self.ranks = root, ranks
        self.memo = root / "files.json"

    def result(self, stage: Callable[..., None], **arguments: object) -> Entry:
        """The result of `stage(work, **arguments)`, computed unless it is there already.

        Arguments of type Machine say where to run and are not part of the key. Raises StoreError if
        a finished result has lost or changed files.
        """
        folder, document = self._address(stage, arguments)
        folder.parent.mkdir(parents=True, exist_ok=True)
        leads = self.ranks.leads
        with _locked(folder) if leads else nullcontext():
            asked, done = self.ranks.by_first(lambda: (folder.name, _record(folder).exists()))
            if asked != folder.name:
                raise StoreError(
                    f"{folder}: rank {self.ranks.rank} asks for another result than rank 0 "
                    f"({asked}); give all ranks the same code, packages and files"
                )
            if not done:
                self._build(stage, arguments, folder, document)
            if leads:
                _aside(folder).unlink(missing_ok=True)
            return replace(self._open(folder, document), made_from=_entries(arguments.values()))

    def seconds(self, entry: Entry) -> float:
        """Median time that a piece of a result took when it was made; 0 where none was noted."""
        with suppress(OSError, ValueError):
            return median(json.loads(entry.folder.with_suffix(".seconds").read_text()).values())
        return 0.0

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
        self, stage: Callable[..., None], arguments: Mapping[str, object], folder: Path,
        document: str,
    ) -> None:  # fmt: skip
        partial, ranks = _partial(folder), self.ranks
        resumed = _resume(folder) if ranks.leads else None
        ranks.barrier()
        journal = resumed or Journal(partial, ranks.rank)
        log.info("%s: started (%s)", stage.__name__, folder.name)
        try:
            with disk.writing(partial, remedy=_REMEDY):
                stage(Work(partial, journal, ranks), **arguments)
                ranks.barrier()
                ranks.by_first(lambda: _seal(folder, journal, document))
        except SafetensorError as error:  # sources are read by our own reader, which names files
            read = [str(one.folder) for one in arguments.values() if isinstance(one, Entry)]
            raise StoreError(
                f"{stage.__name__}: a stored tensor file cannot be read ({error}); one of these is "
                f"damaged, delete it and its .json:\n{listing([*read, str(partial)])}"
            ) from error
        except BaseException as error:
            error.add_note(f"{Journal(partial).progress()} pieces are finished under {partial}")
            raise

    def _open(self, folder: Path, document: str) -> Entry:
        try:
            record = parse_json(_record(folder).read_text(encoding="utf-8"))
            content = {name: about["sha256"] for name, about in record["files"].items()}
            sizes = {name: about["size"] for name, about in record["files"].items()}
            asked = record["document"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            told = f"damaged ({error!r:.100}); delete it to re-make {folder}"
            raise StoreError(f"{_record(folder)}: {told}") from error
        if asked != json.loads(document):
            told = f"not what this key was made from; delete it and {folder}"
            raise StoreError(f"{_record(folder)}: {told}")
        bad = [
            name
            for name, size in sizes.items()
            if not (folder / name).is_file() or (folder / name).stat().st_size != size
        ]
        if bad:
            told = (
                f"{len(bad)} files missing or truncated; delete {_record(folder)} to re-make them"
            )
            raise StoreError(f"{folder}: {told}:\n{listing(bad)}")
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        stage, n = folder.parent.name, asked["version"]
        return Entry(folder=folder, stage=stage, key=folder.name, digest=digest, version=n)


def _entries(given: Iterable[object]) -> tuple[Entry, ...]:
    """The results among arguments, also those in a mapping."""
    flat = (x for v in given for x in (v.values() if isinstance(v, Mapping) else (v,)))
    return tuple(one for one in flat if isinstance(one, Entry))


def _version(package: str) -> str:
    """The installed version of a package; `a|b` means whichever of them is installed, by name."""
    for name in package.replace("_", "-").split("|"):
        with suppress(PackageNotFoundError):
            return f"{name} {version(name)}" if "|" in package else version(name)
    raise StoreError(f"none of {package.replace('|', ', ')} is installed; run `make setup`")


def _record(folder: Path) -> Path:
    return folder.with_suffix(".json")


def _partial(folder: Path) -> Path:
    return folder.with_suffix(".partial")


def _aside(folder: Path) -> Path:
    """Where the journal is while a result gets its name and its record."""
    return folder.with_suffix(".journal")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a result; the kernel lets go of it when this process ends, however it does."""
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("%s: another run is making it; waiting for that one", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _resume(folder: Path) -> Journal:
    """The journal of a result without a record, wherever an earlier run was stopped."""
    partial = _partial(folder)
    if folder.exists() and not partial.exists():
        os.replace(folder, partial)
    partial.mkdir(exist_ok=True)
    journal = Journal(partial)
    if _aside(folder).exists():
        os.replace(_aside(folder), journal.path)
        journal = Journal(partial)
    journal.merge()
    journal.drop_strangers()
    return journal


def _seal(folder: Path, journal: Journal, document: str) -> None:
    """Gives a built result its name, then its record; what is journaled is not read again."""
    partial = _partial(folder)
    disk.remove(scratch_of(partial))
    journal.merge(unchanged=True)
    files = {name: asdict(note) for name, note in journal.files().items()}
    if journal.path.exists():
        os.replace(journal.path, _aside(folder))
    disk.remove(folder)
    disk.put(partial, folder)
    disk.write_text(folder.with_suffix(".seconds"), json.dumps(journal.seconds()))
    record = {"document": json.loads(document), "files": files}
    disk.write_text(_record(folder), json.dumps(record, indent=1))


class Missing(Exception):
    """Raised by Peek at the first result that is not there."""


class Peek(Store):
    """A store that only looks.

    seen: (stage, key, state, pieces) of every result asked for so far; pieces: "3 of 12" if partial
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.seen: list[tuple[str, str, str, str]] = []

    def result(self, stage: Callable[..., None], **arguments: object) -> Entry:
        """The result if it is finished; raises Missing if it is not."""
        folder, document = self._address(stage, arguments)
        done, partial = _record(folder).exists(), _partial(folder)
        state = "done" if done else "partial" if partial.exists() else "missing"
        pieces = Journal(partial).progress() if state == "partial" else ""
        self.seen.append((stage.__name__, folder.name, state, pieces))
        if not done:
            raise Missing
        return self._open(folder, document)


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
