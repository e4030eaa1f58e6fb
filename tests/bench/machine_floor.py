"""What this machine can do at best at each thing that compressing a model consists of.

    python tests/bench/machine_floor.py [--folder build/bench]

A compressor reads a checkpoint, hashes it, searches scales, multiplies where it calibrates, and
writes and hashes an artifact. The rate of each is measured alone, in this process, on as many
threads as torch has; their sum is the time that no implementation of these steps one after the
other goes below. Other load on the machine slows the disk, and all else where there are several
threads. Some ten seconds in all.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hbxt_compress.algorithms.scales import search_scales
from hbxt_compress.costs.rates import disk_rates, fastest_s, product_rate, sha256_rate
from hbxt_compress.formats import FORMATS

__all__ = ["MachineFloor", "Work", "measure_floor"]

_LAYERS_OI = ((1536, 1536), (8960, 1536), (3072, 3072), (14336, 3072))  # of 1.3B and 5B
_TOKENS = 256
_DTYPES = (torch.float32, torch.bfloat16)
_FILE_BYTES = 1 << 28
_SEARCHED_OI = (1364, 3072)  # four chunks of search_scales, for all cores
_FORMAT = "int4-g128"
_LEAST_S, _LEAST_CALLS = 0.4, 5  # of a measurement: fewer are at the scheduler's mercy


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a run has to do at least.

    read_bytes, hashed_bytes, written_bytes: each counted once; flops: of matrix products in
    float32; searched: weights whose scales are searched, by the power of the error's norm.
    """

    read_bytes: int = 0
    hashed_bytes: int = 0
    written_bytes: int = 0
    flops: float = 0.0
    searched: Mapping[float, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFloor:
    """Rates per second, the best of a few measurements each.

    gemm_flops: dtype -> the best over layer shapes; gemm_by_layer: "dtype O x I" -> that shape's,
    at 256 tokens. read_bytes and write_bytes: sequential, through the disk as far as a process
    without privileges can tell. search_weights: norm's power -> weights of int4-g128.
    """

    machine: str
    n_threads: int
    gemm_flops: Mapping[str, float]
    gemm_by_layer: Mapping[str, float]
    read_bytes: float
    write_bytes: float
    sha256_bytes: float
    search_weights: Mapping[float, float]

    def parts_s(self, work: Work) -> dict[str, float]:
        """Seconds of each kind of work; their sum is the floor.

        Raises:
            ValueError: a norm whose search was not measured.
        """
        unknown = sorted(work.searched.keys() - self.search_weights.keys())
        if unknown:
            raise ValueError(
                f"scale search with norm {unknown} was not measured, only with "
                f"{sorted(self.search_weights)}: give measure_floor these norms"
            )
        return {
            "read": work.read_bytes / self.read_bytes,
            "hash": work.hashed_bytes / self.sha256_bytes,
            "search": sum(n / self.search_weights[norm] for norm, n in work.searched.items()),
            "multiply": work.flops / self.gemm_flops["float32"],
            "write": work.written_bytes / self.write_bytes,
        }


def measure_floor(folder: Path, norms: Sequence[float] = (2.0, 3.5)) -> MachineFloor:
    """Measures all rates, the disk's in a file in `folder` that is removed again.

    Raises:
        OSError: the folder's disk has no room for 256 MB.
    """
    gemm = {
        (dtype, shape): product_rate(_TOKENS, *shape, dtype)
        for dtype in _DTYPES
        for shape in _LAYERS_OI
    }
    write_bytes, read_bytes = disk_rates(folder, _FILE_BYTES)
    return MachineFloor(
        machine=platform.processor() or platform.machine(),
        n_threads=torch.get_num_threads(),
        gemm_flops={
            _name(dtype): max(rate for (own, _), rate in gemm.items() if own == dtype)
            for dtype in _DTYPES
        },
        gemm_by_layer={
            f"{_name(dtype)} {shape[0]} x {shape[1]}": rate for (dtype, shape), rate in gemm.items()
        },
        read_bytes=read_bytes,
        write_bytes=write_bytes,
        sha256_bytes=sha256_rate(),
        search_weights={norm: _searched(norm) for norm in norms},
    )


def _searched(norm: float) -> float:
    weight_OI = torch.randn(_SEARCHED_OI, generator=torch.Generator().manual_seed(0))
    seconds = fastest_s(
        lambda: search_scales(weight_OI, FORMATS[_FORMAT], norm=norm),
        least_s=_LEAST_S,
        least_calls=_LEAST_CALLS,
    )
    return weight_OI.numel() / seconds


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure")
    asked = parser.parse_args()
    print(json.dumps(asdict(measure_floor(asked.folder)), indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
