"""How a run is asked to stop: SIGINT and SIGTERM raise an exception once, then they kill."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

__all__ = ["Stopped", "stoppable"]

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """Raised where the run was when the signal came. No Exception, so that nobody handles it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What a shell says of a command that this signal ended: 130 or 143."""
        return 128 + self.number


@contextmanager
def stoppable() -> Iterator[list[Stopped]]:
    """Inside, the first signal raises Stopped and a second one kills; a signal ignored stays so.

    Gives what was raised, for libraries' C code may turn it into an error of its own on the way.
    """
    raised: list[Stopped] = []
    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield raised
        return
    before = {one: signal.getsignal(one) for one in _SIGNALS}

    def stop(number: int, _: FrameType | None) -> None:
        for one in _SIGNALS:
            signal.signal(one, signal.SIG_DFL)
        raised.append(Stopped(number))
        raise raised[-1]

    for one, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(one, stop)
    try:
        yield raised
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
