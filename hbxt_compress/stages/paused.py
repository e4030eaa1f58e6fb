"""Paused: a call that stands still before a module, until it is told to go on.

A block's layers are rounded one after the other, each on what the layers before it, rounded, make
of every batch. Runs that stand still meanwhile pass the block once; beginning anew for each layer
would pass it three times. A run that stands still needs a stack of its own, so it is a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Semaphore, Thread, current_thread
from typing import Generic, TypeVar

from torch import Tensor, nn

__all__ = ["Paused"]

R = TypeVar("R")


class Paused(Generic[R]):
    """A call, not begun yet. Its thread and its owner's take turns: never do both run."""

    def __init__(self, call: Callable[[], R]) -> None:
        self._call = call
        self._go, self._halt = Semaphore(0), Semaphore(0)
        self._thread = Thread(target=self._work, daemon=True)
        self._found: list[R] = []
        self._given: list[Tensor] = []
        self._error: BaseException | None = None
        self._ended = False

    def until(self, module: nn.Module) -> Tensor:
        """Runs up to the next call of a module; its first argument. The call itself waits.

        Raises:
            RuntimeError: the module is not called any more.
        """
        handle = module.register_forward_pre_hook(self._reached)
        try:
            self._resume()
        finally:
            handle.remove()
        if self._ended:
            raise RuntimeError(f"{type(module).__name__} is not called any more")
        return self._given.pop()

    def result(self) -> R:
        """Runs to the end."""
        if not self._ended:
            self._resume()
        return self._found[0]

    def abandon(self) -> None:
        """Ends a run of which the rest is not needed."""
        if self._thread.is_alive():
            self._error = _Abandoned()
            self._go.release()
            self._thread.join()
        self._ended = True

    def _resume(self) -> None:
        if self._ended:
            raise RuntimeError("this run has ended")
        if not self._thread.is_alive():
            self._thread.start()
        self._go.release()
        try:
            self._halt.acquire()
        except BaseException:  # a signal: the other thread must stand still before this one goes on
            self._halt.acquire()
            raise
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        self._go.acquire()
        try:
            self._found.append(self._call())
        except BaseException as error:  # the owner raises it
            self._error = error
        self._ended = True
        self._halt.release()

    def _reached(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if current_thread() is not self._thread:
            return
        self._given.append(inputs[0])
        self._halt.release()
        self._go.acquire()
        if self._error is not None:
            raise self._error


class _Abandoned(BaseException):
    """Unwinds an abandoned run's stack; nothing catches it."""
