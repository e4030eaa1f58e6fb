"""Targets: what an exported graph may contain so that its runtimes take all of it.

Stricter than what a runtime's own table says (graph/table.py): of what MIGraphX parses only that
which every runtime computes alike, with constant arguments and static shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from hbxt_compress.graph.table import table

__all__ = ["TARGETS", "Target"]

# Parsed, but only with constant arguments, as control flow, or with other results than ORT's.
_REFUSED: Final[Mapping[str, frozenset[str]]] = {
    "ai.onnx": frozenset(
        {
            "Attention",
            "ConstantOfShape",
            "If",
            "Loop",
            "NonZero",
            "Range",
            "RotaryEmbedding",
            "Scan",
            "Shape",
        }
    ),
    "com.microsoft": frozenset({"MatMulIntegerToFloat", "Range"}),
}
_PARSED: Final = table("migraphx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """opsets: versions of ai.onnx. operators: by domain. dtypes: ONNX names of element types.

    constant_arguments: operator -> the inputs that must be initializers.
    """

    name: str
    source: str
    opsets: frozenset[int]
    largest_ir_version: int
    operators: Mapping[str, frozenset[str]]
    dtypes: frozenset[str]
    constant_arguments: Mapping[str, tuple[int, ...]]


_ROCM = Target(
    name="rocm",
    source=_PARSED.source,
    opsets=frozenset({17, 18}),
    largest_ir_version=10,
    operators={
        domain.removeprefix("ai.onnx"): frozenset(names) - _REFUSED[domain]
        for domain, names in _PARSED.operators.items()
    },
    dtypes=frozenset(
        {"FLOAT", "FLOAT16", "INT64", "INT32", "BOOL", "INT8", "UINT8", "INT4", "UINT4"}
    ),
    constant_arguments={
        "Expand": (1,),
        "Pad": (1,),
        "ReduceMean": (1,),
        "ReduceSum": (1,),
        "Reshape": (1,),
        "Resize": (2, 3),
        "Slice": (1, 2, 3, 4),
        "Split": (1,),
        "Squeeze": (1,),
        "Tile": (1,),
        "Unsqueeze": (1,),
    },
)

TARGETS: Final[Mapping[str, Target]] = {target.name: target for target in (_ROCM,)}
