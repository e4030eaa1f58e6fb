"""Rounding by rows: weights whose rounder asks for no inputs, some rows at a time.

So a table larger than memory can be rounded, and smaller weights stay near the core meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from hbxt_compress.algorithms.threads import each_alone
from hbxt_compress.errors import CalibrationError
from hbxt_compress.formats import FORMATS
from hbxt_compress.formats.activations import ACTIVATIONS
from hbxt_compress.plan import LayerPlan
from hbxt_compress.quantized import Loss, QuantizedWeight, save_block
from hbxt_compress.stats import LayerInputs
from hbxt_compress.weights import Weights

__all__ = ["NUMBERS_AT_ONCE", "activation_payload", "round_blindly"]

_CPU: Final = torch.device("cpu")
NUMBERS_AT_ONCE = 1 << 19  # what a core keeps near it of a few copies, 2 MiB each


def round_blindly(
    weights: Weights, layers: Sequence[LayerPlan], path: Path, device: torch.device = _CPU
) -> None:
    """Writes the rounded weights of some layers of a component, as `save_block` does.

    device: where they are rounded.

    Raises:
        SourceError: a weight holds NaN or infinity.
        CalibrationError: a rounder refuses one.
    """
    largest_first = sorted(layers, key=lambda layer: -layer.spec.n_weights)
    # One layer a core: while one is computed, another is read
    rounded = each_alone(lambda layer: _rounded(weights, layer, device), largest_first)
    names = (layer.spec.name for layer in largest_first)
    save_block(path, dict(zip(names, rounded, strict=True)))


def activation_payload(layer: LayerPlan, inputs: LayerInputs | None) -> Mapping[str, Tensor]:
    """What a rounded input adds to a layer's payload."""
    if layer.activations == "keep":
        return {}
    absmax_I = None if inputs is None else inputs.everything().absmax_I
    return ACTIVATIONS[layer.activations].payload(absmax_I)


def _rounded(weights: Weights, layer: LayerPlan, device: torch.device) -> QuantizedWeight:
    """One weight in its format; its payload is all of it that is in memory."""
    fmt, how, shape = FORMATS[layer.weights], layer.how, layer.spec.shape
    assert how is not None  # the plan refuses quantized formats without a rounder
    n_rows, n_in = shape[0], layer.spec.n_weights // shape[0]
    # A low-rank branch is the whole weight's
    n_at_once = n_rows if fmt.rank else min(n_rows, max(1, NUMBERS_AT_ONCE // n_in))
    payload: dict[str, Tensor] = {}
    lost = kept = 0.0
    for start in range(0, n_rows, n_at_once):
        rows_OI = weights.rows(layer.spec.parameter, start, start + n_at_once)
        rows_OI = rows_OI.flatten(1).to(device)
        try:
            rounded = how.round(rows_OI, None, fmt).payload
        except ValueError as error:
            raise CalibrationError(f"{layer.spec.name} {list(shape)}: {error}") from None
        for key, part in rounded.items():
            if n_at_once == n_rows:
                payload[key] = part.cpu()
                continue
            shape_of_all = n_rows, *part.shape[1:]
            whole = payload.setdefault(key, torch.empty(shape_of_all, dtype=part.dtype))
            whole[start : start + n_at_once] = part
        lost += _energy(fmt.decode(rounded) - rows_OI)
        kept += _energy(rows_OI)
    share = lost / kept if kept else math.inf if lost else 0.0
    return QuantizedWeight(
        format=fmt.name,
        payload={**payload, **activation_payload(layer, None)},
        shape=shape,
        loss=Loss(error=share),
    )


def _energy(rows_OI: Tensor) -> float:
    return float(torch.linalg.vector_norm(rows_OI, dtype=torch.float64)) ** 2
