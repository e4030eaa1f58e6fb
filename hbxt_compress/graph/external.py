"""Writes ONNX models with one data file beside them: the same models give the same bytes.

Tensors over 1 KiB go to the data file, each content once even if several models hold it; those
over 1 MiB start at a multiple of 64 KiB. External entries are location, offset, length in this
order, because MIGraphX reads them by position. A tensor is written without a copy of it, and a
table that is made by rows without ever being whole.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from hbxt_compress.graph.builder import ByRows, content_of, name_of

__all__ = ["ALIGNMENT", "DATA_FILE", "INLINE_BYTES", "component_bytes", "write_models"]

DATA_FILE = "model.onnx.data"
INLINE_BYTES = 1024
ALIGNMENT = 64 * 1024
_ALIGNED_FROM = 1024 * 1024
_SMALL_ALIGNMENT = 64
_TELLING = 1024
_READ_AT_ONCE = 1 << 18
_Start = tuple[bytes, int]  # of a tensor, and how many bytes it has


def write_models(folder: Path, models: Mapping[str, ir.Model]) -> None:
    """Writes each model under its file name and model.onnx.data; the models then point into it."""
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[_Start, list[int]] = {}
    with (folder / DATA_FILE).open("w+b") as data:
        for name in sorted(models):
            for value in models[name].graph.initializers.values():
                _move(value, data, written, folder)
    for name in sorted(models):
        proto = ir.serde.serialize_model(models[name])
        (folder / name).write_bytes(proto.SerializeToString(deterministic=True))


def component_bytes(folder: Path) -> int:
    """Bytes of a component's graphs and weights: every model*.onnx and the data file."""
    return sum(path.stat().st_size for path in sorted(folder.glob("model*.onnx*")))


def _move(value: ir.Value, data: BinaryIO, written: dict[_Start, list[int]], folder: Path) -> None:
    """Puts one initializer's bytes into the data file, if it is large, and refers to them.

    A lazy one is read once, here, and not kept.
    """
    tensor = content_of(value)
    if tensor.nbytes <= INLINE_BYTES:
        value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
        return
    start = data.tell()
    step = ALIGNMENT if tensor.nbytes > _ALIGNED_FROM else _SMALL_ALIGNMENT
    offset = -(-start // step) * step
    data.write(b"\0" * (offset - start))
    earlier = written.setdefault((_append(_parts(tensor), data), tensor.nbytes), [])
    for other in earlier:  # known only now: nothing is made twice to find out
        if _same(data, other, offset, tensor.nbytes):
            data.seek(start)
            data.truncate()
            offset = other
            break
    else:
        earlier.append(offset)
        data.seek(0, os.SEEK_END)
    value.const_value = ir.ExternalTensor(
        DATA_FILE,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=name_of(value),
        base_dir=folder,
    )


def _parts(tensor: ir.TensorProtocol) -> Iterable[ir.TensorProtocol]:
    """The tensor's content, in parts where it can be had so."""
    if not isinstance(tensor, ir.LazyTensor):
        return (tensor,)
    return tensor.raw.parts() if isinstance(tensor.raw, ByRows) else (tensor.raw(),)


def _append(parts: Iterable[ir.TensorProtocol], data: BinaryIO) -> bytes:
    """Writes the bytes of all parts; the first of them, which tell most tensors apart."""
    start = b""
    for part in parts:
        content = _bytes(part)
        start = start or bytes(content[:_TELLING])
        data.write(content)
    return start


def _same(data: BinaryIO, one: int, other: int, length: int) -> bool:
    """Whether the file holds the same bytes at two places."""
    for place in range(0, length, _READ_AT_ONCE):
        read = []
        for offset in (one, other):
            data.seek(offset + place)
            read.append(data.read(min(_READ_AT_ONCE, length - place)))
        if read[0] != read[1]:
            return False
    return True


def _bytes(tensor: ir.TensorProtocol) -> bytes | memoryview:
    """What the file holds of a tensor; its own memory where that has the file's layout."""
    array = np.ascontiguousarray(tensor.numpy())
    if sys.byteorder != "little" or array.nbytes != tensor.nbytes:  # such as two codes a byte
        return tensor.tobytes()
    return array.reshape(-1).view(np.uint8).data
