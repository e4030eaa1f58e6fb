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
        """Codes below and above zero; (0, 0): no codes."""

    def fits(self, spec: LayerSpec) -> str | None:
        """Why the weight cannot take this format and what to do, or None if it can."""

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes of the weight's initializers in the artifact (bias not counted)."""

    def encode(self, weight_OI: Tensor, scales: Tensor) -> Mapping[str, Tensor]:
        """The payload of nearest codes under given scales."""

    def decode(self, payload: Mapping[str, Tensor]) -> Tensor:
        """The float32 weight that a payload stands for, O I."""

    def emit(
        self, graph: GraphBuilder, name: str, x: Value, payload: Mapping[str, Tensor]
    ) -> Value:
        """Adds the nodes of x @ W^T and their initializers; returns the product (no bias)."""


_ALL: Final[tuple[WeightFormat, ...]] = (
    Plain(bits=32),
    Plain(bits=16),
    Int8(),
    Int4(group=128),
    Int4(group=64),
    Int4(group=32),
)
FORMATS: Final[Mapping[str, WeightFormat]] = {f.name: f for f in _ALL}
