"""emit_transform: the nodes that rewrite a layer's input, in standard operators.

Constants are named after their content and shared. Layers that read one input through one
transform therefore get nodes with the same inputs, which the common-subexpression pass merges.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from hbxt_compress.graph.builder import GraphBuilder, Value

__all__ = ["ROTATION", "emit_transform"]

ROTATION = "hadamard"  # what the names of rotations' matrices begin with


def emit_transform(
    builder: GraphBuilder, name: str, x: Value, payload: Mapping[str, Tensor]
) -> Value:
    """x rewritten as a weight's payload says; x itself if it says nothing.

    First times "input_scale" (float16 I), then each block of "rotation" (integer scalar)
    neighbouring features times the normalised Sylvester-Hadamard matrix of that size.

    Raises:
        ValueError: x has no static shape, or the payload does not fit it; names the layer.
    """
    shape, out = builder.shape_of(x), x
    if (scale := payload.get("input_scale")) is not None:
        if tuple(scale.shape) != shape[-1:]:
            raise ValueError(f"{name}: {tuple(scale.shape)} scales for {shape[-1]} input features")
        factor = _constant(builder, x, "input_scale", scale)
        if scale.dtype != torch.float32:
            to = int(ir.DataType.FLOAT)
            factor = builder.node("Cast", [factor], shape=tuple(scale.shape), to=to)
        out = builder.node("Mul", [out, factor], shape=shape)
    if (rotation := payload.get("rotation")) is not None:
        block = int(rotation)
        if block < 2 or block & (block - 1) or shape[-1] % block:
            raise ValueError(f"{name}: cannot rotate {shape[-1]} features in blocks of {block}")
        rows = (math.prod(shape) // block, block)
        apart = _constant(builder, x, "shape", torch.tensor(rows))
        matrix = _constant(builder, x, ROTATION, _hadamard(block))
        together = _constant(builder, x, "shape", torch.tensor(shape))
        out = builder.node("Reshape", [out, apart], shape=rows)
        out = builder.node("MatMul", [out, matrix], shape=rows)
        out = builder.node("Reshape", [out, together], shape=shape)
    return out


def _constant(builder: GraphBuilder, x: Value, what: str, tensor: Tensor) -> Value:
    """The initializer of x's graph with this content, which may be there already."""
    content = tensor.detach().cpu().contiguous().numpy()
    name = f"{what}.{hashlib.sha256(content.tobytes()).hexdigest()[:16]}"
    known = None if x.graph is None else x.graph.initializers.get(name)
    return builder.initializer(name, tensor) if known is None else known


def _hadamard(size: int) -> Tensor:
    """Entry (i, j) is -1 to the number of ones that i and j share in binary, over sqrt(size)."""
    signs = [[1 - 2 * ((i & j).bit_count() % 2) for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float32) * size**-0.5
