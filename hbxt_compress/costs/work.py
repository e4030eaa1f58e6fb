"""Work: what a run has to do, in a few kinds, and how fast a machine does each.

A kind is what some code spends its time on when nothing else can help it: bytes through a disk,
numbers through memory, products, calls. Amounts of a kind add up; seconds follow from rates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

__all__ = ["KINDS", "Kind", "Rates", "Work"]

Kind = Literal[
    "read",  # bytes from the disk
    "write",  # bytes to the disk, flushed
    "hash",  # bytes through sha256
    "move",  # bytes read and written by operations on each number
    "fresh",  # bytes of results so large that the system gives and takes their pages each time
    "call",  # operations of torch: what even an empty one takes
    "float32",  # floating point operations of matrix products
    "convolve",  # those of small 3-D convolutions, float32
    "coarse",  # the same with factors in bfloat16, see stages/side_by_side.py
    "float64",
    "factor32",  # operations of Cholesky factors, and of triangular systems (algorithms/feedback)
    "factor64",
    "search",  # weights whose scales are searched by compiled code (algorithms/scales)
    "search_eager",  # weights searched without compiled code
    "feed_column",  # columns of error feedback (algorithms/feedback), whatever the rows
    "feed_number",  # columns times rows of it, float32; in float64 each counts twice
    "descend_column",  # columns of descent (algorithms/polish)
    "descend_number",
    "second",  # seconds that were measured as such
]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """per_second: what a machine does of each kind in a second. machine: which it is, in words.

    n_cores: that hash files at the same time. is_compiled: whether the compiled code of the scale
    search lies in torch's cache from an earlier run.
    """

    machine: str
    per_second: Mapping[Kind, float]
    n_cores: int
    is_compiled: bool


@dataclass(frozen=True, slots=True)
class Work:
    """Amounts by kind; what is not named is none."""

    amounts: Mapping[Kind, float] = field(default_factory=dict)

    @classmethod
    def of(cls, **amounts: float) -> Work:
        """Work(read=3, hash=3); every name a kind."""
        unknown = sorted(amounts.keys() - set(KINDS))
        if unknown:
            raise ValueError(f"no kinds of work: {', '.join(unknown)}; known: {', '.join(KINDS)}")
        return cls({kind: amounts[kind] for kind in KINDS if kind in amounts})

    def __add__(self, other: Work) -> Work:
        kinds = self.amounts.keys() | other.amounts.keys()
        return Work({k: self.amounts.get(k, 0.0) + other.amounts.get(k, 0.0) for k in kinds})

    def __mul__(self, times: float) -> Work:
        return Work({kind: times * amount for kind, amount in self.amounts.items()})

    def seconds(self, rates: Rates) -> float:
        """How long it takes if nothing runs at the same time."""
        return sum(amount / rates.per_second[kind] for kind, amount in self.amounts.items())
