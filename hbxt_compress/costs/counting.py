"""Counting: what a forward of a module consists of, found by running it without any values.

On the meta device a tensor has a shape and nothing else, so a block of a model of any size runs in
some milliseconds. Every operation passes by here on its way.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hbxt_compress.chain import Carry, Chain
from hbxt_compress.costs.work import Work

__all__ = ["REUSED_BYTES", "Counted", "Group", "Passes", "count", "count_passes"]

_Result = TypeVar("_Result")
REUSED_BYTES = 32 << 20
"""of a tensor: up to this the C library keeps freed memory at hand; beyond, it goes back"""
_FREE = frozenset(
    {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "detach",
     "unsqueeze", "squeeze", "split", "split_with_sizes", "unbind", "alias", "as_strided", "empty"}
)  # fmt: skip


_CONVOLUTIONS = frozenset({"convolution", "_convolution"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """flops: of products. convolved: of convolutions. n_calls: operations. moved: bytes that all
    others read and write.

    written: bytes of all results; fresh: of those too large for memory to be used again.
    peak_bytes: of results that are alive at the same time.
    """

    flops: float = 0.0
    convolved: float = 0.0
    n_calls: int = 0
    moved: float = 0.0
    written: float = 0.0
    fresh: float = 0.0
    peak_bytes: int = 0

    def work(self, products: str = "float32") -> Work:
        """The same as work; products: the kind that its products are."""
        rest = {"call": float(self.n_calls), "move": self.moved, "fresh": self.fresh}
        rest["convolve"] = self.convolved
        return Work.of(**{products: self.flops}, **rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Linears of a block that are given one tensor. n_rows, n_in: of it; before: until then."""

    modules: tuple[str, ...]
    n_rows: int
    n_in: int
    before: Counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """A component's forward of one batch, in pieces; all its blocks are like the first.

    groups: the first block's linears, by the tensor they are given, in order of their calls.
    hidden_bytes: between two blocks. shared_bytes: of what all blocks are given beside.
    """

    head: Counted
    block: Counted
    tail: Counted
    groups: tuple[Group, ...]
    hidden_bytes: int
    shared_bytes: int
    output_shape: tuple[int, ...]


def count(run: Callable[[], _Result]) -> tuple[_Result, Counted]:
    """What `run` returns, and what it took; its tensors are on the meta device."""
    with torch.no_grad(), torch.device("meta"), _Counting() as mode:
        result = run()
    return result, mode.counted()


def count_passes(chain: Chain, inputs: Sequence[Tensor]) -> Passes:
    """How a component on the meta device passes inputs that are there too."""
    module = chain.module
    carry, head = count(lambda: chain.head(*inputs))
    groups: list[tuple[Tensor, list[str], Counted]] = []
    with torch.no_grad(), torch.device("meta"), _Counting() as mode:

        def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
                known = next((names for x, names, _ in groups if x is given[0]), None)
                if known is None:
                    groups.append((given[0], [name], mode.counted()))
                else:
                    known.append(name)

            return hook

        names = {id(one): name for name, one in module.named_modules()}
        hooks = [
            one.register_forward_pre_hook(note(names[id(one)]))
            for one in chain.blocks[0].modules()
            if isinstance(one, nn.Linear)
        ]
        try:
            after = chain.block(0, carry)
        finally:
            for hook in hooks:
                hook.remove()
    output, tail = count(lambda: chain.tail(after, *inputs))
    found = tuple(
        Group(
            modules=tuple(named),
            n_rows=math.prod(x.shape[:-1]),
            n_in=x.shape[-1],
            before=before,
        )
        for x, named, before in groups
    )
    return Passes(
        head=head,
        block=mode.counted(),
        tail=tail,
        groups=found,
        hidden_bytes=carry.hidden.nbytes,
        shared_bytes=sum(one.nbytes for one in _tensors(_arguments(carry))),
        output_shape=tuple(output.shape),
    )


def _arguments(carry: Carry) -> list[Any]:
    return [*carry.args, *carry.kwargs.values()]


def _tensors(values: object) -> Iterable[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for one in values:
            yield from _tensors(one)


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._flops = self._convolved = self._moved = self._written = self._fresh = 0.0
        self._calls = self._alive = self._peak = 0
        self._owners: dict[int, int] = {}  # storage -> tensors that live in it

    def counted(self) -> Counted:
        return Counted(
            flops=self._flops,
            convolved=self._convolved,
            n_calls=self._calls,
            moved=self._moved,
            written=self._written,
            fresh=self._fresh,
            peak_bytes=self._peak,
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # there is no value; what asks is whether nothing is padding
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet, results = func._overloadpacket, list(_tensors(out))
        self._calls += 1
        is_view = packet.__name__ in _FREE
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
            if packet.__name__ in _CONVOLUTIONS:
                self._convolved += flops
            else:
                self._flops += flops
        elif not is_view:
            self._moved += sum(one.nbytes for one in (*_tensors(args), *results))
        for one in results:
            if not is_view:
                self._written += one.nbytes
                self._fresh += one.nbytes if one.nbytes > REUSED_BYTES else 0
            if not is_view or one.untyped_storage()._cdata in self._owners:
                self._own(one)
        return out

    def _own(self, tensor: Tensor) -> None:
        """Counts a result's memory from now until the last tensor that lives in it is gone."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._owners:
            self._owners[key] = 0
            self._alive += size
            self._peak = max(self._peak, self._alive)
        self._owners[key] += 1
        weakref.finalize(tensor, self._disown, key, size)

    def _disown(self, key: int, size: int) -> None:
        self._owners[key] -= 1
        if not self._owners[key]:
            del self._owners[key]
            self._alive -= size
