"""How the command line ends: one message, and an exit code.

0 done, 1 failed, 2 bad input, 3 a gate or check failed, 4 undecided, 130 and 143 stopped by SIGINT
and SIGTERM. Of several ranks the first that failed tells what happened.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from io import StringIO
from typing import NoReturn

import click

from hbxt_compress.errors import DiskFull, HbxtError
from hbxt_compress.ranks import ALONE, Ranks
from hbxt_compress.stopping import Stopped, stoppable

__all__ = ["run"]


def run(command: click.Command, given: Sequence[str]) -> NoReturn:
    """Runs a command line and exits; a second signal kills at once."""
    with stoppable() as stopped:
        code = _run(command, list(given), stopped)
    sys.exit(code)


def _run(command: click.Command, given: list[str], stopped: Sequence[Stopped]) -> int:
    ranks = ALONE
    try:
        ranks = Ranks.joined()
        with nullcontext() if ranks.leads else redirect_stdout(StringIO()):
            code = command.main(given, prog_name="hbxt", standalone_mode=False, obj=ranks)
            ranks.barrier()
    except BaseException as ended:
        error = _as_stopped(ended, stopped)
        if ranks.world > 1:
            _end_early(error, ranks, given)
        return _failed(error, given)
    ranks.end()
    return code if isinstance(code, int) else 0


def _as_stopped(ended: BaseException, stopped: Sequence[Stopped]) -> BaseException:
    """What ended a run: the signal, if one came, whatever it was turned into on its way up."""
    if not stopped or ended is stopped[0]:
        return ended
    for note in _kept(ended):
        stopped[0].add_note(note)
    return stopped[0]


def _failed(error: BaseException, given: Sequence[str]) -> int:
    """Tells an error and returns the exit code; raises what is no error of the user's."""
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if isinstance(error, Stopped | click.Abort | KeyboardInterrupt):
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        _tell([f"stopped by {stopped}", *_kept(error), stopped.advice])
        return stopped.exit_code
    if not isinstance(error, HbxtError | OSError):
        raise error
    if "--debug" in given:
        traceback.print_exception(error)
    _tell([f"error: {error}"])
    if (kept := _kept(error)) or isinstance(error, OSError | DiskFull):
        _tell([*kept, "once this is mended, the same command continues"])
    return error.exit_code if isinstance(error, HbxtError) else 1


def _end_early(error: BaseException, ranks: Ranks, given: Sequence[str]) -> NoReturn:
    """Ends one of several ranks; the first of them to come here tells what happened."""
    for number in (signal.SIGINT, signal.SIGTERM):  # torchrun asks the ranks of a failed run to end
        signal.signal(number, signal.SIG_IGN)
    if isinstance(error, Stopped) and (lost := ranks.lost()):
        for note in _kept(error):
            lost.add_note(note)
        error = lost
    code = 1
    with nullcontext() if ranks.first_to_tell() else redirect_stderr(StringIO()):
        try:
            code = _failed(error, given)
        except BaseException:
            traceback.print_exc()
    ranks.end()
    sys.stderr.flush()
    os._exit(code)  # what others still wait for would keep this process


def _tell(parts: Sequence[str]) -> None:
    """Prints one message on stderr, on a line of its own."""
    for handler in logging.getLogger("hbxt_compress").handlers:
        handler.close()  # ends a progress bar that is being drawn
    click.echo("; ".join(parts), err=True)


def _kept(error: BaseException) -> list[str]:
    """What the store noted about a result that was being built."""
    return list(vars(error).get("__notes__", ()))
