"""Event files: frames, checksums and protobufs as others read them; what a kill leaves."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from hbxt_compress.clips import contact_sheet
from hbxt_compress.render import events
from hbxt_compress.render.events import EventFile


def _crc32c(content: bytes) -> int:
    """Bit by bit, by the definition: polynomial 0x1EDC6F41, reflected."""
    crc = 0xFFFFFFFF
    for byte in content:
        for bit in range(8):
            top = (crc ^ byte >> bit) & 1
            crc = crc >> 1 ^ (0x82F63B78 * top)
    return crc ^ 0xFFFFFFFF


def _masked(content: bytes) -> int:
    crc = _crc32c(content)
    return (((crc >> 15) | (crc << 17 & 0xFFFFFFFF)) + 0xA282EAD8) % 2**32


def _frames(content: bytes) -> list[bytes]:
    found = []
    while content:
        length, check = struct.unpack("<QI", content[:12])
        assert check == _masked(content[:8])
        frame = content[12 : 12 + length]
        assert struct.unpack("<I", content[12 + length : 16 + length]) == (_masked(frame),)
        found.append(frame)
        content = content[16 + length :]
    return found


def _event_class() -> type:
    """The published event.proto and summary.proto, as far as scalars and images go."""
    file = descriptor_pb2.FileDescriptorProto(name="event.proto", package="t", syntax="proto3")
    kinds = {
        "double": 1,
        "float": 2,
        "int64": 3,
        "int32": 5,
        "string": 9,
        "message": 11,
        "bytes": 12,
    }

    def message(name: str, fields: list[tuple[str, int, str, str]]) -> None:
        one = file.message_type.add(name=name)
        for field, number, kind, of in fields:
            own = one.field.add(name=field, number=number, type=kinds[kind], label=1)
            if of:
                own.type_name = f".t.{of}"
            if field == "value":
                own.label = 3

    message("Image", [("height", 1, "int32", ""), ("width", 2, "int32", ""),
                      ("colorspace", 3, "int32", ""), ("encoded", 4, "bytes", "")])  # fmt: skip
    message("Value", [("tag", 1, "string", ""), ("simple_value", 2, "float", ""),
                      ("image", 4, "message", "Image")])  # fmt: skip
    message("Summary", [("value", 1, "message", "Value")])
    message("Event", [("wall_time", 1, "double", ""), ("step", 2, "int64", ""),
                      ("file_version", 3, "string", ""),
                      ("summary", 5, "message", "Summary")])  # fmt: skip
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Event"))


def _png(path: Path) -> bytes:
    contact_sheet(path, [np.zeros((4, 6, 10, 3), np.uint8)], n_columns=2)
    return path.read_bytes()


def test_the_checksum_is_the_published_one() -> None:
    assert _crc32c(b"123456789") == 0xE3069283  # the catalogue's check value of CRC-32C
    assert _crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert struct.unpack("<I", events._checksum(b"123456789")) == (_masked(b"123456789"),)


def test_others_read_what_was_written(tmp_path: Path) -> None:
    path, png = tmp_path / "events", _png(tmp_path / "a.png")
    file = EventFile(path)
    file.scalar(0, "held_out", 0.25)
    file.image(300, "samples", png)
    file.scalar(70_000, "loss", float("nan"))
    kind = _event_class()
    first, *rest = [kind.FromString(frame) for frame in _frames(path.read_bytes())]
    assert first.file_version == "brain.Event:2"
    (score,), (picture,), (loss,) = (one.summary.value for one in rest)
    assert [one.step for one in rest] == [0, 300, 70_000]
    assert [one.wall_time for one in rest] == [0.0, 300.0, 70_000.0]
    assert (score.tag, score.simple_value) == ("held_out", 0.25)
    assert picture.image.encoded == png
    assert (picture.image.height, picture.image.width, picture.image.colorspace) == (8, 24, 3)
    assert loss.simple_value != loss.simple_value
    found = list(file.events())
    assert [(one.step, one.tag) for one in found] == [
        (0, "held_out"), (300, "samples"), (70_000, "loss"),
    ]  # fmt: skip
    assert found[1].value == png


def test_a_run_that_goes_on_repeats_no_step(tmp_path: Path) -> None:
    whole, file = EventFile(tmp_path / "whole"), EventFile(tmp_path / "killed")
    for step in range(1, 9):
        whole.scalar(step, "loss", 1 / step)
    for step in range(1, 7):
        file.scalar(step, "loss", 1 / step)
    path = tmp_path / "killed"
    path.write_bytes(path.read_bytes()[:-5])  # a kill amid a frame
    assert [one.step for one in file.events()] == [1, 2, 3, 4, 5]
    file.rewind(4)
    for step in range(5, 9):
        file.scalar(step, "loss", 1 / step)
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()
    file.rewind(-1)
    assert list(file.events()) == []
    EventFile(tmp_path / "none").rewind(3)
    assert not (tmp_path / "none").exists()
