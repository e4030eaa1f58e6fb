"""8-bit activations: a linear's input is rounded too, so that integers are multiplied by integers.

    int8-token   one step per token, found while the model runs; MatMulInteger
    int8-tensor  one step per layer, found in calibration; QuantizeLinear and DequantizeLinear

Both take the payload of an int8-channel weight as it is: codes int8 O I, scales float16 O. To add
one: a class here and a line in ACTIVATIONS.

x86 processors without VNNI add pairs of uint8 x int8 products in 16 bit, which saturates: there
ONNX Runtime needs the session option x64quantprecision = 1 (exact, and half as fast as VNNI).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Protocol

import onnx_ir as ir
import torch
from torch import Tensor

from hbxt_compress.graph.builder import GraphBuilder, Value

__all__ = ["ACTIVATIONS", "ActivationFormat", "Int8Tensor", "Int8Token"]

_LARGEST = 127
_MIDDLE = 128  # the zero point where codes are stored as uint8
_UNIT = 1 / _LARGEST
# No token counts as smaller than this: zeros must not divide by zero, not even where a compiler
# turns the graph into float16, whose smallest normal number it is.
_FLOOR = 2.0**-14
_NOTHING: Final[Mapping[str, Tensor]] = MappingProxyType({})


class ActivationFormat(Protocol):
    """A way to store a linear's input while the model runs. Stateless; its name is its key."""

    @property
    def name(self) -> str: ...

    @property
    def calibrated(self) -> bool:
        """Whether `payload` needs the largest absolute inputs that calibration saw."""

    def payload(self, absmax_I: Tensor | None = None) -> Mapping[str, Tensor]:
        """What it adds to the payload of an int8-channel weight."""

    def apply(self, x: Tensor, payload: Mapping[str, Tensor] = _NOTHING) -> Tensor:
        """x, features last, as the graph rounds it: float32 of the same shape."""

    def extra_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a layer's initializers beyond those of int8-channel alone; may be negative.

        A dozen scalars that all layers of a graph share are not counted.
        """

    def emit(
        self, graph: GraphBuilder, name: str, x: Value, payload: Mapping[str, Tensor]
    ) -> Value:
        """Adds the nodes of Q(x) @ W^T and their initializers; returns the product (no bias)."""


class Int8Token:
    """Name int8-token: codes -127..127, step = the token's largest absolute value / 127.

    The zero point 128 makes uint8 of them, which is what fast kernels take: int8 x int8 is twenty
    times slower on x86. Layers that read one input get equal nodes for it, which the
    common-subexpression pass merges.
    """

    name = "int8-token"
    calibrated = False

    def payload(self, absmax_I: Tensor | None = None) -> Mapping[str, Tensor]:
        """Nothing: the step is found while the model runs."""
        return {}

    def apply(self, x: Tensor, payload: Mapping[str, Tensor] = _NOTHING) -> Tensor:
        """Each token as a multiple of its own step; float32, the very steps of the graph."""
        x = x.float()
        step = x.abs().amax(-1, keepdim=True).clamp_min(_FLOOR) * torch.tensor(_UNIT)
        return (x / step).round() * step

    def extra_bytes(self, shape: tuple[int, ...]) -> int:
        """Minus the zero points of int8-channel, one for each output: here they share a scalar."""
        return -shape[0]

    def emit(
        self, graph: GraphBuilder, name: str, x: Value, payload: Mapping[str, Tensor]
    ) -> Value:
        """Adds MatMulInteger of uint8 codes and the weight's, and what turns it into float32.

        A token's step is split into the largest of all tokens and the token's share of it: ONNX
        Runtime fuses a product `step * scales` into its kernel, but reads only one step from it.
        """
        n_out, n_in = payload["codes"].shape
        shape = _checked(graph, name, x, n_in)
        out_shape, token_shape = (*shape[:-1], n_out), (*shape[:-1], 1)
        middle = _constant(graph, x, "uint8.middle", torch.tensor(_MIDDLE, dtype=torch.uint8))
        last = _constant(graph, x, "axes.last", torch.tensor([-1]))
        every = _constant(graph, x, f"axes.{len(shape)}", torch.arange(len(shape)))
        floor = _constant(graph, x, "activation.floor", torch.tensor(_FLOOR))
        unit = _constant(graph, x, "activation.unit", torch.tensor(_UNIT))
        one = _constant(graph, x, "activation.one", torch.tensor(1.0))

        size = graph.node("Abs", [x], shape=shape)
        largest = graph.node("ReduceMax", [size, last], shape=token_shape, keepdims=1)
        largest = graph.node("Max", [largest, floor], shape=token_shape)
        step = graph.node("Mul", [largest, unit], shape=token_shape)
        steps = graph.node("Div", [x, step], shape=shape)
        codes = graph.node(
            "QuantizeLinear", [steps, one, middle], shape=shape, dtype=ir.DataType.UINT8
        )
        top = graph.node("ReduceMax", [step, every], shape=(), keepdims=0)
        share = graph.node("Div", [step, top], shape=token_shape)

        weight = graph.initializer(f"{name}.codes", payload["codes"].T)
        scales = graph.float32(f"{name}.scales", payload["scales"])
        total = graph.node(
            "MatMulInteger", [codes, weight, middle], shape=out_shape, dtype=ir.DataType.INT32
        )
        total = graph.node("Cast", [total], shape=out_shape, to=int(ir.DataType.FLOAT))
        scales = graph.node("Mul", [top, scales], shape=(n_out,))
        total = graph.node("Mul", [total, scales], shape=out_shape)
        return graph.node("Mul", [total, share], shape=out_shape)


class Int8Tensor:
    """Name int8-tensor: codes -128..127, step = the payload's "input_step", a float32 scalar.

    The input is divided by its range before and the product multiplied by it after: so all layers
    share one constant step, and values stay small if a compiler turns the graph into float16.
    """

    name = "int8-tensor"
    calibrated = True

    def payload(self, absmax_I: Tensor | None = None) -> Mapping[str, Tensor]:
        """input_step: the largest absolute input / 127.

        Raises:
            ValueError: no absmax_I, or not all of it is finite.
        """
        if absmax_I is None or not bool(torch.isfinite(absmax_I).all()):
            raise ValueError(f"{self.name} needs finite absolute maxima of the input: calibrate")
        return {"input_step": (absmax_I.max().float().clamp_min(_FLOOR) * _UNIT).float()}

    def apply(self, x: Tensor, payload: Mapping[str, Tensor] = _NOTHING) -> Tensor:
        """x as multiples of the step, clipped at its ends; float32."""
        into, back = self._factors(payload)
        unit = torch.tensor(_UNIT)
        codes = (x.float() * into / unit).round().clamp(-_LARGEST - 1, _LARGEST)
        return codes * unit * back

    def extra_bytes(self, shape: tuple[int, ...]) -> int:
        """Two float32 scalars."""
        return 8

    def emit(
        self, graph: GraphBuilder, name: str, x: Value, payload: Mapping[str, Tensor]
    ) -> Value:
        """Adds a QuantizeLinear and DequantizeLinear of both sides, and MatMul.

        The Mul behind it is also what keeps ONNX Runtime from fusing the bias into a Gemm, for
        which it has no integer kernel with a float32 output.
        """
        n_out, n_in = payload["codes"].shape
        shape = _checked(graph, name, x, n_in)
        out_shape = (*shape[:-1], n_out)
        zero = _constant(graph, x, f"{x.name}.zero", torch.tensor(0, dtype=torch.int8))
        unit = _constant(graph, x, "activation.unit", torch.tensor(_UNIT))
        into, back = (
            _constant(graph, x, f"activation.times.{factor.item():.9g}", factor)
            for factor in self._factors(payload)
        )
        small = graph.node("Mul", [x, into], shape=shape)
        codes = graph.node(
            "QuantizeLinear", [small, unit, zero], shape=shape, dtype=ir.DataType.INT8
        )
        rounded = graph.node("DequantizeLinear", [codes, unit, zero], shape=shape)
        codes = graph.initializer(f"{name}.codes", payload["codes"].T)
        scales = graph.float32(f"{name}.scales", payload["scales"])
        zeros = graph.initializer(f"{name}.zeros", torch.zeros(n_out, dtype=torch.int8))
        weight = graph.node("DequantizeLinear", [codes, scales, zeros], shape=(n_in, n_out), axis=1)
        product = graph.node("MatMul", [rounded, weight], shape=out_shape)
        return graph.node("Mul", [product, back], shape=out_shape)

    @staticmethod
    def _factors(payload: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """float32 scalars: one over the range, and the range, 127 steps."""
        step = payload["input_step"].double()
        if step.numel() != 1 or not 0 < float(step) < math.inf:
            raise ValueError(f"input_step must be one positive number, not {step.tolist()}")
        span = step.reshape(()) * _LARGEST
        return (1 / span).float(), span.float()


_ALL: Final[tuple[ActivationFormat, ...]] = (Int8Token(), Int8Tensor())
ACTIVATIONS: Final[Mapping[str, ActivationFormat]] = {a.name: a for a in _ALL}


def _checked(graph: GraphBuilder, name: str, x: Value, n_in: int) -> tuple[int, ...]:
    """The shape of x, whose last axis must be the weight's input features."""
    shape = graph.shape_of(x)
    if not shape or shape[-1] != n_in:
        raise ValueError(f"{name}: input of shape {shape} for a weight of {n_in} input features")
    return shape


def _constant(graph: GraphBuilder, x: Value, name: str, tensor: Tensor) -> Value:
    """The initializer of this name in x's graph, added if it is new; its content never differs."""
    known = None if x.graph is None else x.graph.initializers.get(name)
    return graph.initializer(name, tensor) if known is None else known
