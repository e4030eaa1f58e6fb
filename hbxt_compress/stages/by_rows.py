"""Rounding by rows: a weight whose rounder asks for no inputs, some rows at a time.

So a weight larger than memory can be rounded, and one that is not stays near the core.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hbxt_compress.errors import CalibrationError
from hbxt_compress.formats import FORMATS
from hbxt_compress.plan import LayerPlan
from hbxt_compress.quantized import Loss, QuantizedWeight

__all__ = ["round_by_rows"]

_NUMBERS_AT_ONCE = 1 << 21  # 8 MiB in float32, and a few copies


def round_by_rows(read: Callable[[int], Iterable[Tensor]], layer: LayerPlan) -> QuantizedWeight:
    """One weight in its format; its payload is all of it that is in memory.

    read: gives all rows in order, at most so many at once, O I (or more axes) of any float dtype.

    Raises:
        CalibrationError: the rounder refuses it.
    """
    fmt, how, shape = FORMATS[layer.weights], layer.how, layer.spec.shape
    assert how is not None  # the plan refuses quantized formats without a rounder
    n_rows, n_in = shape[0], max(1, layer.spec.n_weights // shape[0])
    # A low-rank branch is the whole weight's
    n_at_once = n_rows if fmt.rank else max(1, _NUMBERS_AT_ONCE // n_in)
    payload: dict[str, Tensor] = {}
    lost, kept, start = 0.0, 0.0, 0
    for given in read(n_at_once):
        rows_OI = given.flatten(1).float()
        try:
            part = how.round(rows_OI, None, fmt).payload
        except ValueError as error:
            raise CalibrationError(f"{layer.spec.name} {list(shape)}: {error}") from None
        for key, rows in part.items():
            if len(rows_OI) == n_rows:
                payload[key] = rows
                continue
            whole = payload.setdefault(key, rows.new_empty(n_rows, *rows.shape[1:]))
            whole[start : start + len(rows_OI)] = rows
        lost += _energy(fmt.decode(part) - rows_OI)
        kept += _energy(rows_OI)
        start += len(rows_OI)
    share = lost / kept if kept else math.inf if lost else 0.0
    return QuantizedWeight(format=fmt.name, payload=payload, shape=shape, loss=Loss(error=share))


def _energy(rows_OI: Tensor) -> float:
    return float(torch.linalg.vector_norm(rows_OI, dtype=torch.float64)) ** 2
