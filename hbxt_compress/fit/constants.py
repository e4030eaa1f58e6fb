"""What a runtime keeps of a graph's weights: not always the bytes that the file has.

Loaders compute what depends on weights alone before the first run, and keep the result instead: a
float16 weight that is cast to float32 takes 4 bytes then, an 8-bit one that is only dequantized as
many as a float. Rules for MIGraphX: graph/runtimes/migraphx.yaml, by the same traits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from hbxt_compress.fit.liveness import nbytes
from hbxt_compress.graph.traits import TRAITS, Seen

__all__ = ["NO_HALF_KERNEL", "Kept", "kept_on_cpu", "kept_on_gpu", "stored_bytes"]

NO_HALF_KERNEL = frozenset({"Conv", "Gemm", "MatMul", "MultiHeadAttention"})
"""operators that ONNX Runtime's CPU provider computes in float32 whatever the graph says"""
_FOUR_BITS = frozenset({ir.DataType.INT4, ir.DataType.UINT4})
Fate = Callable[[ir.Node], str]  # of a node of constants: folded, fused (into its user) or run


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """constants: values that need no computing while the graph runs. sizes: those that stay.

    computed_bytes: of all that is computed beforehand, what stays and what was on the way to it.
    """

    constants: frozenset[ir.Value]
    sizes: Mapping[ir.Value, int]
    computed_bytes: int

    @property
    def n_bytes(self) -> int:
        return sum(self.sizes.values())


def stored_bytes(model: ir.Model) -> int:
    """Bytes of the initializers as the file has them."""
    return sum(nbytes(one) for one in model.graph.initializers.values())


def kept_on_gpu(model: ir.Model) -> Kept:
    """As MIGraphX does: all is folded but 4-bit codes, and 8-bit ones that integers multiply."""

    def fate(node: ir.Node) -> str:
        if node.op_type != "DequantizeLinear":
            return "folded"
        codes = node.inputs[0]
        if codes is not None and codes.dtype in _FOUR_BITS:
            return "fused"
        alone = TRAITS["weight_only"](Seen(node=node, model=model, keys={}))
        return "folded" if alone else "fused"

    return _kept(model, fate)


def kept_on_cpu(model: ir.Model) -> Kept:
    """As ONNX Runtime does: 8-bit codes stay before a MatMul, which takes them as they are.

    Before anything else DequantizeLinear runs each time.
    """

    def fate(node: ir.Node) -> str:
        if node.op_type not in ("DequantizeLinear", "QuantizeLinear"):
            return "folded"
        users = {user.op_type for user, _ in node.outputs[0].uses()}
        return "fused" if users == {"MatMul"} else "run"

    kept = _kept(model, fate)
    sizes = {value: n * (2 if _is_widened(value) else 1) for value, n in kept.sizes.items()}
    return replace(kept, sizes=sizes)


def _is_widened(weight: ir.Value) -> bool:
    """Whether it is float16 and something multiplies it that knows only float32."""
    users = {user.op_type for user, _ in weight.uses()}
    return weight.dtype == ir.DataType.FLOAT16 and bool(users & NO_HALF_KERNEL)


def _kept(model: ir.Model, fate: Fate) -> Kept:
    graph = model.graph
    constants = set(graph.initializers.values())
    fused: dict[ir.Value, ir.Node] = {}
    sizes: dict[ir.Value, int] = {}

    def keep(value: ir.Value) -> None:
        if value in fused:
            for one in fused[value].inputs:
                if one is not None:
                    keep(one)
        else:
            sizes[value] = nbytes(value)

    for node in graph:
        inputs = [one for one in node.inputs if one is not None]
        if inputs and all(one in constants for one in inputs):
            how = fate(node)
            if how != "run":
                constants.update(node.outputs)
                if how == "fused":
                    fused[node.outputs[0]] = node
                continue
        for one in inputs:
            if one in constants:
                keep(one)
    for one in graph.outputs:
        if one in constants:
            keep(one)
    computed = sum(
        nbytes(one) for node in graph for one in node.outputs if one in constants - fused.keys()
    )
    return Kept(constants=frozenset(constants), sizes=sizes, computed_bytes=computed)
