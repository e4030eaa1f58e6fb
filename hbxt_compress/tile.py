"""Tile: a part of a frame that is decoded at once, where the whole would take too much memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

__all__ = ["Tile"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Height and width in pixels; neighbours share at least overlap pixels along both.

    first, next: the graphs in vae_decoder/ that decode it, as those of a whole frame.
    """

    height: int
    width: int
    overlap: int
    first: str
    next: str

    @classmethod
    def within(cls, frame: tuple[int, int], side: int, overlap: int) -> Self | None:
        """Tiles of at most side by side pixels in a frame; None if it is no larger."""
        height, width = (min(side, whole) for whole in frame)
        if (height, width) == frame:
            return None
        size = f"{height}x{width}.onnx"
        names = {"first": f"model_tile_first_{size}", "next": f"model_tile_{size}"}
        return cls(height=height, width=width, overlap=overlap, **names)

    def problems(self, frame: tuple[int, int], factor: int) -> Iterator[str]:
        """Why frames of a height and width cannot be decoded in such tiles; nothing if they can.

        factor: pixels to a latent along both sides.
        """
        for name in ("height", "width", "overlap"):
            size, least = getattr(self, name), 0 if name == "overlap" else factor
            if size < least or size % factor:
                rule = f"a multiple of the {factor} that are one latent"
                yield f"{name}: {size} pixels, must be {rule}, {least} or more"
        sides = (("height", self.height, frame[0]), ("width", self.width, frame[1]))
        for name, side, whole in sides:
            if side > whole:
                yield f"{name}: {side} pixels, but a frame has {whole}: take at most that"
            elif side < whole and self.overlap >= side:
                yield f"overlap: {self.overlap} pixels, must be less than the {name}, {side}"
