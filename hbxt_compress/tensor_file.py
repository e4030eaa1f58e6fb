"""A safetensors file, written one tensor at a time: what a whole checkpoint costs in memory is one.

The bytes are those that safetensors' own `save_file` writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hbxt_compress.weights import DTYPES

__all__ = ["write_tensors"]


def write_tensors(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    read: Callable[[str], Tensor],
) -> None:
    """Writes a new file with these tensors: name -> dtype as safetensors calls it, and shape.

    read: gives each, once, in the order in which they lie in the file.
    """
    order = sorted(tensors, key=lambda name: (-DTYPES[tensors[name][0]].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        start, end = end, end + DTYPES[dtype].itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = read(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (
                DTYPES[tensors[name][0]],
                tensors[name][1],
            )
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
