"""Tape: a model's way through some batches and back, with the weights of one block in memory.

On the way there the hidden states between blocks are written down; on the way back each block is
run again from what it was given, this time with gradients. So the gradients of the output with
respect to everything inside cost two passes over the weights, whatever their size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hbxt_compress.chain import Carry, Chain
from hbxt_compress.stages.side_by_side import Batch

__all__ = ["LOOSE", "Seen", "Tape"]

LOOSE = "loose"  # all that lies outside of the blocks, before and behind them


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A layer's input, B ... I, and the gradient with respect to its output, B ... O.

    gradient: None on the way there.
    """

    given: Tensor
    gradient: Tensor | None = None


@dataclass(slots=True, kw_only=True)
class _Back:
    """Gradients of one batch and one cotangent, as far back as they are known.

    hidden: with respect to what the piece before gave. shared: to the arguments of all blocks, the
    sum so far. inputs: to the model's own inputs, at the end.
    """

    output: Tensor
    hidden: Tensor | None = None
    shared: dict[str, Tensor] = field(default_factory=dict)
    inputs: tuple[Tensor | None, ...] = ()


class Tape:
    """A chain on some batches: `forward` piece by piece, `start`, then `backward` piece by piece.

    Each piece `with at(piece)`, and to the iterator's end. Hidden states lie in files in the
    meantime, in float32; place: what the files' names begin with.
    """

    def __init__(self, chain: Chain, batches: Sequence[Batch], place: Path) -> None:
        self.chain, self.batches, self._place = chain, batches, place
        self._inputs = [tuple(one.detach() for one in batch.full) for batch in batches]
        self._carries: list[Carry] = []
        self._backs: list[list[_Back]] = []
        self.outputs: list[Tensor] = []
        place.parent.mkdir(parents=True, exist_ok=True)

    @property
    def there(self) -> list[str]:
        """000, 001, ..., loose: the pieces in the order of the way there."""
        return [*(f"{k:03d}" for k in range(len(self.chain.blocks))), LOOSE]

    @property
    def back(self) -> list[str]:
        """The pieces in the order of the way back; loose is last, as it feeds all blocks."""
        return [*reversed(self.there[:-1]), LOOSE]

    @contextmanager
    def at(self, piece: str) -> Iterator[None]:
        """The weights of a piece are in memory."""
        if piece != LOOSE:
            self.chain.enter(int(piece))
        yield
        if piece != LOOSE:
            self.chain.leave(int(piece))

    @torch.no_grad()
    def forward(
        self, piece: str, modules: Sequence[str]
    ) -> Iterator[tuple[Batch, Mapping[str, Seen]]]:
        """Every batch, and what those of the modules that the piece calls are given there."""
        self._begin()
        for i, batch in enumerate(self.batches):
            carry = self._carries[i]
            with self._watched(modules) as calls:
                if piece == LOOSE:
                    self.outputs.append(self.chain.around(carry.hidden, *self._inputs[i])[1])
                else:
                    self._carries[i] = self.chain.block(int(piece), carry)
            yield batch, {name: Seen(given=given) for name, (given, _) in calls.items()}
        if piece != LOOSE:
            self._write_down(self._next(piece))

    def skip(self, piece: str) -> None:
        """Instead of `forward` for a block that an earlier run has passed."""
        self._begin()
        for i, carry in enumerate(self._carries):
            self._carries[i] = replace(carry, hidden=self._hidden(self._next(piece), i))

    def start(self, cotangents: Sequence[Sequence[Tensor]]) -> None:
        """Begins the way back: for each batch one or more tensors of its output's shape."""
        self._backs = [[_Back(output=one) for one in some] for some in cotangents]
        for i, inputs in enumerate(self._inputs):
            leaf = self._hidden(LOOSE, i).requires_grad_()
            with torch.enable_grad():
                _, output = self.chain.around(leaf, *inputs)
            for back in self._backs[i]:
                (back.hidden,) = _gradients([output], [leaf], [back.output])

    def backward(
        self, piece: str, modules: Sequence[str]
    ) -> Iterator[tuple[Batch, Mapping[str, Seen]]]:
        """Every batch, once a cotangent, and what modules were given and answer for there."""
        run = self._around if piece == LOOSE else self._block
        for i, batch in enumerate(self.batches):
            for seen in run(piece, modules, i):
                yield batch, seen

    def state(self) -> dict[str, Tensor]:
        """What the rest of the way back depends on, between two blocks; for `restore`."""
        found: dict[str, Tensor] = {}
        for i, some in enumerate(self._backs):
            for j, back in enumerate(some):
                assert back.hidden is not None
                found[f"{i}.{j}"] = back.hidden
                found |= {f"{i}.{j}.{name}": one for name, one in back.shared.items()}
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on, once started, where `state` was taken."""
        for i, some in enumerate(self._backs):
            for j, back in enumerate(some):
                at, device = f"{i}.{j}.", back.output.device
                back.hidden = state[f"{i}.{j}"].to(device)
                back.shared = {
                    key.removeprefix(at): one.to(device)
                    for key, one in state.items()
                    if key.startswith(at)
                }

    def input_gradients(self, index: int) -> list[list[Tensor]]:
        """By batch and cotangent, the gradient with respect to one of the model's inputs."""
        found = [[back.inputs[index] for back in some] for some in self._backs]
        return [[one for one in some if one is not None] for some in found]

    def _block(self, piece: str, modules: Sequence[str], i: int) -> Iterator[Mapping[str, Seen]]:
        hidden = self._hidden(piece, i).requires_grad_()
        carry = _as_leaves(replace(self._carries[i], hidden=hidden))
        shared = _floats(carry)
        with torch.enable_grad(), self.chain.arithmetic(), self._watched(modules) as calls:
            output = self.chain.blocks[int(piece)](carry.hidden, *carry.args, **carry.kwargs)
        wanted = [hidden, *shared.values(), *(output for _, output in calls.values())]
        for back in self._backs[i]:
            assert back.hidden is not None
            grads = _gradients([output], wanted, [back.hidden])
            back.hidden = grads[0]
            for name, gradient in zip(shared, grads[1:], strict=False):
                back.shared[name] = back.shared.get(name, 0) + gradient
            yield _seen(calls, grads[1 + len(shared) :])

    def _around(self, piece: str, modules: Sequence[str], i: int) -> Iterator[Mapping[str, Seen]]:
        inputs = tuple(
            one.detach().requires_grad_() if one.is_floating_point() else one
            for one in self._inputs[i]
        )
        leaves = [one for one in inputs if one.requires_grad]
        with torch.enable_grad(), self._watched(modules) as calls:
            carry, output = self.chain.around(self._hidden(piece, i), *inputs)
        shared = _floats(carry)
        wanted = [*leaves, *(output for _, output in calls.values())]
        for back in self._backs[i]:
            known = {"hidden": back.hidden, **back.shared}
            ends = [(carry.hidden, back.hidden), (output, back.output)]
            ends += [(shared[name], known[name]) for name in back.shared]
            ends = [(end, cotangent) for end, cotangent in ends if end.requires_grad]
            grads = _gradients([end for end, _ in ends], wanted, [one for _, one in ends])
            found = iter(grads)
            back.inputs = tuple(next(found) if one.requires_grad else None for one in inputs)
            yield _seen(calls, grads[len(leaves) :])

    @contextmanager
    def _watched(self, modules: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Fills in what modules are given and give; with gradients, what they give has one."""
        calls: dict[str, tuple[Tensor, Tensor]] = {}

        def noting(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                if torch.is_grad_enabled() and not output.requires_grad:
                    output.requires_grad_()
                calls[name] = inputs[0], output

            return note

        with ExitStack() as stack:
            for name in modules:
                layer = self.chain.module.get_submodule(name)
                stack.callback(layer.register_forward_hook(noting(name)).remove)
            yield calls

    @torch.no_grad()
    def _begin(self) -> None:
        if not self._carries:
            self._carries = [self.chain.head(*inputs) for inputs in self._inputs]
            self._write_down(self.there[0])

    def _next(self, piece: str) -> str:
        return self.there[self.there.index(piece) + 1]

    def _write_down(self, piece: str) -> None:
        """What the piece is about to be given."""
        hidden = {str(i): one.hidden.cpu().contiguous() for i, one in enumerate(self._carries)}
        unfinished = self._path(piece).with_suffix(".tmp")
        save_file(hidden, unfinished)
        os.replace(unfinished, self._path(piece))

    def _path(self, piece: str) -> Path:
        return self._place.with_name(f"{self._place.name}.{piece}.hidden.checkpoint")

    def _hidden(self, piece: str, i: int) -> Tensor:
        """What a piece (its last part) was given on the way there."""
        with safe_open(self._path(piece), framework="pt") as file:
            return file.get_tensor(str(i)).to(self._inputs[i][0].device)


def _as_leaves(carry: Carry) -> Carry:
    """The same values, those of its arguments that are floats to be differentiated by."""

    def leaf(one: Any) -> Any:
        return one.detach().requires_grad_() if _is_float(one) else one

    kwargs = {name: leaf(one) for name, one in carry.kwargs.items()}
    return replace(carry, args=tuple(leaf(one) for one in carry.args), kwargs=kwargs)


def _floats(carry: Carry) -> dict[str, Tensor]:
    """The arguments that all blocks share and that a gradient can be taken of, by a name."""
    named = {**{str(i): one for i, one in enumerate(carry.args)}, **carry.kwargs}
    return {name: one for name, one in named.items() if _is_float(one)}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _gradients(
    ends: Sequence[Tensor], wanted: Sequence[Tensor], cotangents: Sequence[Tensor | None]
) -> list[Tensor]:
    """The graph is kept; zeros for what plays no part."""
    if not (ends and wanted):
        return [torch.zeros_like(one) for one in wanted]
    found = torch.autograd.grad(
        ends, wanted, cotangents, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return list(found)


def _seen(
    calls: Mapping[str, tuple[Tensor, Tensor]], gradients: Sequence[Tensor]
) -> dict[str, Seen]:
    return {
        name: Seen(given=given, gradient=gradient)
        for (name, (given, _)), gradient in zip(calls.items(), gradients, strict=True)
    }
