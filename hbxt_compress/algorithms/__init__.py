"""Rounders turn a weight into the codes of a format. To add one: a file here and a line below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final, Protocol

from torch import Tensor

from hbxt_compress.algorithms.rtn import Rtn
from hbxt_compress.formats import WeightFormat
from hbxt_compress.quantized import QuantizedWeight
from hbxt_compress.stats import LayerStats, Need
from hbxt_compress.strict import one_of

__all__ = ["ROUNDERS", "AnyRounder", "Rounder"]


class Rounder(Protocol):
    """A rounding algorithm; its fields are its parameters in a recipe."""

    VERSION: ClassVar[int]  # bump when results change
    NEEDS: ClassVar[frozenset[Need]]  # statistics that calibration must gather

    def round(self, weight_OI: Tensor, stats: LayerStats, fmt: WeightFormat) -> QuantizedWeight:
        """The weight in a format, with its measured error. weight_OI: float32."""


ROUNDERS: Final[Mapping[str, type[Rounder]]] = {"rtn": Rtn}
AnyRounder = one_of(ROUNDERS)
