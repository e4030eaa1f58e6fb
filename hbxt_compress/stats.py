"""CalibrationStats: what the inputs of each layer looked like while the real model ran.

Sums are kept, not averages, in float64 and shifted by nothing: partial results of different prompts
merge by addition, in any order, to 1e-9.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hbxt_compress.layers import LayerName

__all__ = ["CalibrationStats", "LayerStats", "Need"]

Need = Literal["moments", "covariance"]


@dataclass(slots=True, kw_only=True)
class LayerStats:
    """Sums over N input rows x_I of one layer (I input features), float64.

    n: rows seen. total_I: sum of x. squares_I: sum of x^2. absmax_I: max |x|. products_II: sum of
    x x^T, or None where no algorithm asked for it.
    """

    n: int
    total_I: Tensor
    squares_I: Tensor
    absmax_I: Tensor
    products_II: Tensor | None = None

    @classmethod
    def empty(cls, n_inputs: int, needs: frozenset[Need]) -> Self:
        zeros = torch.zeros(n_inputs, dtype=torch.float64)
        products = (
            torch.zeros(n_inputs, n_inputs, dtype=torch.float64) if "covariance" in needs else None
        )
        return cls(
            n=0,
            total_I=zeros,
            squares_I=zeros.clone(),
            absmax_I=zeros.clone(),
            products_II=products,
        )

    def add(self, x_NI: Tensor, weight: float = 1.0) -> None:
        """Adds input rows (any leading shape), each counted `weight` times; absmax ignores it."""
        rows = x_NI.detach().reshape(-1, x_NI.shape[-1]).to(torch.float64)
        self.n += rows.shape[0]
        self.total_I += weight * rows.sum(0)
        self.squares_I += weight * rows.square().sum(0)
        self.absmax_I = torch.maximum(self.absmax_I, rows.abs().amax(0))
        if self.products_II is not None:
            self.products_II += weight * (rows.T @ rows)

    def merge(self, other: Self) -> None:
        self.n += other.n
        self.total_I += other.total_I
        self.squares_I += other.squares_I
        self.absmax_I = torch.maximum(self.absmax_I, other.absmax_I)
        if self.products_II is not None and other.products_II is not None:
            self.products_II += other.products_II

    @property
    def mean_square_I(self) -> Tensor:
        """E[x^2], the diagonal of the second moment, float64 I."""
        return self.squares_I / max(1, self.n)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationStats:
    """Statistics by layer."""

    layers: Mapping[LayerName, LayerStats]

    def save(self, path: Path) -> None:
        """Writes one safetensors file."""
        tensors: dict[str, Tensor] = {}
        for name, stats in self.layers.items():
            tensors[f"{name}:n"] = torch.tensor([stats.n], dtype=torch.int64)
            tensors[f"{name}:total"] = stats.total_I
            tensors[f"{name}:squares"] = stats.squares_I
            tensors[f"{name}:absmax"] = stats.absmax_I
            if stats.products_II is not None:
                tensors[f"{name}:products"] = stats.products_II
        save_file({key: tensors[key].contiguous() for key in sorted(tensors)}, path)

    @classmethod
    def load(cls, paths: Iterable[Path]) -> Self:
        """Reads and merges the files of several prompts."""
        merged: dict[LayerName, LayerStats] = {}
        for path in paths:
            tensors = load_file(path)
            for key in [key for key in tensors if key.endswith(":n")]:
                name = LayerName(key.removesuffix(":n"))
                one = LayerStats(
                    n=int(tensors[key]),
                    total_I=tensors[f"{name}:total"],
                    squares_I=tensors[f"{name}:squares"],
                    absmax_I=tensors[f"{name}:absmax"],
                    products_II=tensors.get(f"{name}:products"),
                )
                if name in merged:
                    merged[name].merge(one)
                else:
                    merged[name] = one
        return cls(layers=merged)
