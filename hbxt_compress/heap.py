"""Heap: gives memory that was freed back to the system.

The C library keeps blocks of up to 32 MB for later. Beside matrices of a gigabyte that later does
not come, and a run would hold them for nothing.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

__all__ = ["give_back"]


def give_back() -> None:
    """All pages that nothing lies on; nothing happens where the C library is not glibc."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
