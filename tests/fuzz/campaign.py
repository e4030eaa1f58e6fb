"""Runs malformed inputs through the command line, and tells what was not as it must be.

A case: a folder `in` with one file damaged, a command, a folder `out` that it may write. Nothing
else below the root may change, nothing finished in `out` may be lost, the exit code must be one of
those of bad input and the message must name the file.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from unittest import mock

from hbxt_compress import cli, ending, pipeline
from hbxt_compress.costs.work import KINDS, Rates
from hbxt_compress.errors import ExportError
from hbxt_compress.store import Work
from tests.fuzz.kinds import TAKEN, Kind

__all__ = ["FACTS", "LIMIT_S", "VERSION", "Outcome", "Site", "export", "run_case"]

LIMIT_S = 5.0  # of processor time, so that a busy machine fails nobody
_RATES = Rates(machine="test", per_second=dict.fromkeys(KINDS, 1e9), n_cores=2, is_compiled=True)
_SPECIAL = 0.06  # share of cases in which the file is no file any more
_KEPT = "kept.txt"
VERSION, FACTS = 1, ()  # of the stage below, as the store asks of any


def export(work: Work, **arguments: object) -> None:
    """Ends a `quantize` whose model was taken before the part that takes long."""
    raise ExportError(TAKEN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a case ended. code: None where the command raised what is no error of the user's.

    file: the damaged one. problems: what was not as it must be; seconds: of processor time.
    """

    kind: str
    case: int
    file: str
    command: tuple[str, ...]
    code: int | None
    seconds: float
    said: str
    problems: tuple[str, ...] = ()


class Hung(BaseException):
    """Raised in the command when its time is over."""


@dataclass(slots=True)
class Site:
    """A folder for cases: templates made once, a home, and a bystander that nobody may touch."""

    root: Path
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("templates", "home", "tmp", "bystander"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        (self.root / "bystander" / "result.txt").write_text("finished\n")

    def template(self, kind: Kind) -> Path:
        """The undamaged input of a kind."""
        folder = self.root / "templates" / kind.name
        if not folder.exists():
            kind.write(folder / "in", self.root)
        return folder

    def case(
        self, kind: Kind, i: int, *, damaged: bool = True
    ) -> tuple[Path, Path, tuple[str, ...]]:
        """A new case: its folder, the damaged file, and the command to run there."""
        random, case = Random(f"{self.seed} {kind.name} {i}"), self._fresh(kind)
        found = {path for pattern in kind.files for path in case.glob(f"in/{pattern}")}
        file = random.choice(sorted(path for path in found if path.is_file()))
        if damaged:
            _damage(random, kind, file)
            kind.mend(case / "in")
        return case, file, kind.commands[i % len(kind.commands)]

    def _fresh(self, kind: Kind) -> Path:
        """A case folder with undamaged input, and finished results in `out`."""
        case = self.root / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(self.template(kind) / "in", case / "in", symlinks=True)
        (case / "out").mkdir()
        (case / "out" / _KEPT).write_text("finished\n")
        (case / "out" / "clip.mp4").write_bytes(b"an earlier clip")
        return case


def run_case(site: Site, kind: Kind, i: int, *, damaged: bool = True) -> Outcome:
    """The outcome of the i-th case of a kind; damaged=False runs its input as it is."""
    case, file, command = site.case(kind, i, damaged=damaged)
    before = _seen(site.root)
    began = time.process_time()
    code, said, problems = _run(case, command, site.root)
    seconds = time.process_time() - began
    problems += _changes(before, _seen(site.root), code)
    if code is not None:
        problems += _told_wrong(kind, file, case, code, said, damaged=damaged)
    if seconds > LIMIT_S:
        problems.append(f"took {seconds:.1f} s of processor time")
    return Outcome(
        kind=kind.name,
        case=i,
        file=file.relative_to(case).as_posix(),
        command=command,
        code=code,
        seconds=seconds,
        said=said,
        problems=tuple(problems),
    )


def _damage(random: Random, kind: Kind, file: Path) -> None:
    if random.random() >= _SPECIAL:
        content = file.read_bytes()
        for _ in range(5):  # a change that changes nothing is none
            changed = random.choice(kind.damage)(random, content)
            if changed != content:
                break
        file.write_bytes(changed)
        return
    act = random.randrange(5)
    file.unlink()
    if act == 1:
        file.mkdir()
    elif act == 2:
        file.symlink_to("../../bystander/result.txt")
    elif act == 3:
        file.symlink_to(file.name)
    elif act == 4:
        file.symlink_to("nowhere")


def _run(case: Path, command: Sequence[str], root: Path) -> tuple[int | None, str, list[str]]:
    """Exit code, everything printed, and what went wrong."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace", write_through=True)
    code, problems = None, []
    quiet = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with _surroundings(case, root), quiet[0], quiet[1]:
        try:
            with _limited():
                code = ending._run(cli.hbxt, list(command), [])
        except Hung:
            problems.append(f"hung: more than {LIMIT_S} s of processor time")
        except BaseException as error:  # a panic of Rust code is no Exception
            problems.append("traceback:\n" + "".join(traceback.format_exception(error))[-3000:])
    said = b"".join(stream.buffer.getvalue() for stream in (err, out))  # type: ignore[attr-defined]
    return code, said.decode(errors="replace"), problems


@contextlib.contextmanager
def _surroundings(case: Path, root: Path) -> Iterator[None]:
    """The case's own folder, home and temporary folder; loggers and filters put back."""
    there, log = Path.cwd(), logging.getLogger("hbxt_compress")
    own = {"HOME": root / "home", "TMPDIR": root / "tmp", "HBXT_CACHE": case / "out" / "cache"}
    own["XDG_CACHE_HOME"] = root / "home" / "cache"
    os.chdir(case)
    try:
        with (
            warnings.catch_warnings(),
            mock.patch.dict(os.environ, {key: str(path) for key, path in own.items()}),
            mock.patch("tempfile.tempdir", None),
            mock.patch.object(pipeline, "find_rates", return_value=_RATES),
            mock.patch.object(pipeline, "export", export),
        ):
            yield
    finally:
        os.chdir(there)
        log.handlers, log.propagate = [], True
        log.setLevel(logging.NOTSET)


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Raises Hung in the block once it has used its processor time."""

    def hung(number: int, frame: FrameType | None) -> None:
        raise Hung

    before = signal.signal(signal.SIGPROF, hung)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S, LIMIT_S)  # again: a callback may swallow it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


_Seen = Mapping[str, tuple[int, int, str]]


def _seen(root: Path) -> _Seen:
    """Size, time of change and target of everything below the root but the models' weights."""
    found = {}
    for where, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(where, name)
            stat = path.lstat()
            link = str(path.readlink()) if path.is_symlink() else ""
            size = 0 if path.is_dir() and not link else stat.st_size
            when = 0 if path.is_dir() and not link else stat.st_mtime_ns
            found[path.relative_to(root).as_posix()] = (size, when, link)
    return found


def _changes(before: _Seen, after: _Seen, code: int | None) -> list[str]:
    """What was written outside `out`, and what was lost in it by a command that failed."""
    problems = [
        f"wrote outside the output folder: {path}"
        for path in sorted(before.keys() | after.keys())
        if not path.startswith("case/out") and before.get(path) != after.get(path)
    ]
    kept = ["case/out/kept.txt"] + ["case/out/clip.mp4"] * bool(code)
    problems += [f"lost: {p}" for p in kept if before[p] != after.get(p)]
    partial = [p for p in after.keys() - before.keys() if p.endswith((".partial.mp4", ".new"))]
    problems += [f"left behind: {path}" for path in sorted(partial)]
    return problems


def _told_wrong(
    kind: Kind, file: Path, case: Path, code: int, said: str, *, damaged: bool
) -> list[str]:
    """What is wrong with an exit code and with what was said."""
    if "Traceback (most recent call last)" in said:
        return ["a traceback was printed"]
    if not damaged:
        wrong = code not in (kind.well or (0,)) or kind.end not in said
        return [f"the undamaged input fails: exit code {code}"] if wrong else []
    if code in kind.well and kind.end in said:
        return []
    if code not in (1, 2):
        return [f"exit code {code}"]
    folder = file.parent.relative_to(case).as_posix()
    names = (file.name, *((folder, file.parent.name) if folder != "in" else ()), *kind.names)
    if not any(name in said for name in names):
        return [f"the message names none of {', '.join(names)}"]
    return []
