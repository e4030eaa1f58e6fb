"""A number format with any group, depth and branch, so that oracles can be small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class FreeFormat:
    """Payload: levels float32 O I, scales float16 O G, and zeros, down, up where there are any."""

    group: int | None = None
    n_levels: tuple[int, int] = (8, 7)
    asymmetric: bool = False
    rank: int = 0
    name: str = "free"

    def store(
        self,
        levels_OI: Tensor,
        scales_OG: Tensor,
        zeros_OG: Tensor | None = None,
        low_rank: tuple[Tensor, Tensor] | None = None,
    ) -> Mapping[str, Tensor]:
        assert bool((levels_OI == levels_OI.round()).all())
        assert -self.n_levels[0] <= int(levels_OI.min())
        assert int(levels_OI.max()) <= self.n_levels[1]
        half = scales_OG.to(torch.float16)
        assert torch.equal(half.float(), scales_OG.float()), "scales are not float16"
        assert (zeros_OG is not None) == self.asymmetric
        assert (low_rank is not None) == bool(self.rank)
        payload = {"levels": levels_OI.float(), "scales": half}
        if zeros_OG is not None:
            payload["zeros"] = zeros_OG
        if low_rank is not None:
            assert low_rank[0].dtype == low_rank[1].dtype == torch.float16
            payload |= {"down": low_rank[0], "up": low_rank[1]}
        return payload

    def decode(self, payload: Mapping[str, Tensor]) -> Tensor:
        size = self.group or payload["levels"].shape[1]
        levels_OI = payload["levels"].float()
        if "zeros" in payload:
            levels_OI = levels_OI - payload["zeros"].float().repeat_interleave(size, dim=1)
        weight_OI = levels_OI * payload["scales"].float().repeat_interleave(size, dim=1)
        if "up" in payload:
            weight_OI = weight_OI + payload["up"].float() @ payload["down"].float()
        return weight_OI

    def encode(self, weight_OI: Tensor, scales_OG: Tensor, zeros_OG: Any = None) -> Any:
        raise NotImplementedError("oracles store levels")

    emit = bytes = fits = encode
