"""Chain: a model as head, blocks and tail, run piece by piece while somebody looks at layer inputs.

Works on any module that keeps its blocks in one ModuleList, hands each block's only output to the
next one as its first argument, and gives all blocks the same other arguments. A model need not fit
in memory: a skeleton reads the weights of a block when it is entered and forgets them afterwards.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from hbxt_compress.weights import Weights

__all__ = ["LARGE", "Carry", "Chain", "layer_at", "watch"]


_CPU = torch.device("cpu")
LARGE = 1_000_000_000
"""parameters of a component above which its blocks multiply in bfloat16"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Carry:
    """What a block is given: the hidden state and the arguments that all blocks share."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Chain:
    """A module in pieces. call(module, *inputs) is a whole forward; blocks: path of the list.

    weights: None if the module has its own. Else it is a skeleton, to run on `device`: what lies
    outside the blocks is read now, a block's weights between `enter` and `leave`. Blocks of more
    than a billion parameters in all multiply in bfloat16, and keep such weights as they are stored.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: str,
        call: Callable[..., Tensor],
        weights: Weights | None = None,
        device: torch.device = _CPU,
    ) -> None:
        self.module = module
        self._path, self.call = blocks, call
        self._weights, self._device = weights, device
        self.blocks = list(module.get_submodule(blocks).children())
        n_parameters = sum(parameter.numel() for parameter in module.parameters())
        self.is_large = weights is not None and n_parameters > LARGE
        if weights is not None:
            self._read_loose(weights)

    def share(self, other: Chain) -> None:
        """Holds what lies outside the blocks in the memory of another chain of the same model.

        Either may put something else in its place; what lies there is never written to.
        """
        for name, parameter in other.module.named_parameters():
            if not name.startswith(f"{self._path}."):
                path, _, last = name.rpartition(".")
                setattr(self.module.get_submodule(path), last, _still(parameter.data))

    def enter(self, index: int) -> None:
        """Makes sure that a block has its weights, as they are in the files."""
        if self._weights is not None:
            for module in self.blocks[index].modules():
                self._move_buffers(module)
            block, prefix = self.blocks[index], f"{self._path}.{index}."
            self._fill(block, prefix, self._weights)
            for name, module in block.named_modules() if self.is_large else ():
                if isinstance(module, nn.Linear):
                    stored = self._weights.dtype(f"{prefix}{name}.weight")
                    if stored == "BF16":
                        module.weight = _still(module.weight.to(torch.bfloat16))

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Meanwhile a block multiplies as it should."""
        if not self.is_large:
            yield
            return
        with torch.autocast(self._device.type, torch.bfloat16), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Mismatch dtype")  # norms stay exact, that is meant
            yield

    def leave(self, index: int) -> None:
        """Lets go of a block's weights, and of what was put in their place, if files have them."""
        if self._weights is not None:
            for module in self.blocks[index].modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, _still(parameter.to("meta")))

    def _read_loose(self, weights: Weights) -> None:
        """Reads what no block has; of a table only the rows that are looked up."""
        for path, module in self.module.named_modules():
            if f"{path}.".startswith(f"{self._path}."):
                continue
            self._move_buffers(module)
            if isinstance(module, nn.Embedding):
                empty = torch.empty(0, module.embedding_dim, device=self._device)
                module.weight = _still(empty)  # rows come when asked
                module.register_forward_pre_hook(self._look_up(weights, f"{path}.weight"))
                continue
            self._fill(module, f"{path}." if path else "", weights, recurse=False)

    def _move_buffers(self, module: nn.Module) -> None:
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(self._device))

    def _look_up(
        self, weights: Weights, name: str
    ) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
        """Gives a table, before it is asked, the rows that it will be asked for."""

        def hook(module: nn.Module, ids: tuple[Tensor, ...]) -> tuple[Tensor]:
            asked, where = ids[0].to(_CPU).unique(return_inverse=True)
            module.weight = _still(weights.looked_up(name, asked).to(self._device))
            return (where.to(self._device),)

        return hook

    def _fill(
        self, module: nn.Module, prefix: str, weights: Weights, *, recurse: bool = True
    ) -> None:
        for name, _ in list(module.named_parameters(recurse=recurse)):
            path, _, last = name.rpartition(".")
            value = weights.tensor(prefix + name).to(self._device)
            setattr(module.get_submodule(path), last, _still(value))

    def whole(self, *inputs: Tensor) -> Tensor:
        """The module's output; all of its weights must be there."""
        return self.call(self.module, *inputs)

    @torch.no_grad()
    def head(self, *inputs: Tensor) -> Carry:
        """What the first block is given."""
        found: list[Carry] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(Carry(hidden=args[0], args=args[1:], kwargs=kwargs))
            raise _Reached

        handle = self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.call(self.module, *inputs)
        except _Reached:
            return found[0]
        finally:
            handle.remove()
        raise RuntimeError(f"{type(self.module).__name__} did not run its {self._path}")

    @torch.no_grad()
    def block(self, index: int, carry: Carry) -> Carry:
        """What the next block is given, or the tail."""
        with self.arithmetic():
            hidden = self.blocks[index](carry.hidden, *carry.args, **carry.kwargs)
        return replace(carry, hidden=hidden)

    @torch.no_grad()
    def tail(self, carry: Carry, *inputs: Tensor) -> Tensor:
        """The module's output, given what the last block returned."""
        return self.around(carry.hidden, *inputs)[1]

    def around(self, hidden: Tensor, *inputs: Tensor) -> tuple[Carry, Tensor]:
        """What the first block is given, and the output if the last one returned `hidden`.

        Runs all but the blocks, and leaves it to the caller whether gradients are wanted.
        """
        given = _Given(hidden)
        listed = self.module.get_submodule(self._path)
        self.module.set_submodule(self._path, nn.ModuleList([given]))
        try:
            output = self.call(self.module, *inputs)
        finally:
            self.module.set_submodule(self._path, listed)
        (carry,) = given.seen
        return carry, output


class _Reached(Exception):
    """Ends a forward at the first block."""


class _Seen(Exception):
    """Ends a run of which the rest is not needed."""


class _Given(nn.Module):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden
        self.seen: list[Carry] = []

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        self.seen.append(Carry(hidden=hidden, args=args, kwargs=kwargs))
        return self.hidden


def _still(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def layer_at(module: nn.Module, path: str) -> nn.Linear:
    """The layer at a module path; a convolution passes for a linear, it has weight and bias too."""
    return cast(nn.Linear, module.get_submodule(path))


def watch(
    modules: Mapping[str, nn.Module], run: Callable[[], object], *, stop: bool = True
) -> dict[str, Tensor]:
    """The first argument of each module while `run` runs, in the order of the calls.

    stop: end the run once all of them were called. A module that was not called is not in it.
    """
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, Sequence[Tensor]], None]:
        def hook(_: nn.Module, inputs: Sequence[Tensor]) -> None:
            seen[name] = inputs[0]
            if stop and len(seen) == len(modules):
                raise _Seen

        return hook

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(note(name)).remove)
        with suppress(_Seen):
            run()
    return seen
