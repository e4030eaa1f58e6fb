"""GraphSpec: a module to export and the names, shapes and dtypes of its graph's ends.

`capture` traces it with torch.onnx into an onnx_ir model whose shapes are all static, without
looking at weights: those are read when somebody asks for an initializer's content. Dummy inputs
come from an optimum generator, so that optimum's own generators can serve other families.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from optimum.utils import DummyInputGenerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from hbxt_compress.errors import ExportError
from hbxt_compress.graph.alike import BlocksDiffer
from hbxt_compress.graph.builder import constant, content_of
from hbxt_compress.graph.repeat import Blocks, n_traced

__all__ = [
    "OPSET",
    "ComponentGraphs",
    "DummyInputs",
    "GraphSpec",
    "Read",
    "TensorSpec",
    "capture",
    "without_values",
]

OPSET = 18
Read = Callable[[str], Tensor]
log = logging.getLogger(__name__)
_WRAPPED = "model."
_SMALL = 1 << 16  # numbers


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

    blocks: path below `model` of a ModuleList whose members are called in turn, each on what the
    one before gave, whatever their number: of many that are alike only three are traced.
    """

    module: nn.Module
    inputs: Mapping[str, TensorSpec]
    outputs: Sequence[str]
    reference: Callable[..., Sequence[Tensor]]
    blocks: str | None = None


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


@contextmanager
def without_values(module: nn.Module) -> Iterator[None]:
    """Meanwhile the module's parameters have shapes and dtypes but no values, and need none.

    So have tensors that are made meanwhile. Buffers keep their values.
    """
    owned = [(part, dict(part._parameters)) for part in module.modules()]
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = {
            id(one): nn.Parameter(torch.empty(one.shape, dtype=one.dtype), requires_grad=False)
            for _, parameters in owned
            for one in parameters.values()
            if one is not None
        }
        try:
            for part, parameters in owned:
                part._parameters.update({n: fakes.get(id(one)) for n, one in parameters.items()})
            yield
        finally:
            for part, parameters in owned:
                part._parameters.update(parameters)


@torch.no_grad()
def capture(spec: GraphSpec, read: Read | None = None) -> ir.Model:
    """The traced model: float32, opset 18, with hbxt::Linear nodes still in it.

    read: gives a parameter by its name; by default the module's own are taken.

    Raises:
        ExportError: tracing made a constant that is neither a parameter nor a buffer.
    """
    module = spec.module.eval()
    path = f"{_WRAPPED}{spec.blocks}"
    n_blocks = 0 if spec.blocks is None else len([*module.get_submodule(path).children()])
    if n_traced(n_blocks) < n_blocks:
        try:
            return _traced(spec, module, read, Blocks(module, path))
        except BlocksDiffer as why:  # no error: the graph is the same, it only takes longer to get
            log.info("export: all blocks are traced: %s", why)
    return _traced(spec, module, read, None)


def _traced(
    spec: GraphSpec, module: nn.Module, read: Read | None, blocks: Blocks | None
) -> ir.Model:
    own = dict(module.named_parameters(remove_duplicate=False))
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            blocks.cut() if blocks else nullcontext(),
            without_values(module),
        ):
            # torch's exporter warns about its own deprecated calls; nothing a user could act on.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                tuple(torch.empty(one.shape, dtype=one.dtype) for one in spec.inputs.values()),
                input_names=list(spec.inputs),
                output_names=list(spec.outputs),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                optimize=False,  # it folds constants, so it must wait for their content
            )
        if program is None:
            raise ExportError("torch.onnx.export returned no program")
        if blocks is not None:
            blocks.learn_names(program.model.graph)
        _read_later(program.model, own, read, blocks)
        program.optimize()
    finally:
        exporter_log.setLevel(level)
    if blocks is not None:
        buffers = dict(module.named_buffers())

        def content(name: str) -> ir.TensorProtocol:
            if name in own:
                return _later(name, own[name], read)
            return constant(name, buffers[name])

        blocks.grow(program.model, content)
    return program.model


def _read_later(
    model: ir.Model, own: Mapping[str, Tensor], read: Read | None, blocks: Blocks | None
) -> None:
    """Gives content to the initializers that were traced without: to small ones at once.

    Those are what constants are folded with, again and again; not those of repeated blocks.
    """
    for name, value in model.graph.initializers.items():
        traced = content_of(value)
        if not isinstance(traced.raw, FakeTensor):
            continue
        if name not in own:
            raise ExportError(
                f"{name}: made while tracing, so it has no value; make it a buffer of its module"
            )
        later = _later(name, own[name], read)
        if blocks is not None and blocks.holds(name):
            value.const_value = blocks.unread.tensor(later)
        else:
            value.const_value = later.raw() if later.size <= _SMALL else later


def _later(name: str, own: Tensor, read: Read | None) -> ir.LazyTensor:
    dtype, shape = from_torch_dtype(own.dtype), ir.Shape(own.shape)
    return ir.LazyTensor(partial(_parameter, name, own, read), dtype, shape, name=name)


def _parameter(name: str, own: Tensor, read: Read | None) -> ir.Tensor:
    tensor = own if read is None else read(name.removeprefix(_WRAPPED))
    if tensor.is_meta or tensor.shape != own.shape:
        raise ExportError(
            f"{name}: should have shape {list(own.shape)}, but there is "
            + ("no value for it" if tensor.is_meta else f"one of shape {list(tensor.shape)}")
        )
    return constant(name, tensor)
