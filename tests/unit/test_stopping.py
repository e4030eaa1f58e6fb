"""A signal that ends a loop instead of raising, and what signals do before and after."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from hbxt_compress.stopping import Stopped, stoppable, until_stopped


def counted(stop_at: int, number: int = signal.SIGINT) -> Iterator[int]:
    """0, 1, 2 ... 9; the signal comes while the one called stop_at is made."""
    for i in range(10):
        if i == stop_at:
            os.kill(os.getpid(), number)
        yield i


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stop_at", [1, 4, 9])
def test_the_item_that_was_being_made_is_the_last(stop_at: int, number: int) -> None:
    noted: list[Stopped] = []
    with stoppable() as raised, closing(until_stopped(counted(stop_at, number), noted)) as items:
        assert list(items) == list(range(stop_at + 1))
    assert [one.number for one in noted] == [number]
    assert noted[0].exit_code == 128 + number
    assert raised == []


def test_before_the_first_item_a_signal_raises() -> None:
    noted: list[Stopped] = []
    with (
        pytest.raises(Stopped),
        stoppable() as raised,
        closing(until_stopped(counted(0), noted)) as items,
    ):
        next(items)
    assert (len(raised), noted) == (1, [])


def test_whoever_takes_the_items_is_not_interrupted() -> None:
    noted: list[Stopped] = []
    taken = []
    with stoppable(), closing(until_stopped(iter(range(10)), noted)) as items:
        for item in items:
            if item == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            taken.append(item)
    assert taken == [0, 1, 2, 3]
    assert len(noted) == 1


@pytest.mark.parametrize("n_taken", [0, 1, 5, 10])
def test_without_a_signal_all_is_as_before(n_taken: int) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    noted: list[Stopped] = []
    with closing(until_stopped(range(10), noted)) as items:
        assert [item for item, _ in zip(items, range(n_taken), strict=False)] == [*range(n_taken)]
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    assert noted == []
    assert list(until_stopped([], noted)) == []


def test_in_another_thread_items_just_pass() -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.extend(until_stopped(range(5), [])))
    thread.start()
    thread.join()
    assert found == [0, 1, 2, 3, 4]


def test_a_second_signal_kills() -> None:
    code = """
import os, signal, sys
from hbxt_compress.stopping import stoppable, until_stopped
noted = []
with stoppable():
    for i in until_stopped(range(9), noted):
        os.kill(os.getpid(), signal.SIGTERM)
        print(i, len(noted), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "0 1\n")
