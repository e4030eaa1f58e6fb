"""The journal of a result being built: which of its pieces are finished, one line of JSON each.

    {"name": "transformer.003.safetensors", "bytes": 73400320, "sha256": "...", "seconds": 41.3}

A line is on the disk before the piece has its name, so a piece that no line describes is none. A
piece that is a folder has `files` beside, each with bytes and sha256. `{"expected": 30}` says how
many pieces there will be. The journal is no part of the result.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hbxt_compress import disk
from hbxt_compress.json_text import parse_json

__all__ = ["FileNote", "Journal", "file_sha256", "scratch_of"]

log = logging.getLogger(__name__)
_NAME, _RANKS_NAME = "journal.jsonl", "journal.{}.jsonl"
_SCRATCH = "unfinished"
_CHECKPOINT = ".checkpoint"
_NEEDED = frozenset({"name", "bytes", "sha256"})


@dataclass(frozen=True, slots=True, kw_only=True)
class FileNote:
    """What is known about a file's content. size: bytes; sha256: hex."""

    size: int
    sha256: str


class Journal:
    """The journal of a folder; a folder without one has no finished pieces.

    rank: each process of a run adds to a file of its own, and reads those of all.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self._folder, self._rank = folder, rank
        self._pieces: dict[str, Mapping[str, FileNote]] = {}
        self._seconds: dict[str, float] = {}
        self._digests: dict[tuple[int, int, int], str] = {}
        self._n_expected: int | None = None
        for path in (folder / _NAME, *self._others_files()):
            for line in _lines(path):
                self._take(line)

    @property
    def path(self) -> Path:
        """The journal's own file."""
        return self._folder / (_RANKS_NAME.format(self._rank) if self._rank else _NAME)

    def merge(self, *, unchanged: bool = False) -> None:
        """Takes in what other ranks have noted; unchanged: just now, so it is not read again."""
        for path in self._others_files():
            for line in _lines(path):
                self._append(line)
                for name, note in self._pieces.get(str(line.get("name")), {}).items():
                    if unchanged and (file := self._folder / name).is_file():
                        self._digests[_mark(file)] = note.sha256
            path.unlink()

    def progress(self) -> str:
        """`3 of 12`: finished pieces and all of them; `3` if nobody said how many there will be."""
        n = sum((self._folder / name).exists() for name in self._pieces)
        return f"{n}" if self._n_expected is None else f"{n} of {max(n, self._n_expected)}"

    def expect(self, n_pieces: int) -> None:
        """Notes how many pieces there will be."""
        if n_pieces != self._n_expected:
            self._append({"expected": n_pieces})

    def add(self, name: str, unfinished: Path, seconds: float) -> None:
        """Notes a piece that lies, on the disk, in `unfinished` and is about to get its name."""
        notes = {
            name
            if path == unfinished
            else f"{name}/{path.relative_to(unfinished).as_posix()}": self.note(path)
            for path in sorted(_files(unfinished))
        }
        line: dict[str, object] = {
            "name": name,
            "bytes": sum(note.size for note in notes.values()),
            "sha256": _digest(name, notes),
            "seconds": round(seconds, 3),
        }
        if unfinished.is_dir():
            line["files"] = {path: asdict(note) for path, note in notes.items()}
        self._append(line)

    def vouches_for(self, name: str) -> bool:
        """Whether a piece is there just as it was finished: same files, sizes, sha256.

        Every byte is read, as will be by whoever uses the piece. What does not match is told.
        """
        if (expected := self._pieces.get(name)) is None:
            return False
        found = {
            path.relative_to(self._folder).as_posix(): path for path in _files(self._folder / name)
        }
        problems = [
            file
            for file in sorted(expected.keys() | found.keys())
            if file not in found
            or file not in expected
            or found[file].stat().st_size != expected[file].size
            or self.note(found[file]) != expected[file]
        ]
        if problems:
            log.warning(
                "%s: not as %s says (%s); it is made again",
                self._folder / name, _NAME, ", ".join(problems),
            )  # fmt: skip
        return not problems

    def drop_strangers(self) -> None:
        """Removes what no line describes: it may be half written."""
        listed = {file for notes in self._pieces.values() for file in notes}
        dropped = []
        for path in sorted(self._folder.rglob("*"), reverse=True):
            name = path.relative_to(self._folder).as_posix()
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif name not in listed and path != self.path and not self._is_checkpoint(path):
                path.unlink()
                dropped.append(name)
        if dropped:
            log.info("%s: made again, unfinished: %s", self._folder, ", ".join(dropped[::-1]))

    def note(self, path: Path) -> FileNote:
        """Size and sha256 of a file; not read again if it is unchanged since, or only renamed."""
        mark = _mark(path)
        if mark not in self._digests:
            self._digests[mark] = file_sha256(path)
        return FileNote(size=mark[1], sha256=self._digests[mark])

    def files(self) -> dict[str, FileNote]:
        """What the result holds: every file but the journals and what is not finished, by path."""
        own = {self.path, *self._others_files()}
        return {
            path.relative_to(self._folder).as_posix(): self.note(path)
            for path in sorted(_files(self._folder))
            if path not in own and scratch_of(self._folder) not in path.parents
        }

    def seconds(self) -> dict[str, float]:
        """How long each finished piece took to make."""
        return dict(self._seconds)

    def _is_checkpoint(self, path: Path) -> bool:
        return path.parent == scratch_of(self._folder) and path.suffix == _CHECKPOINT

    def _others_files(self) -> list[Path]:
        return sorted(p for p in self._folder.glob(_RANKS_NAME.format("*")) if p != self.path)

    def _append(self, line: Mapping[str, object]) -> None:
        before = self.path.read_bytes() if self.path.exists() else b""
        torn = bool(before) and not before.endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._take(line)

    def _take(self, line: Mapping[str, Any]) -> None:
        if "expected" in line:
            self._n_expected = line["expected"]
            return
        name = line["name"]
        if isinstance(took := line.get("seconds"), int | float):
            self._seconds[name] = float(took)
        whole = {name: {"size": line["bytes"], "sha256": line["sha256"]}}
        self._pieces[name] = {f: FileNote(**about) for f, about in line.get("files", whole).items()}


def scratch_of(folder: Path) -> Path:
    """Where unfinished things lie while a folder is built; `*.checkpoint` survives a kill there."""
    return folder / _SCRATCH


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, hex."""
    with disk.reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mark(path: Path) -> tuple[int, int, int]:
    """Inode, size and time of change: another one means that there may be other bytes."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _files(path: Path) -> Iterator[Path]:
    """The files of a folder and of those in it, or the file itself; nothing if it is not there."""
    return (one for one in (path.rglob("*") if path.is_dir() else (path,)) if one.is_file())


def _digest(name: str, notes: Mapping[str, FileNote]) -> str:
    """Of a file its own; of a folder that of its files' names and digests."""
    if notes.keys() == {name}:
        return notes[name].sha256
    content = {file: note.sha256 for file, note in notes.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that are whole; a kill or a full disk may have cut one short."""
    if not path.is_file():
        return
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = parse_json(text)
        except ValueError:
            continue
        if isinstance(line, dict) and ("expected" in line or line.keys() >= _NEEDED):
            yield line
