"""Unread: stand-ins for parameters, to see whether an optimizer depends on what is in them.

They have shape and dtype, and NaN for content. A comparison with them is noted, and what was
calculated from them is NaN too and can be found in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir

from hbxt_compress.graph.builder import content_of

__all__ = ["Unread"]


class Unread:
    """The stand-ins of one graph, and what became of them."""

    def __init__(self) -> None:
        self._looked_at: set[str] = set()
        self._tensors: set[int] = set()

    def tensor(self, like: ir.LazyTensor) -> ir.LazyTensor:
        """A stand-in. No other tensor's bytes are the same, so equal contents are not merged."""
        name = like.name or ""
        hidden = _Tensor(partial(self._hidden, like), like.dtype, like.shape, name=name)
        self._tensors.add(id(hidden))
        return hidden

    def used(self, graph: ir.Graph) -> list[str]:
        """Names of parameters whose content was looked at, and of values made of some content."""
        made = {
            name
            for name, value in graph.initializers.items()
            if id(content_of(value)) not in self._tensors and _has_nan(content_of(value))
        }
        return sorted(self._looked_at | made)

    def _hidden(self, like: ir.LazyTensor) -> ir.TensorProtocol:
        note = partial(self._looked_at.add, like.name or "")
        if not like.dtype.is_floating_point():
            note()
            return like.raw()
        nan = np.full((), np.nan, like.dtype.numpy())
        numbers = np.broadcast_to(nan, like.shape.numpy()).view(_Numbers)
        numbers.note = note
        return ir.Tensor(numbers, name=like.name)


class _Tensor(ir.LazyTensor):
    def tobytes(self) -> bytes:
        return (self.name or "").encode()


class _Numbers(np.ndarray):
    """An array that tells when its numbers are compared or calculated with."""

    note: Callable[[], object] = staticmethod(lambda: None)

    def __array_finalize__(self, source: object) -> None:
        self.note = getattr(source, "note", self.note)

    def item(self, *place):  # type: ignore[no-untyped-def]
        self.note()
        return self.view(np.ndarray).item(*place)

    def __array_ufunc__(self, ufunc, method, *inputs, **options):  # type: ignore[no-untyped-def]
        self.note()
        plain = (x.view(np.ndarray) if isinstance(x, _Numbers) else x for x in inputs)
        return getattr(ufunc, method)(*plain, **options)


def _has_nan(tensor: ir.TensorProtocol) -> bool:
    if isinstance(tensor, ir.LazyTensor) or not tensor.dtype.is_floating_point():
        return False
    return bool(np.isnan(tensor.numpy().view(np.ndarray)).any())
