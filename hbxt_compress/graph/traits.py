"""Traits of a node that the tables of runtimes speak of, by name.

Each is a question about a node and what surrounds it, answered from shapes, types and attributes;
of weights nothing is read. To add one: a function here and a line in TRAITS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

__all__ = [
    "TRAITS",
    "Seen",
    "blocked",
    "codes_of_other_shape",
    "dynamic_shape",
    "for_integers",
    "grouped",
    "has_functions",
    "in_subgraph",
    "keys_in_other_order",
    "more_than_four_axes",
    "no_zero_point",
    "odd_four_bits",
    "of_weight",
    "one_block",
    "scale_at_run_time",
    "scales_of_other_type",
    "scores_in_full",
    "signed_by_signed",
    "volumetric",
    "weight_only",
    "zero_points_not_flat",
    "zero_points_not_packed",
]

_KEYS = ("location", "offset", "length")
_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})
_PASSED_ON = frozenset({"Cast", "Identity", "Reshape", "Transpose"})
_NOT_FOLDED = frozenset({"DequantizeLinear", "If", "Loop", "QuantizeLinear", "Scan"})
_INTEGER_PRODUCTS = frozenset({"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"})
_LARGE_SCORES = 1 << 24  # numbers, 4096 queries by 4096 keys of one head
_FOUR_BITS = frozenset({ir.DataType.INT4, ir.DataType.UINT4})


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A node and the model around it; node None: the model itself.

    keys: of each external tensor the keys of its entry, as they stand in the file.
    """

    node: ir.Node | None
    model: ir.Model
    keys: Mapping[str, tuple[str, ...]]

    def input(self, index: int) -> ir.Value | None:
        if self.node is None or index >= len(self.node.inputs):
            return None
        return self.node.inputs[index]

    def constant(self, index: int) -> bool:
        """Whether an input is an initializer or computed from such alone."""
        return _is_constant(self.input(index))

    def number(self, name: str, default: int = 0) -> int:
        """An attribute that is a whole number."""
        found = None if self.node is None else self.node.attributes.get(name)
        whole = found is not None and found.type == ir.AttributeType.INT
        return found.as_int() if found is not None and whole else default

    def values(self) -> Iterator[ir.Value]:
        """Inputs and outputs that are there."""
        if self.node is not None:
            yield from (one for one in self.node.inputs if one is not None)
            yield from (one for one in self.node.outputs if one.name)


def _is_constant(value: ir.Value | None, depth: int = 16) -> bool:
    """An initializer, or what loaders fold: a value made of initializers and static shapes."""
    if value is None:
        return False
    producer = value.producer()
    if producer is None or value.const_value is not None:
        return value.const_value is not None
    if producer.op_type == "Shape":
        return _shape(producer.inputs[0]) is not None
    inputs = [one for one in producer.inputs if one is not None]
    return (
        depth > 0
        and producer.op_type not in _NOT_FOLDED
        and all(_is_constant(one, depth - 1) for one in inputs)
    )


def _shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """None where it is not known or not static."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(value.shape.numpy())


def dynamic_shape(seen: Seen) -> bool:
    """A shape around the node is not known before it runs."""
    return any(_shape(value) is None for value in seen.values())


def has_functions(seen: Seen) -> bool:
    """The model defines functions of its own."""
    return bool(seen.model.functions)


def in_subgraph(seen: Seen) -> bool:
    """The node stands in a branch or a loop's body."""
    node = seen.node
    return node is not None and node.graph is not None and node.graph is not seen.model.graph


def codes_of_other_shape(seen: Seen) -> bool:
    """MatMulNBits: codes are not N, K / block, block * bits / 8, or blocks do not divide K."""
    bits, block, k, n = (seen.number(name) for name in ("bits", "block_size", "K", "N"))
    if block < 16 or block & (block - 1) or k % block:
        return True
    codes = _shape(seen.input(1))
    return codes is not None and codes != (n, k // block, block * bits // 8)


def zero_points_not_flat(seen: Seen) -> bool:
    """MatMulNBits: packed zero points have more axes than one, or another length."""
    zeros = seen.input(3)
    if zeros is None or zeros.dtype != ir.DataType.UINT8:
        return False
    bits, block, k, n = (seen.number(name) for name in ("bits", "block_size", "K", "N"))
    n_bytes = n * math.ceil(k / max(block, 1) * bits / 8)
    shape = _shape(zeros)
    return shape is not None and shape != (n_bytes,)


def zero_points_not_packed(seen: Seen) -> bool:
    """MatMulNBits: zero points are there, of another type than UINT8."""
    zeros = seen.input(3)
    return zeros is not None and zeros.dtype != ir.DataType.UINT8


def scales_of_other_type(seen: Seen) -> bool:
    """MatMulNBits: scales are of another type than the activations."""
    x, scales = seen.input(0), seen.input(2)
    return x is not None and scales is not None and x.dtype != scales.dtype


def odd_four_bits(seen: Seen) -> bool:
    """A 4-bit initializer has an odd last dimension."""
    inputs = () if seen.node is None else seen.node.inputs
    for value in inputs:
        if value is not None and value.dtype in _FOUR_BITS and _is_constant(value):
            shape = _shape(value)
            if shape and shape[-1] % 2:
                return True
    return False


def blocked(seen: Seen) -> bool:
    """The scale of a DequantizeLinear or QuantizeLinear has a value for each block."""
    return seen.number("block_size") > 0


def one_block(seen: Seen) -> bool:
    """A blocked scale has one block along its axis, or another rank than what it scales."""
    if not blocked(seen):
        return False
    x, scale = _shape(seen.input(0)), _shape(seen.input(1))
    if x is None or scale is None or len(x) != len(scale):
        return True
    return scale[seen.number("axis", 1)] < 2


def no_zero_point(seen: Seen) -> bool:
    """A DequantizeLinear or QuantizeLinear goes without."""
    return seen.node is not None and seen.input(2) is None


def of_weight(seen: Seen) -> bool:
    """A DequantizeLinear reads an initializer."""
    return seen.constant(0)


def scale_at_run_time(seen: Seen) -> bool:
    """A scale or zero point is computed."""
    return any(seen.input(i) is not None and not seen.constant(i) for i in (1, 2))


def for_integers(seen: Seen) -> bool:
    """What the node gives is multiplied as integers by an operator that says so."""
    node = seen.node
    return node is not None and any(
        user.op_type in _INTEGER_PRODUCTS for out in node.outputs for user, _ in out.uses()
    )


def weight_only(seen: Seen) -> bool:
    """A DequantizeLinear of a weight that something multiplies with a value that is no integer.

    Then nothing multiplies integers, and a compiler that folds constants stores floats again.
    """
    if seen.node is None or not seen.constant(0):
        return False
    products = list(_products(seen.node.outputs[0]))
    return not products or not all(_quantized_otherwise(node, value) for node, value in products)


def _products(value: ir.Value, depth: int = 0) -> Iterator[tuple[ir.Node, ir.Value]]:
    for node, _ in value.uses():
        if node.op_type in _PRODUCTS:
            yield node, value
        elif node.op_type in _PASSED_ON and depth < 8:
            yield from _products(node.outputs[0], depth + 1)


def _quantized_otherwise(node: ir.Node, weight: ir.Value) -> bool:
    """Whether the other factor comes from a DequantizeLinear of int8 with constant scale."""
    for other in node.inputs[:2]:
        if other is None or other is weight:
            continue
        source = other.producer()
        if source is None or source.op_type != "DequantizeLinear" or not source.inputs:
            return False
        codes = source.inputs[0]
        signed = codes is not None and codes.dtype == ir.DataType.INT8
        return signed and all(_is_constant(one) for one in source.inputs[1:])
    return False


def signed_by_signed(seen: Seen) -> bool:
    """MatMulInteger: both factors are INT8."""
    return all(
        one is not None and one.dtype == ir.DataType.INT8 for one in (seen.input(0), seen.input(1))
    )


def scores_in_full(seen: Seen) -> bool:
    """A Softmax over scores of every query by every key, more than a processor's caches hold."""
    shape = _shape(seen.input(0))
    return shape is not None and len(shape) > 2 and shape[-1] * shape[-2] >= _LARGE_SCORES


def volumetric(seen: Seen) -> bool:
    """A convolution over three axes or more."""
    shape = _shape(seen.input(1))
    return shape is not None and len(shape) > 4


def more_than_four_axes(seen: Seen) -> bool:
    """An input or output has more than four axes."""
    return any(value.shape is not None and len(value.shape) > 4 for value in seen.values())


def grouped(seen: Seen) -> bool:
    """A convolution in groups."""
    return seen.number("group", 1) > 1


def keys_in_other_order(seen: Seen) -> bool:
    """An external tensor's entry is not location, offset, length, in this order."""
    inputs = () if seen.node is None else seen.node.inputs
    return any(
        value is not None and seen.keys.get(value.name or "", _KEYS) != _KEYS for value in inputs
    )


TRAITS: Final[Mapping[str, Callable[[Seen], bool]]] = {
    trait.__name__: trait
    for trait in (
        blocked, codes_of_other_shape, dynamic_shape, for_integers, grouped, has_functions,
        in_subgraph, keys_in_other_order, more_than_four_axes, no_zero_point, odd_four_bits,
        of_weight, one_block, scale_at_run_time, scales_of_other_type, scores_in_full,
        signed_by_signed, volumetric, weight_only, zero_points_not_flat, zero_points_not_packed,
    )
}  # fmt: skip
