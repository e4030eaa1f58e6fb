"""Layers, or rows, that have nothing to do with each other: each core takes its own.

A step on a few thousand numbers is too short to be shared between cores; whole loops of them are
not, and torch lets go of Python's lock in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["each_alone", "one_thread"]

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def one_thread() -> Iterator[int]:
    """Meanwhile torch computes in the calling thread alone, in new threads too; how many it had."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield n_threads
    finally:
        torch.set_num_threads(n_threads)


def each_alone(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """What `work` makes of each item, in order; as many at once as torch has threads."""
    with one_thread() as n_threads:
        if n_threads == 1:
            return [work(item) for item in items]
        with ThreadPoolExecutor(n_threads) as pool:
            return list(pool.map(work, items))
