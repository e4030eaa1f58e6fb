"""Tables: embeddings, which are looked up. They are rounded and used by rows, never whole.

A table's inputs are no features, so its rounder may ask for none; rows are rounded some at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from hbxt_compress.errors import CalibrationError
from hbxt_compress.formats import FORMATS
from hbxt_compress.layers import LayerName
from hbxt_compress.plan import LayerPlan
from hbxt_compress.quantized import Loss, QuantizedWeight, save_block
from hbxt_compress.weights import Weights

__all__ = ["TABLES", "round_tables", "use_tables"]

TABLES = "{}.tables.safetensors"
_NUMBERS_AT_ONCE = 1 << 20  # of a table: 4 MiB in float32, and a few copies


def round_tables(weights: Weights, layers: Sequence[LayerPlan], path: Path) -> None:
    """Writes the rounded tables of a component, as `save_block` does.

    Raises:
        SourceError: a table holds NaN or infinity.
        CalibrationError: a rounder refuses one.
    """
    save_block(path, {layer.spec.name: _rounded(weights, layer) for layer in layers})


def _rounded(weights: Weights, layer: LayerPlan) -> QuantizedWeight:
    """One table in its format; its payload is all of it that is in memory."""
    fmt, how, shape = FORMATS[layer.weights], layer.how, layer.spec.shape
    assert how is not None  # the plan refuses quantized formats without a rounder
    n_at_once = max(1, _NUMBERS_AT_ONCE // shape[1])
    payload: dict[str, Tensor] = {}
    lost = kept = 0.0
    for start in range(0, shape[0], n_at_once):
        rows_OI = weights.rows(layer.spec.parameter, start, start + n_at_once)
        try:
            rounded = how.round(rows_OI, None, fmt).payload
        except ValueError as error:
            raise CalibrationError(f"{layer.spec.name} {list(shape)}: {error}") from None
        for key, part in rounded.items():
            whole = payload.setdefault(key, part.new_empty(shape[0], *part.shape[1:]))
            whole[start : start + n_at_once] = part
        lost += float((fmt.decode(rounded) - rows_OI).double().square().sum())
        kept += float(rows_OI.double().square().sum())
    share = lost / kept if kept else 0.0  # a table of zeros loses nothing
    return QuantizedWeight(format=fmt.name, payload=payload, shape=shape, loss=Loss(error=share))


def use_tables(
    module: nn.Module,
    component: str,
    weights: Mapping[LayerName, QuantizedWeight],
    second_names: Mapping[str, str],
) -> None:
    """Makes a module of the component look up rows of quantized tables instead of its own.

    Of the quantized weights only those of embeddings are used. second_names: as a family's Weights
    have them; a table is replaced under all of its names.
    """
    for name, weight in weights.items():
        path = name.removeprefix(f"{component}/")
        if not isinstance(module.get_submodule(path), nn.Embedding):
            continue
        own = f"{path}.weight"
        for parameter in (own, *(second for second, one in second_names.items() if one == own)):
            device = module.get_parameter(parameter).device
            module.set_submodule(parameter.removesuffix(".weight"), _Rows(weight, device))


class _Rows(nn.Module):
    """An embedding that decodes the rows it is asked for, float32."""

    def __init__(self, table: QuantizedWeight, device: torch.device) -> None:
        super().__init__()
        self._table = table
        # Some model code asks an embedding's weight for its device.
        self.weight = nn.Parameter(torch.empty(0, device=device), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        chosen = ids.flatten().cpu()
        rows = {key: tensor[chosen] for key, tensor in self._table.payload.items()}
        found = FORMATS[self._table.format].decode(rows)
        return found.reshape(*ids.shape, -1).to(ids.device)
