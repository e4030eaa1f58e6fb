"""Progress of long work on stderr, drawn from the library's log records.

A record with `extra={"progress": (done, total, what)}` moves the bar called `what`.
"""

from __future__ import annotations

import logging
import sys
import time

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["watch"]

_LINE_EVERY_S = 5.0


def watch(level: int, rank: int = 0) -> None:
    """Shows progress and warnings of the library on stderr; INFO or DEBUG shows every record.

    rank: of several processes the first shows progress, the others say who they are.
    """
    log = logging.getLogger("hbxt_compress")
    shown = _Lines if rank or not sys.stderr.isatty() else _Bars
    log.handlers = [shown(level, rank)]
    log.setLevel(min(level, logging.INFO))
    log.propagate = False


class _Lines(logging.Handler):
    """Plain lines; a bar's steps at most one every few seconds, and its last one."""

    def __init__(self, shown: int, rank: int = 0) -> None:
        super().__init__()
        self._shown, self._rank = shown, rank
        self._started: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        progress = getattr(record, "progress", None)
        if progress is not None and not self._rank:
            self.step(*progress)
        elif record.levelno >= self._shown:
            self.line(record.getMessage(), record.levelno)

    def line(self, text: str, level: int = logging.INFO) -> None:
        mark = "warning: " if level >= logging.WARNING else ""
        who = f"rank {self._rank}: " if self._rank else ""
        sys.stderr.write(f"{who}{mark}{text}\n")
        sys.stderr.flush()

    def step(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        began = self._started.setdefault(what, now)
        if done < total and now - self._last.get(what, began) < _LINE_EVERY_S:
            return
        self._last[what] = now
        took = now - began
        left = f", {took / done * (total - done):.0f} s left" if 0 < done < total else ""
        self.line(f"{what}: {done}/{total} ({took:.0f} s{left})")
        if done >= total:
            del self._started[what], self._last[what]


class _Bars(_Lines):
    """Bars on a terminal, with the time left; they stop when all are full."""

    def __init__(self, shown: int, rank: int = 0) -> None:
        super().__init__(shown, rank)
        self._console = Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def line(self, text: str, level: int = logging.INFO) -> None:
        style = "yellow" if level >= logging.WARNING else "dim"
        self._console.print(escape(text), style=style)

    def step(self, done: int, total: int, what: str) -> None:
        if self._progress is None:
            left = TextColumn("left")
            columns = (
                TextColumn("{task.description:<28}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._progress = Progress(*columns, TimeRemainingColumn(), left, console=self._console)
            self._progress.start()
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(escape(what), total=total)
        self._progress.update(self._tasks[what], completed=done, total=total)
        if self._progress.finished:
            self.close()

    def close(self) -> None:
        """Leaves the bars as they are and gives the cursor back."""
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._tasks = None, {}
        super().close()
