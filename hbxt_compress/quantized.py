"""Quantized weights: codes, scales and how much was lost; one safetensors file per block.

A QuantizedModel holds only what a format changed. Weights that stay in 16 bit are read from the
source again at export.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hbxt_compress.layers import LayerName

__all__ = ["QuantizedModel", "QuantizedWeight", "save_block"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """One weight in a number format.

    payload: what the format stores (int4: codes uint8 O I in 0..15, scales float16 O G).
    error: ||(W - Q) x||^2 / ||W x||^2 over calibration inputs taken as uncorrelated, in 0..inf.
    """

    format: str
    payload: Mapping[str, Tensor]
    shape: tuple[int, ...]
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedModel:
    """All quantized weights of a model, by layer name."""

    weights: Mapping[LayerName, QuantizedWeight]

    @classmethod
    def load(cls, folder: Path) -> QuantizedModel:
        """Reads every block file of a quantize result."""
        weights: dict[LayerName, QuantizedWeight] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                described = json.loads(file.metadata()["layers"])
                for name, about in described.items():
                    payload = {key: file.get_tensor(f"{name}:{key}") for key in about["payload"]}
                    weights[LayerName(name)] = QuantizedWeight(
                        format=about["format"],
                        payload=payload,
                        shape=tuple(about["shape"]),
                        error=about["error"],
                    )
        return cls(weights=weights)


def save_block(path: Path, weights: Mapping[LayerName, QuantizedWeight]) -> None:
    """Writes the weights of one block; the same weights give the same bytes."""
    tensors: dict[str, Tensor] = {}
    described: dict[str, object] = {}
    for name in sorted(weights):
        weight = weights[name]
        for key, tensor in weight.payload.items():
            tensors[f"{name}:{key}"] = tensor.contiguous()
        described[name] = {
            "format": weight.format,
            "shape": list(weight.shape),
            "error": weight.error,
            "payload": sorted(weight.payload),
        }
    save_file(tensors, path, metadata={"layers": json.dumps(described, sort_keys=True)})
