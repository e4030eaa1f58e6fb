"""Heap: memory that was freed goes back to the system.

The C library keeps blocks of up to 32 MB for later. Beside matrices of a gigabyte that later does
not come, and a run would hold them for nothing.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

__all__ = ["give_back", "keep_apart"]

_MMAP_THRESHOLD = -3  # glibc's number of the setting
_LARGE = 1 << 20


def give_back() -> None:
    """All pages that nothing lies on; nothing happens where the C library is not glibc."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_apart() -> None:
    """From now on blocks of a MiB or more get pages of their own, which go when they are freed.

    Nothing happens where the C library is not glibc.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)
