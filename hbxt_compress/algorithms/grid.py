"""Grid: the values that each weight may take, before any of them is chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hbxt_compress.formats.levels import nearest, value

__all__ = ["Grid"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """w = (level - zero) * scale; levels are whole, in [-below, above]; groups along the inputs.

    scales_OG: float32 that float16 holds exactly, not 0, negative ones allowed where zeros_OG is
    None. zeros_OG: float32, whole, in the levels' range; None: 0. group: inputs that share a scale.
    """

    scales_OG: Tensor
    zeros_OG: Tensor | None
    group: int
    below: int
    above: int

    def levels(self, weight_OI: Tensor) -> Tensor:
        """The nearest levels, float32."""
        return nearest(weight_OI, self.scales_OG, self.zeros_OG, (self.below, self.above))

    def value(self, levels_OI: Tensor) -> Tensor:
        """The float32 weight that levels stand for."""
        return value(levels_OI, self.scales_OG, self.zeros_OG)

    def rows(self, index_O: Tensor) -> Grid:
        """The same for some rows of the weight."""
        zeros_OG = self.zeros_OG
        return replace(
            self,
            scales_OG=self.scales_OG[index_O],
            zeros_OG=None if zeros_OG is None else zeros_OG[index_O],
        )

    def columns(self, index_I: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros of some input columns, O and as many columns as the index names.

        For rounders that go by columns.
        """
        group_I = torch.div(index_I, self.group, rounding_mode="floor")
        zeros_OG = self.zeros_OG
        return self.scales_OG[:, group_I], None if zeros_OG is None else zeros_OG[:, group_I]
