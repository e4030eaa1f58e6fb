"""Rates: what this machine does of each kind of work in a second, measured in some seconds.

Each is measured with the code that does it, the fastest of a few calls, on as many threads as torch
has; other load on the machine slows it as it will slow the run. What a measurement would take too
long for is a constant of the table below.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch

from hbxt_compress import disk
from hbxt_compress.algorithms.feedback import factorise, feed_back
from hbxt_compress.algorithms.polish import descend
from hbxt_compress.algorithms.scales import search_scales
from hbxt_compress.costs.work import KINDS, Kind, Rates
from hbxt_compress.formats import FORMATS

__all__ = ["disk_rates", "fastest_s", "find_rates", "measure_rates", "product_rate", "sha256_rate"]

log = logging.getLogger(__name__)
_FORMAT = "int4-g128"
_LEAST_S, _LEAST_CALLS = 0.2, 3  # of a measurement: fewer are at the scheduler's mercy
_BLOCK_BYTES = 1 << 24
_DISK_BYTES = 1 << 27
_MOST_AGE_S = 7 * 24 * 3600  # of remembered rates: machines get other neighbours
# Weights that the compiled search passes for each operation of a float32 product, which also keeps
# all cores' arithmetic busy: int4-g128, 70 million a second and core of an AVX-512 processor, where
# products take 175 GFLOP/s a core; for squares and for the power 3.5 alike.
_COMPILED_SEARCH: Final = 4.0e-4
_SEARCHED_OI, _PRODUCT_TIO, _DOUBLE_TIO = (192, 1024), (512, 1536, 1536), (256, 1024, 1024)
_FACTORED, _FACTORED_64 = 2048, 1024  # columns
_ROWS_FED, _COLUMNS_FED = (128, 2048), 512


def find_rates(memo: Path, *, renew: bool = False) -> Rates:
    """This machine's rates, measured on the disk of the file that remembers them.

    renew: measured even if they are remembered. A week later, or on another machine, they are not.

    Raises:
        OSError: the disk has no room for 128 MB.
    """
    machine = _machine()
    with suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(memo.read_text(encoding="utf-8"))
        whole = known["per_second"].keys() == set(KINDS)
        fresh = known["machine"] == machine and 0 <= time.time() - known["at_s"] < _MOST_AGE_S
        if whole and fresh and not renew:
            return Rates(
                machine=machine,
                per_second=known["per_second"],
                n_cores=known["n_cores"],
                is_compiled=_is_compiled(),
            )
    memo.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    found = measure_rates(memo.parent)
    log.info("rates of this machine: measured in %.1f s", time.monotonic() - began)
    disk.write_text(memo, json.dumps({**asdict(found), "at_s": time.time()}, indent=1))
    return found


def measure_rates(folder: Path) -> Rates:
    """All rates, the disk's in a file in `folder` that is removed again."""
    written, read = disk_rates(folder, _DISK_BYTES)
    found: dict[Kind, float] = {
        "write": written,
        "read": read,
        "hash": sha256_rate(),
        "move": _moved(),
        "fresh": _fresh(),
        "call": 1 / _call_s(),
        "float32": product_rate(*_PRODUCT_TIO, torch.float32),
        "convolve": _convolved(),
        "coarse": _coarse(),
        "float64": product_rate(*_DOUBLE_TIO, torch.float64),
        "factor32": _factored(_FACTORED, torch.float32),
        "factor64": _factored(_FACTORED_64, torch.float64),
        "search_eager": _searched(),
        "second": 1.0,
    }
    found["search"] = _COMPILED_SEARCH * found["float32"]
    found |= _columns(found["float32"])
    return Rates(
        machine=_machine(),
        per_second=found,
        n_cores=os.cpu_count() or 1,
        is_compiled=_is_compiled(),
    )


def fastest_s(
    act: Callable[[], object], *, least_s: float = _LEAST_S, least_calls: int = _LEAST_CALLS
) -> float:
    """The fastest of as many calls as fit; one more warms up."""
    # With one thread the processor's time is the rate's, whatever else runs on the machine.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    act()
    found: list[float] = []
    while len(found) < least_calls or sum(found) < least_s:
        began = clock()
        act()
        found.append(clock() - began)
    return max(1e-9, min(found))


def sha256_rate() -> float:
    """Bytes a second of one core."""
    block = bytes(_BLOCK_BYTES)
    return _BLOCK_BYTES / fastest_s(lambda: hashlib.sha256(block))


def product_rate(n_rows: int, n_out: int, n_in: int, dtype: torch.dtype) -> float:
    """Operations a second of a linear layer."""
    x_TI, weight_OI = (_drawn(n, n_in).to(dtype) for n in (n_rows, n_out))
    seconds = fastest_s(lambda: torch.nn.functional.linear(x_TI, weight_OI))
    return 2 * n_rows * n_out * n_in / seconds


def disk_rates(folder: Path, n_bytes: int) -> tuple[float, float]:
    """Bytes a second written, the last fsync included, and read again.

    The pages are dropped in between, which the kernel may refuse; then memory is measured.
    """
    block = os.urandom(_BLOCK_BYTES)  # of zeros a disk may make a hole
    n_blocks = n_bytes // _BLOCK_BYTES
    with tempfile.NamedTemporaryFile(dir=folder, buffering=0) as file:
        began = time.perf_counter()
        for _ in range(n_blocks):
            file.write(block)
        os.fsync(file.fileno())
        written_s = time.perf_counter() - began
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        buffer = bytearray(_BLOCK_BYTES)
        began = time.perf_counter()
        while file.readinto(buffer):
            pass
        read_s = time.perf_counter() - began
    return n_blocks * _BLOCK_BYTES / written_s, n_blocks * _BLOCK_BYTES / read_s


def _coarse() -> float:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        return product_rate(*_PRODUCT_TIO, torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)


def _moved() -> float:
    numbers = torch.ones(1 << 22)
    return 2 * numbers.nbytes / fastest_s(lambda: numbers * 2.0)


def _convolved() -> float:
    """Of channels and frames as a small VAE's are; large ones come nearer to products."""
    channels, frames, height, width = 48, 4, 32, 32
    x = torch.ones(1, channels, frames + 2, height + 2, width + 2)
    weight = torch.ones(channels, channels, 3, 3, 3)
    flops = 2 * channels * channels * 27 * frames * height * width
    return flops / fastest_s(lambda: torch.conv3d(x, weight))


def _fresh() -> float:
    n = 1 << 24
    return 4 * n / fastest_s(lambda: torch.empty(n).fill_(1.0))


def _call_s() -> float:
    one = torch.ones(8)

    def some() -> None:
        for _ in range(200):
            one.add_(1.0)

    return fastest_s(some) / 200


def _factored(n: int, dtype: torch.dtype) -> float:
    root = _drawn(n, 64).to(dtype)
    matrix = root @ root.T
    matrix.diagonal().add_(64.0)
    return n**3 / 3 / fastest_s(lambda: torch.linalg.cholesky_ex(matrix))


def _searched() -> float:
    weight_OI = _drawn(*_SEARCHED_OI)
    seconds = fastest_s(lambda: search_scales(weight_OI, FORMATS[_FORMAT]))
    return weight_OI.numel() / seconds


def _columns(products: float) -> dict[Kind, float]:
    """Columns, and columns times rows, of feedback and of descent, without their products."""
    n, found = _COLUMNS_FED, dict[Kind, float]()
    root = _drawn(n, n)
    hessian_II = root @ root.T / n
    hessian_II.diagonal().add_(0.1)
    order = torch.arange(n)
    factor = factorise(hessian_II, order)
    assert factor is not None
    took: dict[str, list[float]] = {"feed": [], "descend": []}
    for rows in _ROWS_FED:
        weight_OI = _drawn(rows, n)
        grid = search_scales(weight_OI, FORMATS[_FORMAT], thorough=False)
        levels_OI = grid.levels(weight_OI)
        fed_s = fastest_s(lambda w=weight_OI, g=grid: feed_back(w, factor, g))  # type: ignore[misc]
        moved_s = fastest_s(
            lambda w=weight_OI, g=grid, q=levels_OI: descend(w, q, g, hessian_II, order)  # type: ignore[misc]
        )
        took["feed"].append(fed_s - rows * n * n / products)
        took["descend"].append(moved_s - 3 * rows * n * n / products)
    few, many = _ROWS_FED
    for kind, column, number in (
        ("feed", "feed_column", "feed_number"),
        ("descend", "descend_column", "descend_number"),
    ):
        short_s, long_s = took[kind]
        each_s = max(1e-12, (long_s - short_s) / (n * (many - few)))
        found[number] = 1 / each_s  # type: ignore[index]
        found[column] = n / max(1e-9, short_s - n * few * each_s)  # type: ignore[index]
    return found


def _drawn(n_out: int, n_in: int) -> torch.Tensor:
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(0))


def _machine() -> str:
    """What rates depend on, in words: the processor, the threads, torch."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((one.partition(":")[2].strip() for one in lines if "model name" in one), name)
    n_threads = torch.get_num_threads()
    return f"{name}, {n_threads} of {os.cpu_count()} threads, torch {torch.__version__}"


def _is_compiled() -> bool:
    """Whether torch's compiler has compiled anything here before, and kept it."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return (Path(cache_dir()) / "fxgraph").is_dir()
