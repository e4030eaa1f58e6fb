"""Convolutions over frames as ones over pixels: not every runtime for AMD's cards has Conv of 3-D.

A kernel of K frames is a sum of K convolutions, each of frames that are the batch. One over K times
the channels would need each frame K times in memory, and is no faster on a processor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from hbxt_compress.formats import WeightFormat
from hbxt_compress.graph.builder import GraphBuilder, Value, content_of, name_of, present
from hbxt_compress.graph.ops import OWN_DOMAIN
from hbxt_compress.graph.storage import Storage

__all__ = ["lower_convolutions"]


def lower_convolutions(model: ir.Model, storage: Storage) -> None:
    """Before: hbxt::Conv(x T C H W, weight O C/g K h w, bias, K-1 frames before). After: Conv, Add.

    The weight is stored under its layer's name, frame by frame if it has several.
    """
    graph = model.graph
    for node in [n for n in graph if (n.domain, n.op_type) == (OWN_DOMAIN, "Conv")]:
        x, weight = (present(value) for value in node.inputs[:2])
        bias, before = (*node.inputs[2:], None, None)[:2]
        builder = GraphBuilder(graph, node)
        module = name_of(weight).removeprefix("model.").removesuffix(".weight")
        stored = storage.of(f"{storage.component}/{module}", content_of(weight))
        emit = partial(_weights, stored.format, module, builder.shape_of(weight))
        groups = node.attributes["group"].as_int()
        grouped: dict[str, Any] = {} if groups == 1 else {"group": groups}
        out: Value | None = None
        for frames, part in zip(
            _windows(builder, module, x, before, builder.shape_of(weight)[2]),
            stored.emit(graph, node, x, emit),
            strict=True,
        ):
            if frames is None:
                continue
            # none of them without: ONNX Runtime would hold its weight twice while it loads
            own = bias if out is None else None
            if own is None:
                own = _zeros(builder, graph, builder.shape_of(weight)[0])
            convolved = builder.node(
                "Conv",
                [frames, part, own],
                shape=builder.shape_of(node.outputs[0]),
                kernel_shape=builder.shape_of(weight)[3:],
                pads=node.attributes["pads"].as_ints(),
                **grouped,
            )
            if out is not None:
                convolved = builder.node("Add", [out, convolved], shape=builder.shape_of(out))
            out = convolved
        node.outputs[0].replace_all_uses_with(present(out), replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _zeros(builder: GraphBuilder, graph: ir.Graph, n: int) -> Value:
    """A bias that adds nothing."""
    name = f"zeros.{n}"
    known = graph.initializers.get(name)
    return builder.initializer(name, torch.zeros(n)) if known is None else known


def _windows(
    builder: GraphBuilder, name: str, x: Value, before: Value | None, n_together: int
) -> list[Value | None]:
    """What each frame of a kernel sees, T C H W, oldest first; None of those that are all zero.

    The last sees x, each before it one frame less of x and one more of what came before.
    """
    n_frames, *rest = builder.shape_of(x)
    n_before = n_together - 1
    if before is None:
        return [*[None] * n_before, x]

    def some(frames: Value, start: int, stop: int, what: str) -> Value:
        if (start, stop) == (0, builder.shape_of(frames)[0]):
            return frames
        ends = (
            builder.initializer(f"{name}/{what}_{key}", torch.tensor([number]))
            for key, number in (("start", start), ("stop", stop), ("axis", 0))
        )
        return builder.node("Slice", [frames, *ends], shape=(stop - start, *rest))

    windows = []
    for i in range(n_before):
        old = some(before, i, min(n_before, i + n_frames), f"before_{i}")
        n_new = n_frames - builder.shape_of(old)[0]
        if n_new:
            new = some(x, 0, n_new, f"frames_{i}")
            old = builder.node("Concat", [old, new], shape=(n_frames, *rest), axis=0)
        windows.append(old)
    return [*windows, x]


def _weights(
    stored: WeightFormat,
    name: str,
    shape: tuple[int, ...],
    builder: GraphBuilder,
    _: Value,
    payload: Mapping[str, Tensor],
) -> list[Value]:
    """The float32 weights O C h w of each frame of a kernel O C K h w.

    What the payload has for every number of the weight is dealt out, the rest is shared.
    """
    n_out, n_channels, n_together, *kernel = shape
    flat = (n_out, n_channels, *kernel)
    weights = []
    for i in range(n_together):
        part = {
            key: tensor.reshape(shape)[:, :, i].reshape(flat)
            if tensor.ndim > 1 and tensor.numel() == math.prod(shape)
            else tensor
            for key, tensor in payload.items()
        }
        label = name if n_together == 1 else f"{name}.{i}"
        weights.append(stored.weight(builder, label, part, flat))
    return weights
