"""Number formats for weights: grid, encoding, packing, ONNX nodes and bytes, one file each.

To add one: write a file here and a line in FORMATS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

from torch import Tensor

from hbxt_compress.formats.int4 import Int4
from hbxt_compress.formats.int8 import Int8
from hbxt_compress.formats.plain import Plain
from hbxt_compress.formats.table import Table
from hbxt_compress.graph.builder import GraphBuilder, Value
from hbxt_compress.layers import LayerSpec

__all__ = ["FORMATS", "WeightFormat"]


class WeightFormat(Protocol):
    """A way to store one weight. Stateless; its name is its key in FORMATS."""

    @property
    def name(self) -> str: ...

    @property
    def group(self) -> int | None:
        """Input features that share a scale; None: a whole row."""

    @property
    def n_levels(self) -> tuple[int, int]:
        """Levels below and above 0; (0, 0): no levels."""

    @property
    def asymmetric(self) -> bool:
        """Whether each group stores a level that stands for 0."""

    @property
    def rank(self) -> int:
        """Rank of a 16-bit branch that is added to the weight; 0: none."""

    def fits(self, spec: LayerSpec) -> str | None:
        """Why the weight cannot take this format and what to do, or None if it can."""

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes of the weight's initializers in the artifact (bias not counted)."""

    def encode(
        self, weight_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """The payload of nearest levels under given scales and zeros; a branch is zero."""

    def store(
        self,
        levels_OI: Tensor,
        scales_OG: Tensor,
        zeros_OG: Tensor | None = None,
        *,
        low_rank: tuple[Tensor, Tensor] | None = None,
    ) -> Mapping[str, Tensor]:
        """The payload of given levels, scales, zeros and factors (down R I, up O R).

        w = (level - zero) * scale + up @ down; levels and zeros whole, in [-below, above].
        """

    def decode(self, payload: Mapping[str, Tensor]) -> Tensor:
        """The float32 weight that a payload stands for, O I."""

    def emit(
        self, graph: GraphBuilder, name: str, x: Value, payload: Mapping[str, Tensor]
    ) -> Value:
        """Adds the nodes of x @ W^T and their initializers; returns the product (no bias)."""

    def weight(
        self, graph: GraphBuilder, name: str, payload: Mapping[str, Tensor], shape: tuple[int, ...]
    ) -> Value:
        """Adds the nodes of the float32 weight in its original shape, for a Conv or a Gather."""

    def rows(
        self, graph: GraphBuilder, name: str, ids: Value, payload: Mapping[str, Tensor]
    ) -> Value:
        """Adds the nodes of the float32 rows that ids select, for a Gather; ... I.

        Each matrix among the initializers has the table's rows along its first axis and depends,
        row by row, on the payload's: a large table is written some rows at a time.
        """


_ALL: Final[tuple[WeightFormat, ...]] = (
    Plain(bits=32),
    Plain(bits=16),
    Int8(),
    *(
        Int4(group=group, asymmetric=asymmetric, rank=rank)
        for rank in (0, 16, 32)
        for asymmetric in (False, True)
        for group in (128, 64, 32)
    ),
    Table(bits=8),
    *(Table(bits=4, group=group) for group in (128, 64, 32)),
)
FORMATS: Final[Mapping[str, WeightFormat]] = {f.name: f for f in _ALL}
