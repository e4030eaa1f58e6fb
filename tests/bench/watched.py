"""A command run in a process of its own, with what it took: time, memory, bytes from and to disk.

Linux only: the kernel's own counts are read, of the process while it lives and once more between
its end and its burial.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

__all__ = ["Watched", "watch"]

_EVERY_S = 0.1
_MOST_SAMPLES = 400  # of a curve; then every other one is dropped


@dataclass(slots=True, kw_only=True)
class Watched:
    """What a command took.

    peak_anonymous_bytes, peak_file_bytes: of memory that nothing backs, and of mapped files (those
    pages the kernel may drop), sampled ten times a second. bytes_read, bytes_written: from and to
    the disk, imports included; asked_bytes: what read() returned, from the disk or from memory.
    curve: (seconds, anonymous bytes, mapped bytes). error: why it failed, None if it did not.
    """

    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    peak_file_bytes: int
    bytes_read: int
    bytes_written: int
    asked_bytes: int
    curve: list[tuple[float, int, int]] = field(default_factory=list)
    error: str | None = None


def watch(
    command: Sequence[str],
    log: Path,
    *,
    most_seconds: float | None = None,
    most_memory: float | None = None,
) -> Watched:
    """Runs a command to its end, its output in `log`; it is killed at either limit.

    SIGTERM ends it and this process. most_memory: bytes of anonymous memory.
    """
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as out:
        before = signal.signal(signal.SIGTERM, _exit)  # by default it would leave the child alone
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    memory, stopped = _Memory(), None
    try:
        while not os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            passed = time.perf_counter() - began
            memory.sample(child.pid, passed)
            if stopped is None and most_memory is not None and memory.anonymous > most_memory:
                stopped = f"stopped at {memory.anonymous / 1e9:.1f} GB of anonymous memory"
                os.kill(child.pid, signal.SIGKILL)  # Popen's own would bury it, counts and all
            elif stopped is None and most_seconds is not None and passed > most_seconds:
                stopped = f"stopped after {most_seconds / 60:g} min"
                os.kill(child.pid, signal.SIGKILL)
            time.sleep(_EVERY_S)
        seconds = time.perf_counter() - began
        counts = _fields(child.pid, "io")
    finally:
        os.kill(child.pid, signal.SIGKILL)  # has ended already, unless watching was interrupted
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        signal.signal(signal.SIGTERM, before)
    return Watched(
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_rss_bytes=_peak(usage.ru_maxrss * 1024, memory.high_water),
        peak_anonymous_bytes=memory.anonymous,
        peak_file_bytes=memory.mapped,
        bytes_read=counts["read_bytes"],
        bytes_written=counts["write_bytes"] - counts["cancelled_write_bytes"],
        asked_bytes=counts["rchar"],
        curve=memory.curve,
        error=stopped or _failure(child.returncode, log),
    )


def _exit(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


class _Memory:
    """Peaks and the curve of one process; the curve's steps double when it grows too long."""

    def __init__(self) -> None:
        self.anonymous = self.mapped = self.high_water = 0
        self.curve: list[tuple[float, int, int]] = []
        self._step = self._seen = 0

    def sample(self, pid: int, seconds: float) -> None:
        found = _fields(pid, "status")
        if "VmHWM" not in found:  # it has just ended
            return
        anonymous = 1024 * (found["RssAnon"] + found["RssShmem"])
        mapped = 1024 * found["RssFile"]
        self.anonymous, self.mapped = max(self.anonymous, anonymous), max(self.mapped, mapped)
        self.high_water = max(self.high_water, 1024 * found["VmHWM"])
        if self._seen % (1 << self._step) == 0:
            self.curve.append((round(seconds, 2), anonymous, mapped))
        self._seen += 1
        if len(self.curve) > _MOST_SAMPLES:
            self.curve = self.curve[::2]
            self._step += 1


def _peak(reported: int, seen: int) -> int:
    """The kernel's own peak, unless it may be that of this process, from which a child starts."""
    own = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return reported if reported > own else seen


def _fields(pid: int, name: str) -> dict[str, int]:
    """The numbers of a file of /proc by name; sizes as the file has them, in kB or bytes."""
    text = Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8")
    lines = (one.split(":", 1) for one in text.splitlines() if ":" in one)
    words = {key: value.split() for key, value in lines}
    return {key: int(value[0]) for key, value in words.items() if value and value[0].isdigit()}


def _failure(code: int, log: Path) -> str | None:
    if code == 0:
        return None
    lines = [one.strip() for one in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    last = next((one for one in reversed(lines) if one), "no message")[:300]
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}: {last}"
    return f"exit code {code}: {last}"
