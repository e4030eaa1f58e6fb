"""JSON is JSON of finite numbers and unique keys, or a ValueError that says why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from hbxt_compress.json_text import parse_json, read_json


def test_what_is_json_comes_back() -> None:
    text = '{"a": [1, -2.5, null, true, "\\ud83d\\ude00"], "b": {"a": 1e300}}'
    assert parse_json(text) == {"a": [1, -2.5, None, True, "\U0001f600"], "b": {"a": 1e300}}
    assert parse_json(text.encode()) == parse_json(text)
    assert parse_json("1000000000000000019884624838656") == int(1e30)  # tokenizers are saved so


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "the key 'a' stands there twice"),
        ("[NaN]", "NaN is not a finite number"),
        ("[-Infinity]", "-Infinity is not a finite number"),
        ("[1e999]", "1e999 is too large a number"),
        ("1" + "0" * 400, "is too large a number"),
        ("1" * 5000, "Exceeds the limit"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": "\\ud800"}', "half a character"),
        ('{"\\udfff": 1}', "half a character"),
        ("{", "Expecting property name"),
        (b"\xff", "utf-8"),
        (b'{"a": "\xed\xa0\x80"}', "utf-8"),
        ('{"a": "x"}'.encode("utf-16"), "utf-8"),
    ],
)
def test_what_is_not_is_refused_with_the_reason(text: str | bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_json(text)


def test_a_file_too_large_to_be_settings_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(10**12)  # a hole: it takes no room
    with pytest.raises(ValueError, match="has 1,000,000,000,000 bytes"):
        read_json(path)
    path.write_bytes(b'{"a": "\xe4"}')
    with pytest.raises(ValueError, match="utf-8"):
        read_json(path)
