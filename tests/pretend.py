"""A second device that this machine need not have: tensors on it compute on the CPU.

Mixing its tensors with those of the CPU fails as it does on a GPU. Indices and single numbers may
lie on the CPU, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["DEVICE", "OtherDevice", "back", "there"]

DEVICE = torch.device("lazy:0")  # a type that every build of torch has, used by nothing here
_aten = torch.ops.aten
_COPIES = {_aten._to_copy.default, _aten.copy_.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten._index_put_impl_.default}


class _Elsewhere(Tensor):
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Self:
        made: Self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, call: Any, types: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _run(call, args, kwargs or {})


class OtherDevice(TorchDispatchMode):
    """Meanwhile tensors may be made on DEVICE and sent there."""

    def __torch_dispatch__(
        self, call: Any, types: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _run(call, args, kwargs or {})


def there(tensor: Tensor) -> Tensor:
    """A copy on the other device."""
    return _Elsewhere(tensor.detach().clone())


def back(thing: Any) -> Any:
    """The same with all tensors on the CPU."""
    return tree_map(lambda one: one.inner if isinstance(one, _Elsewhere) else one, thing)


def _run(call: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
    far = [one for one in tensors if isinstance(one, _Elsewhere)]
    near = [one for one in tensors if not isinstance(one, _Elsewhere) and one.dim()]
    if call in _INDEXED and isinstance(args[0], _Elsewhere):
        near = [one for one in near if one.dtype not in (torch.int64, torch.bool)]
    if far and near and call not in _COPIES:
        shapes = [tuple(one.shape) for one in near]
        raise RuntimeError(f"{call}: tensors {shapes} of the CPU among those of {DEVICE}")
    wanted = kwargs.get("device")
    on_other = bool(far) if wanted is None else torch.device(wanted).type == DEVICE.type
    if call is _aten.copy_.default:
        on_other = isinstance(args[0], _Elsewhere)
    inside = {**kwargs, "device": torch.device("cpu")} if wanted is not None else kwargs
    own = {id(one.inner): one for one in far}
    found = call(*back(args), **back(dict(inside)))
    wrap: Callable[[Any], Any] = lambda one: (  # noqa: E731
        own.get(id(one)) if id(one) in own
        else _Elsewhere(one) if on_other and isinstance(one, Tensor) else one
    )  # fmt: skip
    return tree_map(wrap, found)
