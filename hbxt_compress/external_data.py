"""Which bytes of which other files an ONNX file lays claim to.

Reads the protobuf wire format directly: the runtime may not depend on the `onnx` package, and only
the path from the model down to its tensors matters here. Nothing is loaded: the file is mapped and
everything that is not on that path is skipped.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hbxt_compress.errors import ArtifactError

__all__ = ["ExternalTensor", "external_data", "external_data_problems"]

# Message -> field number -> message inside (onnx.proto3). Only what can hold a tensor.
_HOLDS: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_NAME, _EXTERNAL, _LOCATION = 8, 13, 14  # fields of a tensor
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalTensor:
    """One tensor kept in another file, as stated there; length None: to that file's end."""

    name: str
    location: str
    offset: int
    length: int | None


def external_data(path: Path) -> tuple[ExternalTensor, ...]:
    """The external tensors of an ONNX file, subgraphs and functions included; () if there are none.

    Raises:
        ArtifactError: the file is not an ONNX protobuf, or an offset or length is not a number.
    """
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            view = memoryview(mapped)
            try:
                return tuple(_tensors(view, 0, len(view), "model"))
            finally:
                view.release()
    except (ValueError, IndexError, RecursionError) as error:  # an empty file: ValueError
        raise ArtifactError(
            f"{path}: not a readable ONNX file ({error}); export it again"
        ) from error


def external_data_problems(path: Path) -> list[str]:
    """What is wrong with external data: bytes out of range, files missing or outside the folder."""
    try:
        tensors = external_data(path)
    except ArtifactError as error:
        return [str(error)]
    problems = []
    folder = path.parent.resolve()
    for tensor in tensors:
        where = f"{path.name}: tensor {tensor.name!r}"
        data = path.parent / tensor.location
        if not tensor.location or not _inside(data, folder):
            problems.append(f"{where} lies outside the folder, in {tensor.location!r}")
        elif not data.is_file():
            problems.append(f"{where} lies in {tensor.location}, which does not exist")
        else:
            size = data.stat().st_size
            end = size if tensor.length is None else tensor.offset + tensor.length
            if min(tensor.offset, end - tensor.offset) < 0 or end > size:
                problems.append(
                    f"{where} claims bytes {tensor.offset}..{end} of {tensor.location}, "
                    f"which has {size}"
                )
    return problems


def _inside(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder)
    except (ValueError, RuntimeError):  # a NUL in its name, a link that leads to itself
        return False


def _tensors(view: memoryview, start: int, end: int, kind: str) -> Iterator[ExternalTensor]:
    if kind == "tensor":
        yield from _tensor(view, start, end)
        return
    inside = _HOLDS[kind]
    for number, first, last in _fields(view, start, end):
        if number in inside and last is not None:
            yield from _tensors(view, first, last, inside[number])


def _tensor(view: memoryview, start: int, end: int) -> Iterator[ExternalTensor]:
    name, external, entries = "", False, {}
    for number, first, last in _fields(view, start, end):
        if number == _NAME and last is not None:
            name = str(view[first:last], "utf-8")
        elif number == _LOCATION and last is None:
            external = first == 1
        elif number == _EXTERNAL and last is not None:
            pair = {
                n: str(view[a:b], "utf-8")
                for n, a, b in _fields(view, first, last)
                if b is not None
            }
            entries[pair.get(1, "")] = pair.get(2, "")
    if external or entries:
        yield ExternalTensor(
            name=name,
            location=entries.get("location", ""),
            offset=int(entries.get("offset", 0)),
            length=int(entries["length"]) if "length" in entries else None,
        )


def _fields(view: memoryview, at: int, end: int) -> Iterator[tuple[int, int, int | None]]:
    """Field number with its extent, or with its value and None where it is a plain number."""
    while at < end:
        tag, at = _varint(view, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(view, at)
            yield number, value, None
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        elif wire == _BYTES:
            length, at = _varint(view, at)
            if at + length <= end:
                yield number, at, at + length
            at += length
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at > end:
            raise ValueError(f"a field ends at byte {at}, after its message's end at {end}")


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"a number at byte {at} is longer than 64 bits")
