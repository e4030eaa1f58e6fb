"""Sharding: a network of which every rank holds a part of each weight (FSDP2, torch's fully_shard).

Before a block runs its weights are gathered, and let go of after it; of its gradients, averaged
over the ranks, each keeps its part. What is done number by number, as an optimizer does, goes on
in the parts. With one rank nothing here changes anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from hbxt_compress.ranks import Ranks

__all__ = ["Named", "fill", "gathered", "part", "shard", "whole"]


class Named(Mapping[str, Tensor]):
    """Those of some tensors whose names begin with a prefix, by the rest; each read when asked."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        self._tensors, self._prefix = tensors, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        own = self._prefix
        return (name.removeprefix(own) for name in self._tensors if name.startswith(own))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def shard(module: nn.Module, ranks: Ranks) -> None:
    """Leaves each rank its part of every weight: block by block, then of what no block has.

    Blocks are the children of the outermost module lists. All ranks must hold the same weights
    before, and run the same number of forwards and backwards from now on. Call it before an
    optimizer is made.
    """
    if ranks.world == 1:
        return
    mesh = init_device_mesh(next(module.parameters()).device.type, (ranks.world,))
    for block in _blocks(module):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    module.register_forward_hook(_copied)
    # Of the root, too: else a forward without gradients would leave its old weights gathered.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _copied(_: nn.Module, __: object, out: Any) -> Any:
    """The output in memory of its own: FSDP's gradients get lost in a view that is written to."""
    return tuple(one.clone() for one in out) if isinstance(out, tuple) else out.clone()


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank; ranks ask for the same ones in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """All of each tensor on the first rank, in its memory; others get none, but all must ask."""
    if ranks.world == 1:
        return dict(tensors)
    found = {}
    for name, one in tensors.items():  # one at a time: no GPU holds all of them
        complete = whole(one)
        if ranks.leads:
            found[name] = complete.cpu()
    return found


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Overwrites a tensor, or this rank's part of it; value: all of it, or sharded alike."""
    if isinstance(tensor, DTensor) and not isinstance(value, DTensor):
        placed = value.to(tensor.device, tensor.dtype)
        value = distribute_tensor(placed, tensor.device_mesh, tensor.placements, src_data_rank=None)
    part(tensor).copy_(part(value))
