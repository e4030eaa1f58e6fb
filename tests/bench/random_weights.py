"""Random weights with the tails of trained ones, written to safetensors shards as they are drawn.

Drawing ten gigabytes from a heavy-tailed law takes longer than the work that is measured on them.
So Student's t is drawn once, into a table of four million numbers; a row of a weight is a window of
the table at an offset of its own, times a sign and a scale of its own. Windows may overlap, but
shifted, so weights have full rank; groups have the tails, and channels the spread, that decide what
scale search and packing cost. No quality is measured on them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

__all__ = ["Drawer", "write_weights"]

_FREEDOM = 5  # of Student's t: trained weights have about these tails
_TABLE = 1 << 22
_NUMBERS_AT_ONCE = 1 << 19  # two megabytes: a whole matrix at once is half as fast
_CHANNEL_SPREAD = 0.3  # of the logarithm of a row's scale
_NORM_SPREAD, _BIAS = 0.05, 0.02
_BYTES = 2  # of a bfloat16


class Drawer:
    """Weights of one seed. Each depends on the seed and its name alone, not on what came before."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        drawn = self._generator("table").standard_t(_FREEDOM, size=_TABLE)
        self._table = (drawn / math.sqrt(_FREEDOM / (_FREEDOM - 2))).astype(np.float32)

    def chunks(self, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """The weight in bfloat16, some rows at a time, each chunk flat.

        Norm weights lie near 1, biases near 0, modulation tables and all else have a standard
        deviation of about 1 / sqrt(inputs) which varies from row to row.
        """
        generator = self._generator(name)
        mean, deviation, spread = _law(name, shape)
        n_rows = shape[0] if len(shape) > 1 else 1
        width = math.prod(shape) // n_rows
        windows = sliding_window_view(self._table, width)
        offsets = generator.integers(0, len(windows), n_rows)
        scales = deviation * np.exp(spread * generator.standard_normal(n_rows))
        scales *= generator.choice((-1.0, 1.0), n_rows)
        scales_R1 = scales.astype(np.float32)[:, None]
        step = max(1, _NUMBERS_AT_ONCE // width)
        for row in range(0, n_rows, step):
            drawn = windows[offsets[row : row + step]]
            drawn *= scales_R1[row : row + step]
            drawn += np.float32(mean)
            yield torch.from_numpy(drawn).to(torch.bfloat16).flatten()

    def _generator(self, name: str) -> np.random.Generator:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def write_weights(
    folder: Path,
    stem: str,
    shapes: Mapping[str, tuple[int, ...]],
    drawer: Drawer,
    *,
    prefix: str = "",
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes `<stem>.safetensors`, or shards and `<stem>.safetensors.index.json`, in bfloat16.

    Shards are cut where diffusers and transformers cut them: tensors in the module's order, a new
    file before the one that would exceed `shard_bytes`. A few megabytes are in memory at any time.
    prefix: goes before a tensor's name when its numbers are drawn, so that components differ.
    """
    shards = _shards(shapes, shard_bytes)
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        of = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"{stem}{of}.safetensors"
        where |= dict.fromkeys(names, file)
        with (folder / file).open("wb") as out:
            out.write(_header({name: shapes[name] for name in names}))
            for name in names:
                for chunk in drawer.chunks(prefix + name, shapes[name]):
                    out.write(chunk.view(torch.int16).numpy().data)
    if len(shards) > 1:
        size = _BYTES * sum(map(math.prod, shapes.values()))
        index = {"metadata": {"total_size": size}, "weight_map": where}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _law(name: str, shape: tuple[int, ...]) -> tuple[float, float, float]:
    """Mean, standard deviation, and how much the latter varies (its logarithm) between rows."""
    if name.endswith(".gamma") or ("norm" in name and name.endswith(".weight")):
        return 1.0, _NORM_SPREAD, 0.0
    if len(shape) == 1:
        return 0.0, _BIAS, 0.0
    n_in = shape[-1] if name.endswith("scale_shift_table") else math.prod(shape[1:])
    return 0.0, n_in**-0.5, _CHANNEL_SPREAD


def _shards(shapes: Mapping[str, tuple[int, ...]], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = _BYTES * math.prod(shape)
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """What a safetensors file begins with, padded to 8 bytes as the format asks."""
    document: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + _BYTES * math.prod(shape)
        document[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
