"""How a run is asked to stop: SIGINT and SIGTERM raise an exception once, then they kill.

Where what is done so far is worth keeping they end a loop instead: `until_stopped`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Final, TypeVar

__all__ = ["Stopped", "stoppable", "until_stopped"]

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
T = TypeVar("T")


class Stopped(BaseException):
    """Raised where the run was when the signal came. No Exception, so that nobody handles it.

    advice: what the user can do next.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.advice = "run the same command to continue"

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

    def stop(one: Stopped) -> None:
        raised.append(one)
        raise one

    with _first_signal(stop):
        yield raised


def until_stopped(items: Iterable[T], noted: list[Stopped]) -> Generator[T, None, None]:
    """The items, up to the one at which a signal comes: that is the last, and the signal is noted.

    Whoever takes them is not interrupted; a second signal kills. Before the first item is there a
    signal does what it did. Close the iterator: that is when signals do so again.
    """
    with ExitStack() as held:
        for i, item in enumerate(items):
            if not i:
                held.enter_context(_first_signal(noted.append))
            yield item
            if noted:
                return


@contextmanager
def _first_signal(then: Callable[[Stopped], None]) -> Iterator[None]:
    """Inside, the first signal calls `then` and a second one kills; outside, all is as before."""
    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield
        return
    before = {one: signal.getsignal(one) for one in _SIGNALS}

    def stop(number: int, _: FrameType | None) -> None:
        for one in _SIGNALS:
            signal.signal(one, signal.SIG_DFL)
        then(Stopped(number))

    for one, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(one, stop)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
