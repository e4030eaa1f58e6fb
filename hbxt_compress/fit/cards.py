"""Cards: memory, bandwidth and rates of what graphs may run on, from cards.yaml."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Literal

from hbxt_compress.errors import UsageError
from hbxt_compress.strict import Settings, did_you_mean, load

__all__ = ["CPU", "GIB", "Card", "Cards", "Computed", "Room", "cards", "find_room", "memory_bytes"]

GIB: Final = 1 << 30
CPU: Final = "cpu"
Computed = Literal["float32", "float16", "int8"]
_FILE = Path(__file__).parent / "cards.yaml"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([MG])(?:i?B)?|(\d+(?:\.\d+)?)", re.IGNORECASE)


class Card(Settings):
    """One card. memory_gb: 2^30 bytes; two are a range. tflops: peaks by what is computed."""

    name: str
    gfx: str
    memory_gb: tuple[float, ...]
    bandwidth_gbs: float
    tflops: dict[Computed, float]
    remarks: str

    @property
    def short(self) -> str:
        """Its name as an option takes it: rx-9070-xt."""
        words = self.name.lower().split()
        return "-".join(words[1:] if words[0] in ("radeon", "instinct") else words)


class Cards(Settings):
    """All of them, and what of a card's memory is taken to be in use already."""

    reserve_gb: float
    reserve_why: str
    cards: tuple[Card, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Where graphs are to run. card: None on the processor. most_bytes: the range's upper end."""

    target: str
    card: Card | None
    n_bytes: int
    most_bytes: int
    reserve_bytes: int

    @property
    def name(self) -> str:
        return "this machine" if self.card is None else self.card.name

    @property
    def usable_bytes(self) -> int:
        """What is left for graphs, at the lower end."""
        return self.n_bytes - self.reserve_bytes


@cache
def cards() -> Cards:
    """The file's content; read once."""
    return load(Cards, _FILE)


def find_room(target: str, vram: str | None = None) -> Room:
    """The memory of a target: a gfx name (the first card of the file), a card's short name or cpu.

    vram: such as 16GB; by default the card's own, or this machine's.

    Raises:
        UsageError: no such target, or a size that is none; those known are named.
    """
    known = cards()
    given = None if vram is None else memory_bytes(vram)
    if target == CPU:
        own = given or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Room(target=CPU, card=None, n_bytes=own, most_bytes=own, reserve_bytes=0)
    found = [one for one in known.cards if target.lower() in (one.gfx, one.short)]
    if not found:
        names = sorted({CPU, *(one.gfx for one in known.cards), *(c.short for c in known.cards)})
        meant = did_you_mean(target, names)
        raise UsageError(f"--target {target!r}: unknown{meant}; known: {', '.join(names)}")
    sizes = [int(gb * GIB) for gb in found[0].memory_gb] if given is None else [given]
    return Room(
        target=found[0].gfx,
        card=found[0],
        n_bytes=min(sizes),
        most_bytes=max(sizes),
        reserve_bytes=int(known.reserve_gb * GIB),
    )


def memory_bytes(text: str) -> int:
    """Bytes of 16GB, 16GiB, 16 (GB all of them, 2^30 bytes) or 800MB.

    Raises:
        UsageError: it is no size, or none at all.
    """
    match = _SIZE.fullmatch(text.strip())
    number = float(match[1] or match[3]) if match else 0.0
    if match is None or not 0 < number < 1e6:
        raise UsageError(f"--vram {text!r}: give a size such as 16GB or 800MB")
    return int(number * (1 << 20 if (match[2] or "G").upper() == "M" else GIB))
