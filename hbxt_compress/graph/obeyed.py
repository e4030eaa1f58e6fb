"""Whether a component's files obey what every export promises, reading no weights but 16-bit ones.

It looks at what is on disk, so it also serves artifacts that others wrote.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from hbxt_compress.graph.builder import CONTRIB, content_of, name_of, present
from hbxt_compress.graph.external import ALIGNMENT, DATA_FILE
from hbxt_compress.graph.targets import TARGETS, Target

__all__ = ["Problem", "check_component", "check_model"]

_KEYS = ["location", "offset", "length"]
_ALIGNED_FROM = 1024 * 1024
_LEAST_BLOCK = 16
_PART = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A broken rule: in which file, at which node or value, and what is wrong."""

    file: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.where}: {self.what}"


def check_component(folder: Path, target: Target = TARGETS["rocm"]) -> tuple[Problem, ...]:
    """All broken rules of a component's graphs; empty if it has none."""
    files = sorted(folder.glob("*.onnx"))
    if not files:
        return (Problem(file=str(folder.name), where="folder", what="has no *.onnx file"),)
    return tuple(problem for file in files for problem in check_model(file, target))


def check_model(file: Path, target: Target = TARGETS["rocm"]) -> tuple[Problem, ...]:
    """All broken rules of one graph and its external data."""
    proto = onnx.load(file, load_external_data=False)
    findings = list(_external(proto, file.parent))
    # A tensor out of range cannot be read: report that alone.
    if not findings:
        model = ir.load(file)
        for rule in (_versions, _values, _nodes):
            findings.extend(rule(model, target))
    return tuple(Problem(file=file.name, where=where, what=what) for where, what in findings)


def _external(proto: onnx.ModelProto, folder: Path) -> Iterator[tuple[str, str]]:
    for tensor in proto.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if not entries:
            continue
        if [entry.key for entry in tensor.external_data] != _KEYS:
            yield tensor.name, f"external data keys {list(entries)}, expected {_KEYS} in order"
            continue
        offset, length = int(entries["offset"]), int(entries["length"])
        path = folder / DATA_FILE
        if entries["location"] != DATA_FILE or not path.is_file():
            yield tensor.name, f"external data in {entries['location']!r}, expected {DATA_FILE!r}"
        elif offset + length > path.stat().st_size:
            yield tensor.name, f"external data ends at {offset + length}, beyond the file's end"
        if length > _ALIGNED_FROM and offset % ALIGNMENT:
            yield tensor.name, f"offset {offset} is not a multiple of {ALIGNMENT}"


def _versions(model: ir.Model, target: Target) -> Iterator[tuple[str, str]]:
    if model.ir_version > target.largest_ir_version:
        yield "model", f"IR version {model.ir_version}, at most {target.largest_ir_version}"
    if model.functions:
        yield "model", f"{len(model.functions)} local functions, expected none"
    for domain, version in model.opset_imports.items():
        if domain not in target.operators:
            yield "model", f"imports operator domain {domain!r}"
        elif version not in (target.opsets if domain == "" else {1}):
            yield "model", f"opset {version} of domain {domain!r}"


def _values(model: ir.Model, target: Target) -> Iterator[tuple[str, str]]:
    graph = model.graph
    for value in (*graph.inputs, *graph.outputs, *_inner(graph)):
        if value.shape is None or not value.shape.is_static():
            yield name_of(value), f"shape {value.shape} is not static"
        if value.dtype is None or value.dtype.name not in target.dtypes:
            yield name_of(value), f"has dtype {value.dtype}"
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype not in (ir.DataType.FLOAT, ir.DataType.INT64):
            yield name_of(value), f"is {value.dtype} at the graph's edge, expected FLOAT or INT64"
    for value in graph.initializers.values():
        tensor = content_of(value)
        if tensor.dtype.name not in target.dtypes:
            yield name_of(value), f"has dtype {tensor.dtype}"
        elif tensor.dtype == ir.DataType.FLOAT16 and not _finite(tensor):
            yield name_of(value), "has float16 values that are not finite"


def _finite(tensor: ir.TensorProtocol) -> bool:
    """Read part by part, not mapped: one 16-bit table may not fit into memory."""
    if not isinstance(tensor, ir.ExternalTensor):
        return bool(np.isfinite(tensor.numpy()).all())
    with Path(tensor.path).open("rb") as file:
        file.seek(tensor.offset or 0)
        starts = range(0, tensor.size, _PART)
        counts = (min(_PART, tensor.size - start) for start in starts)
        return all(bool(np.isfinite(np.fromfile(file, "<f2", n)).all()) for n in counts)


def _inner(graph: ir.Graph) -> Iterator[ir.Value]:
    for node in graph:
        yield from (output for output in node.outputs if output.name)


def _nodes(model: ir.Model, target: Target) -> Iterator[tuple[str, str]]:
    for node in model.graph:
        where = node.name or node.op_type
        if node.op_type not in target.operators.get(node.domain, frozenset()):
            yield where, f"operator {node.domain or 'ai.onnx'}::{node.op_type} is not allowed"
        for index in target.constant_arguments.get(node.op_type, ()):
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is not None and value.const_value is None:
                yield where, f"input {index} of {node.op_type} is not constant"
        if (node.domain, node.op_type) == (CONTRIB, "MatMulNBits"):
            yield from ((where, what) for what in _four_bits(node))
        if node.op_type == "DequantizeLinear" and len(node.inputs) < 3:
            yield where, "DequantizeLinear without a zero point"


def _four_bits(node: ir.Node) -> Iterator[str]:
    bits, block, k, n = (
        node.attributes[name].as_int() if name in node.attributes else 0
        for name in ("bits", "block_size", "K", "N")
    )
    level = node.attributes.get("accuracy_level")
    if bits != 4:
        yield f"MatMulNBits of {bits} bits, expected 4"
    if len(node.inputs) not in (3, 4):
        yield f"MatMulNBits with {len(node.inputs)} inputs, expected 3 or 4"
    if level is not None and level.as_int():
        yield f"MatMulNBits with accuracy_level {level.as_int()}, expected none"
    if block < _LEAST_BLOCK or block & (block - 1) or k % block:
        yield f"MatMulNBits block_size {block} with K {k}"
        return
    codes = present(node.inputs[1])
    if (expected := [n, k // block, block // 2]) != _shape(codes):
        yield f"MatMulNBits weight of shape {_shape(codes)}, expected {expected}"
    if len(node.inputs) == 4:
        yield from _zero_points(node.inputs[3], n * math.ceil(k // block / 2))


def _zero_points(zeros: ir.Value | None, n_bytes: int) -> Iterator[str]:
    """Two a byte along one axis: a second axis or another type is misread by some targets."""
    if zeros is None:
        yield "MatMulNBits with an empty fourth input, expected zero points or three inputs"
        return
    if zeros.dtype != ir.DataType.UINT8 or zeros.const_value is None:
        yield f"MatMulNBits zero points of dtype {zeros.dtype}, expected a constant UINT8"
    if _shape(zeros) != [n_bytes]:
        yield f"MatMulNBits zero points of shape {_shape(zeros)}, expected {[n_bytes]}"


def _shape(value: ir.Value) -> list[int | ir.SymbolicDim] | None:
    return None if value.shape is None else list(value.shape)
