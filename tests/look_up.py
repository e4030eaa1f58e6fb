"""A component that only looks rows up in a table, from checkpoint to files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hbxt_compress.algorithms.rtn import Rtn
from hbxt_compress.formats import FORMATS
from hbxt_compress.graph.capture import ComponentGraphs, GraphSpec, TensorSpec
from hbxt_compress.graph.export import export_component
from hbxt_compress.layers import LayerName, LayerSpec
from hbxt_compress.plan import LayerPlan
from hbxt_compress.quantized import QuantizedModel
from hbxt_compress.stages.by_rows import round_blindly
from hbxt_compress.weights import Weights

TABLE = LayerName("net/table")


class _LookUp(nn.Module):
    """Rows of a table, twice if asked."""

    def __init__(self, n_rows: int, n_features: int, *, twice: bool = False) -> None:
        super().__init__()
        self.model = nn.Module()
        with torch.device("meta"):
            self.model.table = nn.Embedding(n_rows, n_features).requires_grad_(False)
        self.twice = twice

    def forward(self, ids: Tensor) -> Tensor:
        found = self.model.table(ids)
        return found + self.model.table(ids + 1) if self.twice else found


def look_up_graphs(n_rows: int, n_features: int, *, twice: bool = False) -> ComponentGraphs:
    """A component `net` that looks up seven rows."""
    spec = GraphSpec(
        module=_LookUp(n_rows, n_features, twice=twice),
        inputs={"x": TensorSpec(shape=(1, 7), dtype=torch.int64, below=n_rows)},
        outputs=["y"],
        reference=lambda ids: (ids,),
    )
    return ComponentGraphs(component="net", graphs={"model.onnx": spec})


def write_table(folder: Path, n_rows: int, n_features: int) -> None:
    """table.weight in bfloat16, every row another."""
    folder.mkdir()
    noise = torch.randn(n_features + 126, generator=torch.Generator().manual_seed(0))
    table = noise.unfold(0, n_features, 1)[torch.arange(n_rows) % 127]
    table *= torch.linspace(1, 2, n_rows)[:, None]
    save_file({"table.weight": table.bfloat16()}, folder / "t.safetensors")


def round_table(folder: Path, fmt: str, how: Rtn) -> QuantizedModel:
    """The table of a folder as the quantize stage rounds it."""

    stored = Weights(folder)
    shape = stored.shape("table.weight")
    spec = LayerSpec(name=TABLE, kind="embedding", shape=shape, dtype="BF16", block=None)
    layer = LayerPlan(spec=spec, weights=fmt, activations="keep", how=how, rule=0, reason="test")
    path = folder / f"{fmt}.block"
    round_blindly(stored, [layer], path)
    return QuantizedModel.open(path)


def export_table(folder: Path, fmt: str, rounded: QuantizedModel | None) -> Path:
    """The folder of the exported component."""
    stored = Weights(folder)
    payload = {} if rounded is None else rounded.weights[TABLE].payload
    out = folder / f"out-{fmt}"
    export_component(
        out,
        look_up_graphs(*stored.shape("table.weight")),
        {TABLE: (FORMATS[fmt], payload)},
        precision=16,
        read=stored.tensor,
        read_rows=stored.rows,
    )
    return out
