"""Journals: what they vouch for is whole, what they do not list is gone, and no kill loses more."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from hbxt_compress import disk, store
from hbxt_compress.errors import DiskFull
from hbxt_compress.journal import Journal, file_sha256
from hbxt_compress.publish import publish
from hbxt_compress.store import Entry, Store, Work
from tests.forked import wait_for

VERSION = 1
FACTS = ("numpy",)
_calls: list[str] = []


def _write(name: str, content: str, path: Path) -> None:
    _calls.append(name)
    if name.endswith("/"):
        path.mkdir()
        (path / "inner").mkdir()
        (path / "a").write_text(content)
        (path / "inner" / "b").write_text(content)
    else:
        path.write_text(content)


def pieces(work: Work, names: tuple[str, ...] = ("one", "folder/", "two")) -> None:
    work.expect(len(names))
    for name in names:

        def make(path: Path, name: str = name) -> None:
            _write(name, f"content of {name}", path)

        work.piece(name.rstrip("/"), make)
    (work.folder / "index").write_text("written at every run")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    _calls.clear()


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    """A folder with three finished pieces and their journal."""
    folder = tmp_path / "x.partial"
    folder.mkdir()
    pieces(Work(folder, Journal(folder)))
    _calls.clear()
    return folder


def test_a_journal_is_a_line_a_piece(partial: Path) -> None:
    lines = [json.loads(line) for line in (partial / "journal.jsonl").read_text().splitlines()]
    assert lines[0] == {"expected": 3}
    one, folder, two = lines[1:]
    assert [one["name"], folder["name"], two["name"]] == ["one", "folder", "two"]
    assert one["bytes"] == (partial / "one").stat().st_size
    assert one["sha256"] == file_sha256(partial / "one")
    assert folder["files"].keys() == {"folder/a", "folder/inner/b"}
    assert folder["bytes"] == sum(about["size"] for about in folder["files"].values())
    assert all(line["seconds"] >= 0 for line in lines[1:])
    assert Journal(partial).progress() == "3 of 3"
    assert not (partial / "unfinished").exists()


def _change(path: Path) -> None:
    path.write_bytes(path.read_bytes()[::-1])


@pytest.mark.parametrize(
    ("damage", "again"),
    [
        (lambda folder: None, []),
        (lambda folder: _change(folder / "one"), ["one"]),
        (lambda folder: os.truncate(folder / "two", 3), ["two"]),
        (lambda folder: (folder / "two").unlink(), ["two"]),
        (lambda folder: _change(folder / "folder" / "inner" / "b"), ["folder/"]),
        (lambda folder: (folder / "folder" / "a").unlink(), ["folder/"]),
        (lambda folder: (folder / "journal.jsonl").unlink(), ["one", "folder/", "two"]),
    ],
)
def test_a_piece_that_is_not_as_it_was_finished_is_made_again(
    damage: object, again: list[str], partial: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = {path: path.read_bytes() for path in partial.rglob("*") if path.is_file()}
    damage(partial)  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        pieces(Work(partial, Journal(partial)))
    assert _calls == again
    told = [record.getMessage() for record in caplog.records]
    assert all("is made again" in one for one in told)
    assert len(told) <= len(again)
    for path, content in whole.items():
        if path.name != "journal.jsonl":
            assert path.read_bytes() == content


def test_what_no_line_lists_is_dropped_but_a_checkpoint(partial: Path) -> None:
    scratch = partial / "unfinished"
    (scratch / "three.piece").mkdir(parents=True)
    for stranger in (scratch / "three.piece" / "three", partial / ".tmpOenYGV", partial / "index"):
        stranger.write_text("half")
    (scratch / "three.0.checkpoint").write_text("state")
    Journal(partial).drop_strangers()
    left = {p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.is_file()}
    assert left == {
        "one", "two", "folder/a", "folder/inner/b", "journal.jsonl", "unfinished/three.0.checkpoint"
    }  # fmt: skip


def test_a_torn_line_is_no_line_and_the_next_one_is_whole(partial: Path) -> None:
    path = partial / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    journal = Journal(partial)
    assert journal.progress() == "2 of 3"
    pieces(Work(partial, journal))
    assert _calls == ["two"]
    assert Journal(partial).progress() == "3 of 3"


def test_a_finished_file_is_hashed_once(partial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr("hbxt_compress.journal.file_sha256", counted)
    folder = partial.with_name("y.partial")
    folder.mkdir()
    journal = Journal(folder)
    pieces(Work(folder, journal))
    noted = journal.files()
    assert sorted(hashed) == ["a", "b", "index", "one", "two"]
    assert noted.keys() == {"one", "two", "index", "folder/a", "folder/inner/b"}
    _change(folder / "one")
    assert journal.files()["one"].sha256 == file_sha256(folder / "one") != noted["one"].sha256


def _killed_at(function: str, nth: int, patch: pytest.MonkeyPatch) -> None:
    """The nth call of a function of `disk` or `os` never happens."""
    home = os if hasattr(os, function) else disk
    original, calls = getattr(home, function), []

    def call(*args: object) -> object:
        calls.append(args)
        if len(calls) == nth:
            raise KeyboardInterrupt
        return original(*args)

    patch.setattr(home, function, call)


@pytest.mark.parametrize("nth", range(1, 9))
def test_killed_at_any_rename_it_loses_a_piece_at_most_and_ends_with_the_same_record(
    nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three pieces, the journal aside, the names of folder, times, record; the eighth is none."""
    whole = Store(tmp_path / "whole").result(pieces)
    _calls.clear()
    killed = Store(tmp_path / "killed")
    with monkeypatch.context() as patch:
        _killed_at("replace", nth, patch)
        if nth < 8:
            with pytest.raises(KeyboardInterrupt) as caught:
                killed.result(pieces)
            assert "pieces are finished under" in caught.value.__notes__[0]
    again = killed.result(pieces)
    assert again.digest == whole.digest
    assert len(_calls) <= 4
    left = sorted(path.name for path in again.folder.parent.iterdir())
    assert left == [again.key, *(f"{again.key}.{kind}" for kind in ("json", "lock", "seconds"))]
    assert sorted(path.name for path in again.folder.iterdir()) == ["folder", "index", "one", "two"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("kind", ["python", "rust"])
def test_a_disk_without_room_says_what_did_not_fit(number: int, kind: str, tmp_path: Path) -> None:
    def make(path: Path) -> None:
        path.write_text("some of it")
        if kind == "rust":
            raise RuntimeError(f"I/O error: {os.strerror(number)} (os error {number})")
        raise OSError(number, os.strerror(number))

    with pytest.raises(DiskFull, match=r"piece: .*: [0-9.]+ MB are free; make room, .*--store"):
        Work(tmp_path).piece("piece", make)
    assert not list(tmp_path.iterdir())


def test_what_cannot_fit_is_not_begun(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match=r"MB are free, 1000000000\.0 MB are needed"):
        Work(tmp_path).piece("piece", lambda _: pytest.fail("begun"), needs_bytes=10**15)


def test_another_error_keeps_its_kind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        Work(tmp_path).piece("piece", lambda _: print(1 / 0))  # noqa: T201


def test_the_lock_of_a_killed_run_is_free_and_a_live_one_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = Store(tmp_path)._address(pieces, {})[0]
    lock, held = place.with_suffix(".lock"), tmp_path / "held"
    lock.parent.mkdir()
    code = (
        "import sys, time; from filelock import FileLock\n"
        f"with FileLock({str(lock)!r}): open({str(held)!r}, 'w').close(); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as holder:
        wait_for(held.exists, most_s=30)
        warned = store.log.warning

        def kill(*args: object) -> None:
            warned(*args)
            holder.send_signal(signal.SIGKILL)

        monkeypatch.setattr(store.log, "warning", kill)
        began = time.monotonic()
        Store(tmp_path).result(pieces)
    assert time.monotonic() - began < 20
    assert "another run is making it" in caplog.text
    with FileLock(lock, timeout=0):
        pass


def test_a_copy_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Store(tmp_path / "store").result(pieces)
    out = publish(entry, tmp_path / "out", mark="one")
    (out / "one").write_text("an earlier artifact")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copy2", full)
        with pytest.raises(DiskFull, match=r"out: no space is left: .* MB are needed; .*--out"):
            publish(entry, out, mark="one")
    assert (out / "one").read_text() == "an earlier artifact"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "store"]
    os.replace(out, tmp_path / ".out.old")  # as a kill between the two renames leaves it
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copy2", full)
        with pytest.raises(DiskFull):
            publish(entry, out, mark="one")
    assert (out / "one").read_text() == "an earlier artifact"
    assert (publish(entry, out, mark="one") / "one").read_text() == "content of one"


def test_a_damaged_stored_tensor_file_names_what_was_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    entry = Store(tmp_path).result(pieces)

    def reads(work: Work, before: Entry) -> None:
        load_file(before.folder / "one")

    reads.__module__ = __name__
    with pytest.raises(store.StoreError, match=rf"damaged, .*\n  {entry.folder}"):
        Store(tmp_path).result(reads, before=entry)


def test_peek_tells_how_many_pieces_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _killed_at("replace", 3, patch)
        with pytest.raises(KeyboardInterrupt):
            Store(tmp_path).result(pieces)
    peek = Store(tmp_path).peek()
    with pytest.raises(store.Missing):
        peek.result(pieces)
    assert [(state, done) for _, _, state, done in peek.seen] == [("partial", "2 of 3")]
