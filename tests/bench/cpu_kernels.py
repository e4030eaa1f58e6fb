"""The operators and element types of the installed ONNX Runtime's CPU provider, as YAML.

    python tests/bench/cpu_kernels.py

Prints the lists `operators` and `only` of hbxt_compress/graph/runtimes/cpu.yaml. A node's types are
those of its kernels and, where a kernel leaves an input or output free, those of its definition.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import onnx.defs
from onnxruntime.capi import onnxruntime_pybind11_state as state

__all__ = ["as_yaml", "kernels", "types_of"]

_DOMAINS = ("", "com.microsoft")
_NAMES = {
    "float": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "double": "DOUBLE",
}  # fmt: skip
_LATEST = 1 << 30
_WIDTH = 96


def types_of(texts: Iterable[str]) -> set[str]:
    """ONNX names of the element types in texts like `tensor(float16)`; others are left out."""
    found = (re.fullmatch(r"tensor\((\w+)\)", text) for text in texts)
    return {_NAMES.get(match[1], match[1].upper()) for match in found if match}


def kernels() -> Mapping[tuple[str, str], frozenset[str]]:
    """(domain, operator) -> element types that its kernels take in some version."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    free = _free()
    for kernel in state.get_all_opkernel_def():
        if kernel.provider != "CPUExecutionProvider" or kernel.domain not in _DOMAINS:
            continue
        key = kernel.domain, kernel.op_name
        for texts in kernel.type_constraints.values():
            found[key] |= types_of(texts)
        defined = free.get(key, {})
        renamed = kernel.type_constraints.keys() - defined.keys()  # a T for the definition's T1
        for name, types in defined.items():
            if name not in kernel.type_constraints and (len(types) == 1 or not renamed):
                found[key] |= types
    for schema in onnx.defs.get_all_schemas():  # operators that are made of others
        made = schema.has_function or schema.has_context_dependent_function  # type: ignore[attr-defined]
        if schema.domain == "" and made and not schema.deprecated:
            types = set[str]().union(*_by_parameter(schema).values())
            found.setdefault((schema.domain, schema.name), types)
    return {key: frozenset(types) for key, types in found.items()}


def _free() -> dict[tuple[str, str], dict[str, set[str]]]:
    """(domain, operator) -> type parameter -> element types of its newest definition."""
    newest: dict[tuple[str, str], Any] = {}
    for schema in state.get_all_operator_schema():
        key = schema.domain, schema.name
        if key not in newest or schema.since_version > newest[key].since_version:
            newest[key] = schema
    return {key: _by_parameter(schema) for key, schema in newest.items()}


def _by_parameter(schema: Any) -> dict[str, set[str]]:
    allowed = {one.type_param_str: one.allowed_type_strs for one in schema.type_constraints}
    names = [
        getattr(one, "type_str", None) or one.typeStr for one in (*schema.inputs, *schema.outputs)
    ]
    return {name: types_of(allowed.get(name, [name])) for name in names}


def _folded(words: Iterable[str], indent: str) -> str:
    return textwrap.fill(", ".join(words), _WIDTH, initial_indent=indent, subsequent_indent=indent)


def as_yaml() -> str:
    """The lists `types`, `operators` and `only` of a table."""
    found = kernels()
    every = sorted(set[str]().union(*found.values()))
    parts = [f"types: [\n{_folded(every, '  ')}\n]", "operators:"]
    for domain in _DOMAINS:
        names = sorted(name for where, name in found if where == domain)
        parts.append(f"  {domain or 'ai.onnx'}: [\n{_folded(names, '    ')}\n  ]")
    parts.append("only:")
    for (domain, name), types in sorted(found.items()):
        if types and sorted(types) != every:
            key = f'"{domain}::{name}"' if domain else name
            text = f"  {key}: [{', '.join(sorted(types))}]"
            if len(text) > _WIDTH:
                text = f"  {key}: [\n{_folded(sorted(types), '    ')}\n  ]"
            parts.append(text)
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.stdout.write(as_yaml())
