"""Tables: embeddings, which are looked up. Rounded ones are used by rows, never whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hbxt_compress.formats import FORMATS
from hbxt_compress.layers import LayerName
from hbxt_compress.quantized import QuantizedWeight

__all__ = ["TABLES", "use_tables"]

TABLES = "{}.tables.safetensors"


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
