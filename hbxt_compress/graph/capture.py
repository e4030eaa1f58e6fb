"""GraphSpec: a module to export and the names, shapes and dtypes of its graph's ends.

`capture` traces it with torch.onnx into an onnx_ir model whose shapes are all static. Dummy inputs
come from an optimum generator, so that optimum's own generators can serve other families.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from optimum.utils import DummyInputGenerator
from torch import Tensor, nn

from hbxt_compress.errors import ExportError

__all__ = ["OPSET", "ComponentGraphs", "DummyInputs", "GraphSpec", "TensorSpec", "capture"]

OPSET = 18


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Shape and dtype of a graph input; integers are drawn from 0..below-1."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    below: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSpec:
    """One graph: a module whose positional inputs and outputs bear these names, in order.

    Initializers are named as the parameters of the module's child `model`. reference computes the
    outputs (or the first few) from the inputs with the untouched model, for graph/parity.py.
    """

    module: nn.Module
    inputs: Mapping[str, TensorSpec]
    outputs: Sequence[str]
    reference: Callable[..., Sequence[Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentGraphs:
    """A component's graphs by file name, and its config.json.

    component is what its layers' names begin with.
    """

    component: str
    graphs: Mapping[str, GraphSpec]
    config: Mapping[str, object] = field(default_factory=dict)


class DummyInputs(DummyInputGenerator):  # type: ignore[misc]  # optimum has no types
    """Random inputs of a GraphSpec, drawn from a generator of their own."""

    def __init__(self, inputs: Mapping[str, TensorSpec], seed: int = 0) -> None:
        self.SUPPORTED_INPUT_NAMES = tuple(inputs)
        self._inputs = inputs
        self._generator = torch.Generator().manual_seed(seed)

    def generate(
        self,
        input_name: str,
        framework: str = "pt",
        int_dtype: str = "int64",
        float_dtype: str = "fp32",
    ) -> Tensor:
        """A tensor for one input: integers 0..below-1, floats from a standard normal."""
        spec = self._inputs[input_name]
        if spec.dtype.is_floating_point:
            return torch.randn(spec.shape, generator=self._generator, dtype=spec.dtype)
        return torch.randint(spec.below, spec.shape, generator=self._generator, dtype=spec.dtype)

    def all(self) -> dict[str, Tensor]:
        """Every input by name."""
        return {name: self.generate(name) for name in self._inputs}


@torch.no_grad()
def capture(spec: GraphSpec) -> ir.Model:
    """The traced model: float32, opset 18, with hbxt::Linear nodes still in it."""
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch's exporter warns about its own deprecated calls; nothing a user could act on.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                spec.module.eval(),
                tuple(DummyInputs(spec.inputs).all().values()),
                input_names=list(spec.inputs),
                output_names=list(spec.outputs),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    finally:
        exporter_log.setLevel(level)
    if program is None:
        raise ExportError("torch.onnx.export returned no program")
    return program.model
