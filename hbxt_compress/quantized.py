"""Quantized weights: codes, scales and how much was lost; one safetensors file per block.

Codes below 16 take half a byte there: a matrix of bytes all below 16 is stored two columns a byte.

A QuantizedModel holds only what compression changed. Weights that stay in 16 bit are read from the
source again at export.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hbxt_compress.layers import LayerName

__all__ = ["Loss", "QuantizedModel", "QuantizedWeight", "halves", "outline", "save_block"]

_MATRIX = 2  # axes, or more


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What rounding one weight costs. Errors are relative, E||W x - Q y||^2 / E||W x||^2, 0..inf.

    error: on the calibration rows the rounder learned from. held_out: on rows of other prompts.
    g1_db: what error feedback can gain on these inputs. g2_db: what it leaves on the table.
    limit_db: how far the error is above the rate-distortion limit at the bits really stored.
    None: nobody measured it, because no algorithm of the recipe needed those statistics.
    """

    error: float
    held_out: float | None = None
    g1_db: float | None = None
    g2_db: float | None = None
    limit_db: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """One weight in a number format.

    payload: what the format stores (int4: codes uint8 O I in 0..15, scales float16 O G), and, where
    the input is rewritten first, what algorithms/transform.py adds. bias_O: the float32 bias that
    goes with it, or None if the layer keeps its own. notes: what the algorithm chose.
    """

    format: str
    payload: Mapping[str, Tensor]
    shape: tuple[int, ...]
    loss: Loss
    bias_O: Tensor | None = None
    notes: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedModel:
    """All quantized weights of a model by layer name, and other parameters that were changed.

    floats: float32 replacements by `<component>/<parameter name>`.
    """

    weights: Mapping[LayerName, QuantizedWeight]
    floats: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, *paths: Path) -> QuantizedModel:
        """Reads block files: those named, and all of a folder that is named."""
        opened = cls.open(*paths)
        weights = {
            name: replace(weight, payload=dict(weight.payload))
            for name, weight in opened.weights.items()
        }
        return cls(weights=weights, floats=opened.floats)

    @classmethod
    def open(cls, *paths: Path) -> QuantizedModel:
        """The same, but a payload's tensors are read each time that one is asked for.

        Biases and floats, a thousandth of a model, are read at once.
        """
        weights: dict[LayerName, QuantizedWeight] = {}
        floats: dict[str, Tensor] = {}
        files = [f for p in paths for f in (sorted(p.glob("*.safetensors")) if p.is_dir() else [p])]
        for path in files:
            with safe_open(path, framework="pt") as file:
                described = json.loads(file.metadata()["layers"])
                for name, about in described.items():
                    keys = set(about["payload"])
                    bias_O = file.get_tensor(f"{name}:bias").clone() if "bias" in keys else None
                    weights[LayerName(name)] = QuantizedWeight(
                        format=about["format"],
                        payload=_Payload(
                            path, name, tuple(sorted(keys - {"bias"})), tuple(about["halved"])
                        ),
                        shape=tuple(about["shape"]),
                        loss=Loss(**about["loss"]),
                        bias_O=bias_O,
                        notes=about["notes"],
                    )
                for key in file.keys():  # noqa: SIM118 - the open file is no mapping
                    if key.startswith("float:"):
                        floats[key.removeprefix("float:")] = file.get_tensor(key).clone()
        return cls(weights=weights, floats=floats)


class _Payload(Mapping[str, Tensor]):
    """The payload of one weight in a block file; nothing of it stays in memory."""

    def __init__(
        self, path: Path, layer: str, keys: tuple[str, ...], halved: tuple[str, ...]
    ) -> None:
        self._path, self._layer, self._keys, self._halved = path, layer, keys, halved

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        with safe_open(self._path, framework="pt") as file:
            if key not in self._halved:
                tensor: Tensor = file.get_tensor(f"{self._layer}:{key}")
                return tensor
            return _unpacked(file.get_tensor(f"{self._layer}:{key}"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def halves(self, key: str) -> Tensor | None:
        """A matrix as it lies in the file, two columns a byte; None if it does not lie so."""
        if key not in self._halved:
            return None
        with safe_open(self._path, framework="pt") as file:
            packed: Tensor = file.get_tensor(f"{self._layer}:{key}")
            return packed

    def outline(self) -> dict[str, Tensor]:
        """As the function of that name, from the file's header."""
        found = {}
        with safe_open(self._path, framework="pt") as file:
            for key in self._keys:
                lies = file.get_slice(f"{self._layer}:{key}")
                shape = lies.get_shape()
                if len(shape) < _MATRIX:
                    found[key] = self[key].clone()
                    continue
                shape[-1] *= 1 + (key in self._halved)
                found[key] = torch.empty(shape, dtype=lies[:0].dtype, device="meta")
        return found


def outline(payload: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The payload with every matrix on the meta device; those in a block file are not read."""
    if isinstance(payload, _Payload):
        return payload.outline()
    return {k: t.clone() if t.ndim < _MATRIX else t.to("meta") for k, t in payload.items()}


def halves(payload: Mapping[str, Tensor], key: str) -> Tensor:
    """uint8 O I/2 of a matrix of codes below 16: two columns a byte, the first in the low bits.

    That is how they lie in a block file: they are not unpacked first.
    """
    packed = payload.halves(key) if isinstance(payload, _Payload) else None
    if packed is not None:
        return packed
    codes_OI = payload[key]
    return codes_OI[:, ::2] if codes_OI.is_meta else _packed(codes_OI)


def save_block(
    path: Path,
    weights: Mapping[LayerName, QuantizedWeight],
    floats: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the weights of one block; the same weights give the same bytes."""
    tensors = {f"float:{name}": tensor for name, tensor in (floats or {}).items()}
    described: dict[str, object] = {}
    for name in sorted(weights):
        weight = weights[name]
        payload = dict(weight.payload)
        if weight.bias_O is not None:
            payload["bias"] = weight.bias_O
        halved = [key for key, tensor in sorted(payload.items()) if _halves(tensor)]
        payload |= {key: _packed(payload[key]) for key in halved}
        tensors |= {f"{name}:{key}": tensor for key, tensor in payload.items()}
        described[name] = {
            "format": weight.format,
            "shape": list(weight.shape),
            "loss": asdict(weight.loss),
            "payload": sorted(payload),
            "halved": halved,
            "notes": dict(weight.notes),
        }
    tensors = _apart({key: tensors[key].contiguous() for key in sorted(tensors)})
    save_file(tensors, path, metadata={"layers": json.dumps(described, sort_keys=True)})


def _halves(tensor: Tensor) -> bool:
    """Whether two columns fit in a byte."""
    paired = tensor.dtype == torch.uint8 and tensor.ndim == 2 and tensor.numel() > 0
    return paired and tensor.shape[1] % 2 == 0 and int(tensor.max()) < 16


def _packed(codes_OI: Tensor) -> Tensor:
    """uint8 O I/2, the first of two columns in the low four bits."""
    pairs = codes_OI.contiguous().view(torch.int16)
    return (pairs | (pairs >> 4)).to(torch.uint8)


def _unpacked(packed: Tensor) -> Tensor:
    """uint8 O I."""
    pairs = packed.to(torch.int16)
    return ((pairs & 15) | ((pairs & 0xF0) << 4)).view(torch.uint8)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each with memory of its own, as the file format wants it; layers may share an input scale."""
    owned: set[int] = set()
    apart = {}
    for key, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[key] = tensor.clone() if memory in owned else tensor
        owned.add(memory)
    return apart
