"""Writes ONNX models with one data file beside them: the same models give the same bytes.

Tensors over 1 KiB go to the data file, each content once even if several models hold it; those
over 1 MiB start at a multiple of 64 KiB. External entries are location, offset, length in this
order, because MIGraphX reads them by position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from hbxt_compress.graph.builder import content_of, name_of

__all__ = ["ALIGNMENT", "DATA_FILE", "INLINE_BYTES", "component_bytes", "write_models"]

DATA_FILE = "model.onnx.data"
INLINE_BYTES = 1024
ALIGNMENT = 64 * 1024
_ALIGNED_FROM = 1024 * 1024
_SMALL_ALIGNMENT = 64


def write_models(folder: Path, models: Mapping[str, ir.Model]) -> None:
    """Writes each model under its file name and model.onnx.data; the models then point into it."""
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, tuple[int, int]] = {}
    with (folder / DATA_FILE).open("wb") as data:
        for name in sorted(models):
            for value in models[name].graph.initializers.values():
                _move(value, data, written, folder)
    for name in sorted(models):
        proto = ir.serde.serialize_model(models[name])
        (folder / name).write_bytes(proto.SerializeToString(deterministic=True))


def component_bytes(folder: Path) -> int:
    """Bytes of a component's graphs and weights: every model*.onnx and the data file."""
    return sum(path.stat().st_size for path in sorted(folder.glob("model*.onnx*")))


def _move(
    value: ir.Value, data: BinaryIO, written: dict[str, tuple[int, int]], folder: Path
) -> None:
    """Puts one initializer's bytes into the data file, if it is large, and refers to them.

    A lazy one is read once, here, and not kept.
    """
    tensor = content_of(value)
    if isinstance(tensor, ir.LazyTensor):
        tensor = tensor.raw()
    content = tensor.tobytes()
    if len(content) <= INLINE_BYTES:
        value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
        return
    digest = hashlib.sha256(content).hexdigest()
    if digest not in written:
        start = data.tell()
        step = ALIGNMENT if len(content) > _ALIGNED_FROM else _SMALL_ALIGNMENT
        offset = -(-start // step) * step
        data.write(b"\0" * (offset - start))
        data.write(content)
        written[digest] = (offset, len(content))
    offset, length = written[digest]
    value.const_value = ir.ExternalTensor(
        DATA_FILE,
        offset,
        length,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=name_of(value),
        base_dir=folder,
    )
