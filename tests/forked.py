"""Runs of the command line in processes that start with everything imported.

Importing takes longer than a run on a micro model, and a process that is killed pays it each time.
So one process imports, and forks one that runs for each command: a process as any other, to be
killed, stopped or limited.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

_PARENT = """
import json, os, resource, sys
from hbxt_compress import cli, pipeline

for line in sys.stdin:
    asked = json.loads(line)
    pid = os.fork()
    if not pid:
        for number in (1, 2):
            os.dup2(os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        if asked["largest_file"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (asked["largest_file"],) * 2)
        try:
            cli.main(asked["arguments"])
        except SystemExit as end:
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(end.code)
    print(pid, flush=True)
    sys.stdin.readline()  # until then the process has its number to itself, ended or not
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forked:
    """Starts runs, one after another. log: what the last one said."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __enter__(self) -> Self:
        self._parent = subprocess.Popen(
            [sys.executable, "-c", _PARENT],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._parent.communicate()

    def run(
        self,
        arguments: Sequence[object],
        act: Callable[[int], None] = lambda _: None,
        *,
        largest_file: int | None = None,
    ) -> int:
        """The exit code, negative for a signal. act(pid) is called while the run goes on."""
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        asked = {
            "arguments": [str(one) for one in arguments],
            "log": str(self.log),
            "largest_file": largest_file,
        }
        self._parent.stdin.write(json.dumps(asked) + "\n")
        pid = int(self._parent.stdout.readline())
        assert pid > 1  # 0 would be everybody
        try:
            act(pid)
        finally:
            self._parent.stdin.write("\n")
            code = int(self._parent.stdout.readline())
        return code


def wait_for(happened: Callable[[], bool], most_s: float = 120) -> None:
    """Returns once it has happened."""
    until = time.monotonic() + most_s
    while not happened():
        assert time.monotonic() < until, f"did not happen in {most_s} s"
        time.sleep(0.005)
