"""JSON text into values, without Python's surprises: what cannot be used later is refused here.

Python keeps the last of duplicate keys, takes NaN and Infinity, gives whole numbers that no float
holds and halves of characters that no file can hold, and ends nesting by RecursionError.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, Final

__all__ = ["parse_json", "read_json"]

_MOST_BYTES: Final = 100_000_000  # as safetensors' own limit for a header
_HALVES: Final = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes) -> Any:
    """The value; ValueError for anything else than JSON of finite numbers and unique keys."""
    if isinstance(text, bytes):
        text = text.decode("utf-8")  # json.loads would pass over halves of characters
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_constant, parse_float=_float,
            parse_int=_int,
        )  # fmt: skip
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if _HALVES.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("holds half a character, a surrogate without its pair") from None
    return value


def read_json(path: Path) -> Any:
    """The value in a file of at most 100 MB.

    Raises:
        ValueError: as `parse_json`, or the file is larger.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(f"has {size:,} bytes, at most {_MOST_BYTES:,} are read as JSON")
    return parse_json(path.read_bytes())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {twice[:60]!r} stands there twice")
    return found


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not a finite number")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:60]} is too large a number")
    return value


def _int(digits: str) -> int:
    value = int(digits)
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{digits[:20]}... is too large a number") from None
    return value
