"""export_component: a component's graphs and weights, written to its folder and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hbxt_compress.errors import ExportError, listing
from hbxt_compress.formats import WeightFormat
from hbxt_compress.graph.capture import ComponentGraphs, Read, capture
from hbxt_compress.graph.external import write_models
from hbxt_compress.graph.obeyed import check_component
from hbxt_compress.graph.passes import lower
from hbxt_compress.graph.storage import Precision, ReadRows, Storage
from hbxt_compress.layers import LayerName

__all__ = ["export_component"]


def export_component(
    folder: Path,
    component: ComponentGraphs,
    weights: Mapping[LayerName, tuple[WeightFormat, Mapping[str, Tensor]]],
    *,
    precision: Precision,
    half: bool = False,
    ranges: Mapping[str, float] | None = None,
    activations: Mapping[LayerName, str] | None = None,
    facts: Mapping[str, str] | None = None,
    read: Read | None = None,
    read_rows: ReadRows | None = None,
) -> None:
    """Writes config.json, the graphs and model.onnx.data; the same inputs give the same bytes.

    A layer that `weights` does not name is stored in `precision`; an empty payload means the
    module's own weight in that format. half: compute products and attention in float16;
    ranges: largest numbers of its layers, see graph/half.py. activations: what a layer's input is
    stored as, if it is rounded. Biases, norms and tables stay float32. read: gives a parameter by
    its name, for modules without values; each is asked for when it is written, and let go of before
    the next. read_rows: gives rows start..stop of one that is looked up, so that a table need never
    be whole.

    Raises:
        ExportError: A weight overflows float16, a planned layer is not in the graph, or a graph
            breaks a rule of the target.
    """
    storage = Storage(component.component, weights, precision, activations or {}, read_rows)
    models = {}
    for name, spec in component.graphs.items():
        models[name] = capture(spec, read)
        lower(models[name], storage, half=half, ranges=ranges or {})
        models[name].metadata_props.update({"component": component.component, **(facts or {})})
    storage.require_all_used()
    write_models(folder, models)
    config = json.dumps(component.config, indent=2, sort_keys=True, default=str)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    if problems := check_component(folder):
        raise ExportError(
            f"{component.component}: the graphs break {len(problems)} rules of the target\n"
            + listing([str(problem) for problem in problems])
        )
