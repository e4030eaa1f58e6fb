"""Compress video diffusion models for AMD GPUs: quantize, export to ONNX, generate, measure.

The names below are imported when they are first used: the runtime must not pull in torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hbxt_compress.evaluation import evaluate
    from hbxt_compress.machine import Machine
    from hbxt_compress.pipeline import compress, plan
    from hbxt_compress.recipe import load_recipe
    from hbxt_compress.runtime.generate import Runtime
    from hbxt_compress.store import Store
    from hbxt_compress.suite import load_suite

__all__ = [
    "Machine",
    "Runtime",
    "Store",
    "compress",
    "evaluate",
    "load_recipe",
    "load_suite",
    "plan",
]

_HOMES = {
    "Machine": "machine",
    "Runtime": "runtime.generate",
    "Store": "store",
    "compress": "pipeline",
    "evaluate": "evaluation",
    "load_recipe": "recipe",
    "load_suite": "suite",
    "plan": "pipeline",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
