"""Freed memory goes back to the system, where the C library is glibc."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_FREED_BELOW_ANOTHER = """
import ctypes
from hbxt_compress.heap import {what} as what

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
    ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
)

def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])

def block():
    found = libc.malloc(8 << 20)
    ctypes.memset(found, 1, 8 << 20)
    return found

if {first}:
    what()
libc.free(libc.malloc(30 << 20))  # from now on blocks up to that size come from the heap
below, above = block(), block()
before = resident()
libc.free(below)
if not {first}:
    what()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="nothing happens without glibc")
@pytest.mark.parametrize(("what", "first"), [("keep_apart", True), ("give_back", False)])
def test_what_is_freed_below_something_else_goes_back(what: str, first: bool) -> None:
    code = _FREED_BELOW_ANOTHER.format(what=what, first=first)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) > 7 << 20
