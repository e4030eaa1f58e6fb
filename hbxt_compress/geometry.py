"""Geometry: the size of a clip."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from hbxt_compress.errors import UsageError

__all__ = ["Geometry"]

_TEXT = re.compile(r"(?P<height>\d+)x(?P<width>\d+)x(?P<n_frames>\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Pixels, frames (1 mod 4) and frames a second of a clip."""

    height: int
    width: int
    n_frames: int
    fps: float

    def __str__(self) -> str:
        """`704x1280x121`: height, width, frames."""
        return f"{self.height}x{self.width}x{self.n_frames}"

    @classmethod
    def parse(cls, text: str, fps: float) -> tuple[Self, ...]:
        """The sizes in `704x1280x121,480x832x81`, in this order.

        Raises:
            UsageError: one is not written so, or stands there twice.
        """
        found = []
        for one in text.split(","):
            numbers = _TEXT.fullmatch(one.strip())
            if numbers is None:
                raise UsageError(
                    f"geometry {one.strip()!r}: write height x width x frames, as 704x1280x121"
                )
            size = cls(**{key: int(value) for key, value in numbers.groupdict().items()}, fps=fps)
            if size in found:
                raise UsageError(f"geometry {size}: stands there twice")
            found.append(size)
        return tuple(found)
