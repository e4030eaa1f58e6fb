"""Rounded: what a rounding algorithm returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Rounded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """A weight in a format.

    payload: what the format's `decode` and `emit` take. shift_O: float32, to be added to the
    layer's bias, or None. target_OI: what was rounded, if that was not the weight itself. notes:
    what the algorithm chose or met, for plan and report.
    """

    payload: Mapping[str, Tensor]
    shift_O: Tensor | None = None
    target_OI: Tensor | None = None
    notes: Mapping[str, float | str] = field(default_factory=dict)
