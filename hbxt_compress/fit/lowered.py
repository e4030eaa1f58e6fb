"""A component's graphs as a recipe would export them, without any weight.

Shapes, dtypes and operators are those of the artifact; what a weight holds is never asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import onnx_ir as ir
import torch
from torch import Tensor

from hbxt_compress.algorithms.smooth_quant import SmoothQuant
from hbxt_compress.formats import FORMATS
from hbxt_compress.formats.activations import ACTIVATIONS
from hbxt_compress.geometry import Geometry
from hbxt_compress.graph.capture import GraphSpec, capture
from hbxt_compress.graph.passes import lower
from hbxt_compress.graph.storage import Storage
from hbxt_compress.models import Family, family_of
from hbxt_compress.plan import LayerPlan, Plan, assumed_plan
from hbxt_compress.recipe import Recipe
from hbxt_compress.source import Source

__all__ = ["Lowerer", "outlined"]

_ANY: Final = 0.5  # what small parameters hold: neither 0 nor 1, which an optimizer may take out


@dataclass(slots=True, kw_only=True)
class Lowerer:
    """Makes graphs of a model at any recipe and clip size; a trace serves all recipes."""

    source: Source
    _traced: dict[tuple[str, Geometry], Mapping[str, ir.Model]] = field(default_factory=dict)

    @property
    def family(self) -> Family:
        return family_of(self.source)

    def plan(self, recipe: Recipe) -> Plan:
        """What the recipe does to every weight; a budget's weights in their smallest formats."""
        layers, parameters = self.family.layers(self.source), self.family.parameters(self.source)
        return assumed_plan(recipe, layers, parameters)

    def graphs(self, recipe: Recipe, component: str, clip: Geometry) -> dict[str, ir.Model]:
        """The component's lowered graphs by file name, for clips of that size.

        Raises:
            PlanError: the recipe does not fit the model.
            SourceError: the transformer cannot take such clips.
        """
        self.family.tokens(self.source, clip)
        own, planned = {}, self.plan(recipe)
        layers = [layer for layer in planned.layers if layer.spec.component == component]
        smooth = any(isinstance(one, SmoothQuant) for one in recipe.prepare)
        for name, model in self._captured(component, clip).items():
            own[name] = _copied(model)
            storage = Storage(
                component,
                {
                    layer.spec.name: (FORMATS[layer.weights], outlined(layer, smooth=smooth))
                    for layer in layers
                },
                planned.precision,
                {x.spec.name: x.activations for x in layers if x.activations != "keep"},
            )
            lower(own[name], storage, half=component in planned.half)
        return own

    def _captured(self, component: str, clip: Geometry) -> Mapping[str, ir.Model]:
        if component == "text_encoder":  # whatever the clip
            clip = self.family.geometry(self.source)
        elif component == "vae_decoder":  # frame by frame
            clip = Geometry(height=clip.height, width=clip.width, n_frames=1, fps=clip.fps)
        key = component, clip
        if key not in self._traced:
            module = self.family.skeleton(self.source, component)
            graphs = self.family.graphs(self.source, component, module, [clip])
            self._traced[key] = {
                name: capture(spec, _Stand(spec)) for name, spec in graphs.graphs.items()
            }
        return self._traced[key]


def _copied(model: ir.Model) -> ir.Model:
    """A clone, types and all: else a pass that changes one would change the other's, too."""
    own = model.clone()
    made = (value for node in own.graph for value in node.outputs)
    for value in (*made, *own.graph.inputs, *own.graph.initializers.values()):
        if value.dtype is not None:
            value.type = ir.TensorType(value.dtype)
    return own


class _Stand:
    """Stands in for a graph's small parameters, which tracing folds constants with."""

    def __init__(self, spec: GraphSpec) -> None:
        self._module = spec.module

    def __call__(self, name: str) -> Tensor:
        return torch.full(self._module.get_parameter(f"model.{name}").shape, _ANY)


def outlined(layer: LayerPlan, *, smooth: bool = False) -> dict[str, Tensor]:
    """What a layer's payload will be: matrices on the meta device; {} in full precision.

    smooth: its input is multiplied by a scale first.
    """
    return dict(_outlined(layer, smooth)) if layer.quantized else {}


def _outlined(layer: LayerPlan, smooth: bool) -> Iterator[tuple[str, Tensor]]:
    fmt, (n_out, *rest) = FORMATS[layer.weights], layer.spec.shape
    n_in = torch.Size(rest).numel()
    n_groups = n_in // (fmt.group or n_in)
    table, narrow = layer.spec.kind == "embedding", fmt.group is not None
    width = n_in // 2 if table and narrow else n_in
    codes = torch.uint8 if narrow else torch.int8
    yield "codes", torch.empty(n_out, width, dtype=codes, device="meta")
    if narrow or table:
        yield "scales", torch.empty(n_out, n_groups, dtype=torch.float16, device="meta")
    else:  # vectors are read while a graph is lowered
        yield "scales", torch.full((n_out,), _ANY, dtype=torch.float16)
    if fmt.asymmetric:
        yield "zeros", torch.empty(n_out, n_groups, dtype=torch.uint8, device="meta")
    if fmt.rank:
        yield "down", torch.empty(fmt.rank, n_in, dtype=torch.float16, device="meta")
        yield "up", torch.empty(n_out, fmt.rank, dtype=torch.float16, device="meta")
    if smooth and layer.prepared:
        yield "input_scale", torch.full((n_in,), _ANY, dtype=torch.float16)
    if layer.activations != "keep":
        yield from ACTIVATIONS[layer.activations].payload(torch.ones(n_in)).items()
