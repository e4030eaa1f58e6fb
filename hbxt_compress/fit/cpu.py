"""Memory that ONNX Runtime's CPU provider takes for one graph: what a process has at its peak.

Weights lie packed in memory of their own; a table that rows are looked up in stays in its mapped
file. Some operators need more inside than they give. Most have no kernel for float16: they take and
give float32, and the Casts around them are left out. All that holds for sessions as
runtime/session.py opens them, where a value goes when nothing reads it any more. Working sets were
measured one by one; the sum is compared with real runs by tests/bench/fit.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from hbxt_compress.fit.constants import NO_HALF_KERNEL, kept_on_cpu
from hbxt_compress.fit.liveness import VIEWS, liveness, nbytes, shape_of
from hbxt_compress.fit.order import run_order
from hbxt_compress.fit.roofline import scores_bytes

__all__ = ["BASE_BYTES", "OnCpu", "on_cpu", "working_set"]

BASE_BYTES: Final = 90_000_000
"""of the process: the interpreter, its libraries and those parts of ONNX Runtime that run"""
_HALF: Final = ir.DataType.FLOAT16
_FULL: Final = 4  # bytes of a float32


@dataclass(frozen=True, slots=True, kw_only=True)
class OnCpu:
    """weight_bytes: as they are kept. value_bytes: of values and working sets, ends included.

    loading_bytes: what opening the graph takes, before anything runs: results of all that is
    computed beforehand lie there until the last of them, and each weight once more while it is
    packed.
    """

    weight_bytes: int
    value_bytes: int
    loading_bytes: int
    working_bytes: int
    at: str

    @property
    def n_bytes(self) -> int:
        """The peak, without the process."""
        return max(self.weight_bytes + self.value_bytes, self.loading_bytes)


def on_cpu(model: ir.Model) -> OnCpu:
    """What one graph takes."""
    kept = kept_on_cpu(model)
    found = liveness(
        model,
        constants=kept.constants,
        order=run_order(model.graph),
        working=working_set,
        size=_size,
        is_view=_is_view,
    )
    weights = {v: n for v, n in kept.sizes.items() if not _only_looked_up(v)}
    total = sum(weights.values())
    return OnCpu(
        weight_bytes=total,
        value_bytes=found.peak_bytes,
        loading_bytes=max(kept.computed_bytes, total + _largest(weights)),
        working_bytes=found.working_bytes,
        at=found.at,
    )


def working_set(node: ir.Node) -> int:
    """Bytes that an operator needs inside, beside its inputs and outputs."""
    return _WORKING.get(node.op_type, lambda _: 0)(node)


def _size(value: ir.Value) -> int:
    """Bytes of a value: what an operator without a float16 kernel gives is float32."""
    maker = value.producer()
    wide = value.dtype == _HALF and maker is not None and maker.op_type in NO_HALF_KERNEL
    return nbytes(value) * (2 if wide else 1)


def _is_view(node: ir.Node) -> bool:
    """A Reshape and its like, or a Cast to or from float16 that is left out."""
    if node.op_type != "Cast":
        return node.op_type in VIEWS
    given, made = node.inputs[0], node.outputs[0]
    maker = None if given is None else given.producer()
    if given is not None and given.dtype == _HALF:
        return maker is not None and maker.op_type in NO_HALF_KERNEL
    users = [user.op_type for user, _ in made.uses()]
    return made.dtype == _HALF and bool(users) and NO_HALF_KERNEL.issuperset(users)


def _attention(node: ir.Node) -> int:
    """Queries, keys and values head by head; with a bias scores of every query by every key."""
    transposed = _FULL * sum(math.prod(shape_of(one)) for one in node.inputs[:3])
    biased = len(node.inputs) > 3
    return transposed + (scores_bytes(node) if biased else 0)


def _gelu(node: ir.Node) -> int:
    """A bias that no product takes with it is added in memory of its own."""
    maker = node.inputs[0].producer() if node.inputs[0] is not None else None
    alone = maker is not None and _adds_bias(maker) and not _is_gemm(maker.inputs[0])
    return nbytes(node.outputs[0]) if alone or len(node.inputs) > 1 else 0


def _adds_bias(node: ir.Node) -> bool:
    bias = node.inputs[-1]
    return node.op_type == "Add" and bias is not None and bias.is_initializer()


def _is_gemm(value: ir.Value | None) -> bool:
    """Whether a product with a float32 weight is computed along with the bias behind it."""
    maker = None if value is None else value.producer()
    if value is None or maker is None or maker.op_type != "MatMul" or value.dtype == _HALF:
        return False
    weight, users = maker.inputs[1], [user for user, _ in value.uses()]
    source = None if weight is None else weight.producer()
    stored = weight is not None and weight.is_initializer()
    stored = stored or (source is not None and source.op_type == "Cast")
    return stored and len(users) == 1 and _adds_bias(users[0])


def _product(node: ir.Node) -> int:
    """An 8-bit weight is unpacked to float32 as a whole."""
    maker = node.inputs[1].producer() if node.inputs[1] is not None else None
    eight = maker is not None and maker.op_type == "DequantizeLinear"
    return _FULL * math.prod(shape_of(node.inputs[1])) if eight else 0


def _convolution(node: ir.Node) -> int:
    """Over two axes: input and output once more, channels in blocks of what a register holds."""
    if len(shape_of(node.inputs[1])) != 4:
        return 0
    return _FULL * sum(math.prod(shape_of(one)) for one in (node.inputs[0], node.outputs[0]))


def _unpacked(node: ir.Node) -> int:
    """Of float16 numbers that are multiplied with 4-bit weights a float32 copy."""
    given = node.inputs[0]
    return 2 * nbytes(given) if given is not None and given.dtype == _HALF else 0


_WORKING: Final[dict[str, Callable[[ir.Node], int]]] = {
    "Conv": _convolution,
    "FastGelu": _gelu,
    "MatMul": _product,
    "MatMulNBits": _unpacked,
    "MultiHeadAttention": _attention,
}


def _only_looked_up(value: ir.Value) -> bool:
    users = [user.op_type for user, _ in value.uses()]
    return bool(users) and all(user == "Gather" for user in users)


def _largest(weights: Mapping[ir.Value, int]) -> int:
    return max(weights.values(), default=0)
