"""Event files as TensorBoard reads them: numbers and pictures by step.

A file is a row of frames: the length, its checksum, a protobuf `Event` of that length, its
checksum; checksums are CRC-32C, masked. Only the fields that a scalar or an image needs are written
(tensorflow/core/util/event.proto, framework/summary.proto). Time is the step, in seconds, so that
equal runs write equal bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hbxt_compress import disk

__all__ = ["Event", "EventFile"]

_VERSION = b"brain.Event:2"
_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5  # wire types
_RGB = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One value of a step: a number, or the bytes of a PNG. content: the protobuf it stands in."""

    step: int
    tag: str
    value: float | bytes
    content: bytes


class EventFile:
    """An event file that grows; it is begun by the first value."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def scalar(self, step: int, tag: str, value: float) -> None:
        """Adds a number."""
        self._add(step, tag, _field(2, _FLOAT, struct.pack("<f", value)))

    def image(self, step: int, tag: str, png: bytes) -> None:
        """Adds a picture, the bytes of an RGB PNG."""
        width, height = struct.unpack(">II", png[16:24])
        sizes = [_field(i, _VARINT, _varint(n)) for i, n in ((1, height), (2, width), (3, _RGB))]
        self._add(step, tag, _field(4, _BYTES, b"".join(sizes) + _field(4, _BYTES, png)))

    def rewind(self, step: int) -> None:
        """Forgets what came after a step, and what a kill left unfinished."""
        if self._path.exists():
            kept = b"".join(_frame(one.content) for one in self.events() if one.step <= step)
            unfinished = self._path.with_suffix(".tmp")
            unfinished.write_bytes(_frame(_head()) + kept)
            disk.put(unfinished, self._path)

    def copy(self, path: Path) -> None:
        """Writes the same file elsewhere, its folder too."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self._path.read_bytes())

    def events(self) -> Iterator[Event]:
        """All values so far, in order; a frame that is not whole ends them."""
        content = self._path.read_bytes() if self._path.exists() else b""
        at = 0
        while content[at + 8 : at + 12] == _checksum(content[at : at + 8]):
            (length,) = struct.unpack("<Q", content[at : at + 8])
            end = at + 12 + length
            frame = content[at + 12 : end]
            if content[end : end + 4] != _checksum(frame):
                return
            at = end + 4
            fields = dict(_fields(frame))
            if 5 in fields:
                yield _event(fields, frame)

    def _add(self, step: int, tag: str, value: bytes) -> None:
        content = _field(1, _BYTES, tag.encode()) + value
        event = _time(step) + _field(2, _VARINT, _varint(step))
        event += _field(5, _BYTES, _field(1, _BYTES, content))
        begun = self._path.exists()
        with self._path.open("ab") as file:
            file.write((b"" if begun else _frame(_head())) + _frame(event))


def _head() -> bytes:
    return _time(0) + _field(3, _BYTES, _VERSION)


def _time(step: int) -> bytes:
    return _field(1, _DOUBLE, struct.pack("<d", step))


def _event(fields: Mapping[int, bytes], content: bytes) -> Event:
    value = dict(_fields(dict(_fields(fields[5]))[1]))
    (step,) = struct.unpack("<Q", fields.get(2, b"").ljust(8, b"\0"))
    found = struct.unpack("<f", value[2])[0] if 2 in value else dict(_fields(value[4]))[4]
    return Event(step=step, tag=value[1].decode(), value=found, content=content)


def _field(number: int, kind: int, content: bytes) -> bytes:
    size = _varint(len(content)) if kind == _BYTES else b""
    return _varint(number << 3 | kind) + size + content


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, content) of a message's fields; of a varint 8 bytes, little end first."""
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        if key & 7 == _VARINT:
            n, at = _read_varint(message, at)
            yield key >> 3, struct.pack("<Q", n)
            continue
        size = {_DOUBLE: 8, _FLOAT: 4}.get(key & 7)
        if size is None:
            size, at = _read_varint(message, at)
        yield key >> 3, message[at : at + size]
        at += size


def _varint(n: int) -> bytes:
    found = bytearray()
    while n > 0x7F:
        found.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*found, n])


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    n = shift = 0
    while True:
        byte = message[at]
        n, at, shift = n | (byte & 0x7F) << shift, at + 1, shift + 7
        if byte < 0x80:
            return n, at


def _frame(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    return length + _checksum(length) + content + _checksum(content)


def _table() -> list[int]:
    found = []
    for n in range(256):
        for _ in range(8):
            n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
        found.append(n)
    return found


_CRC_32C = _table()


def _checksum(content: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _CRC_32C[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
