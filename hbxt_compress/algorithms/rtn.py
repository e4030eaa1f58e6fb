"""Round to nearest, on the grid that a search of the scales finds best."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from hbxt_compress.algorithms.low_rank import branch, split_low_rank
from hbxt_compress.algorithms.rounded import Rounded
from hbxt_compress.algorithms.scales import search_scales
from hbxt_compress.algorithms.transform import channel_power
from hbxt_compress.formats import WeightFormat
from hbxt_compress.stats import LayerInputs, Need
from hbxt_compress.strict import Settings

__all__ = ["Rtn"]


class Rtn(Settings):
    """Round to nearest."""

    VERSION: ClassVar[int] = 6

    search: Literal["none", "mse", "weighted"] = "mse"
    """How scales are chosen: from each group's range alone, by least error of the weights, or by
    least error weighted with what each input feature's errors cost."""
    norm: Annotated[float, Field(ge=2, le=8, multiple_of=0.5)] = 2.0
    """The power of the error that the search minimises; above 2 large weights are cut off less."""

    @model_validator(mode="after")
    def _minimises(self) -> Self:
        if self.search == "none" and self.norm != 2:
            raise ValueError(f"norm {self.norm:g}: without a search no error is minimised")
        return self

    @property
    def need(self) -> Need | None:
        """Statistics that calibration must gather; only `weighted` needs any."""
        return "moments" if self.search == "weighted" else None

    def round(self, weight_OI: Tensor, inputs: LayerInputs | None, fmt: WeightFormat) -> Rounded:
        """The weight in `fmt`; `weighted` also returns the bias shift, if the layer has a bias.

        A low-rank branch, where the format has one, is split off first.

        Raises:
            ValueError: `weighted` without inputs, or what search_scales refuses.
        """
        importance_I, seen = None, None
        if self.need is not None:
            if inputs is None:
                raise ValueError("rtn weighs errors by a layer's inputs: calibrate it first")
            seen = replace(inputs, fit=inputs.everything(), held_out=None)
            importance_I = channel_power(seen)
        low_rank, rest_OI = None, weight_OI.float()
        if fmt.rank:
            low_rank = split_low_rank(weight_OI, importance_I, fmt.rank)
            rest_OI = (weight_OI.double() - branch(low_rank)).float()
        thorough = self.search != "none"
        grid = search_scales(rest_OI, fmt, importance_I, norm=self.norm, thorough=thorough)
        levels_OI = grid.levels(rest_OI)
        payload = fmt.store(levels_OI, grid.scales_OG, grid.zeros_OG, low_rank=low_rank)
        shift_O = None
        if seen is not None and seen.takes_bias:
            given_O = weight_OI.double() @ seen.fit.mean_x_I
            shift_O = (given_O - fmt.decode(payload).double() @ seen.fit.mean_y_I).float()
        return Rounded(payload=payload, shift_O=shift_O)
