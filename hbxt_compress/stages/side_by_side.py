"""The full-precision and the half quantized model side by side, piece by piece, on the same states.

A component is cut into head, blocks and tail. Before a piece is rounded, its layers' inputs are
gathered from both models; afterwards both hand their states on. Only the states of one piece
boundary are kept and, inside a block of a large model, what its modules gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hbxt_compress.chain import Carry, Chain, layer_at, watch
from hbxt_compress.errors import CalibrationError
from hbxt_compress.ranks import ALONE, Ranks
from hbxt_compress.stages.memo import Memo
from hbxt_compress.stages.products import products_for
from hbxt_compress.stages.together import agreed_shifts, sum_up
from hbxt_compress.stats import WIDEST, LayerInputs, LayerStats, Need

__all__ = ["HEAD", "TAIL", "Batch", "SideBySide"]

HEAD, TAIL = "head", "tail"
_ROWS_AT_ONCE = 2048  # of an input, before they are added to sums that may take 0.8 GB


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Inputs of a whole forward of either model, all of equal weight.

    rows_BS: which rows of the hidden states count, or None for all.
    """

    full: tuple[Tensor, ...]
    half: tuple[Tensor, ...]
    weight: float
    held_out: bool
    rows_BS: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        rows = None if self.rows_BS is None else self.rows_BS.to(device)
        full, half = (tuple(t.to(device) for t in side) for side in (self.full, self.half))
        return replace(self, full=full, half=half, rows_BS=rows)


@dataclass(slots=True, kw_only=True)
class _Sums:
    """Statistics, and where what was added stands among the batches of all ranks."""

    stats: LayerStats
    places: list[tuple[bool, int]] = field(default_factory=list)
    waiting: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)

    def add(self, x: Tensor, y: Tensor, weight: float, place: tuple[bool, int]) -> None:
        """Adds a batch, or lets it wait for others."""
        self.places.append(place)
        self.waiting.append((x, y, weight))
        if sum(x.shape[:-1].numel() for x, _, _ in self.waiting) >= _ROWS_AT_ONCE:
            self.settle()

    def settle(self) -> None:
        """Adds what waits."""
        self.stats.add_all(self.waiting, shift_I=self.stats.shift_I)
        self.waiting.clear()

    def summed_up(self, ranks: Ranks) -> LayerStats:
        """Those of all ranks."""
        sum_up(ranks, self.stats, self.places)
        return self.stats


class SideBySide:
    """Two chains of one shape and what they have computed so far for every batch.

    half: the full one itself where nothing will be quantized; then everything is computed once.
    batches: of several ranks each has its own, which go round; statistics are of all.
    """

    def __init__(
        self, full: Chain, half: Chain, batches: Sequence[Batch], ranks: Ranks = ALONE
    ) -> None:
        self.full, self.half, self.batches = full, half, batches
        self._carries: list[tuple[Carry, Carry]] = []
        self._memos: dict[tuple[bool, int], Memo] = {}
        self.outputs: list[tuple[Tensor, Tensor]] = []
        self._ranks = ranks
        held_out = ranks.gathered([batch.held_out for batch in batches])
        self._held_out = [
            held_out[place % ranks.world][place // ranks.world]
            for place in range(sum(map(len, held_out)))
        ]

    @property
    def pieces(self) -> list[str]:
        """head, 000, 001, ..., tail: in the order in which they must be walked."""
        return [HEAD, *(f"{k:03d}" for k in range(len(self.full.blocks))), TAIL]

    def enter(self, piece: str) -> None:
        """Makes sure that both models have the weights of a piece."""
        for chain, k in self._streamed(piece):
            chain.enter(k)

    def leave(self, piece: str) -> None:
        """Lets go of the weights of a piece, where they can be read again."""
        for chain, k in self._streamed(piece):
            chain.leave(k)

    def _streamed(self, piece: str) -> list[tuple[Chain, int]]:
        chains = [self.full] if self.half is self.full else [self.full, self.half]
        return [] if piece in (HEAD, TAIL) else [(chain, int(piece)) for chain in chains]

    def groups(self, piece: str, modules: Sequence[str]) -> list[list[str]]:
        """The modules that a piece calls, in order of their calls, those of one input together."""
        return self._ranks.by_first(lambda: self._groups(piece, modules))

    def _groups(self, piece: str, modules: Sequence[str]) -> list[list[str]]:
        named = {name: self.full.module.get_submodule(name) for name in modules}
        seen = watch(named, lambda: self._run(self.full, piece, 0), stop=False)
        groups: list[tuple[Tensor, list[str]]] = []
        for name, x in seen.items():
            for known, members in groups:
                if known is x:
                    members.append(name)
                    break
            else:
                groups.append((x, [name]))
        return [members for _, members in groups]

    def inputs(
        self,
        piece: str,
        modules: Sequence[str],
        need: Need,
        *,
        thin: int = 1,
        cross: bool = True,
    ) -> dict[str, LayerInputs]:
        """What modules of a piece are given at every batch, in both models; one run a batch.

        Of a large model the runs for one module alone are gone on with by the next: of what was
        called before it no weight may change until `advance` or `begin_anew`.
        thin: of the batches to learn from only every so many are run; all of the held-out ones are.
        cross: whether covariances have E[x y^T] beside them.

        Raises:
            CalibrationError: an input is not finite.
        """
        found: dict[str, dict[bool, _Sums]] = {module: {} for module in modules}
        empty = partial(LayerStats.empty, need=need, cross=cross)
        for held_out in (False, True):
            chosen = self._chosen(held_out, thin)
            begun = not chosen
            for place in filter(self._ranks.owns, chosen):
                batch, rows = self._rows(piece, modules, place)
                if not begun:
                    self._begin(found, empty, chosen[0], held_out, rows)
                    begun = True
                for module, (x, y) in rows.items():
                    sums = found[module][held_out and x.shape[-1] <= WIDEST]
                    with self._adding(module):
                        sums.add(x, y, batch.weight, (held_out, place))
            if not begun:
                self._begin(found, empty, chosen[0], held_out, None)
        for module, sides in found.items():
            for sums in sides.values():
                with self._adding(module):
                    sums.settle()
        return {module: self._inputs(module, sides) for module, sides in found.items()}

    @contextmanager
    def _adding(self, module: str) -> Iterator[None]:
        try:
            with products_for(self.full):
                yield
        except ValueError as error:
            raise CalibrationError(f"{module}: {error}; no statistics can be had") from None

    def _chosen(self, held_out: bool, thin: int) -> list[int]:
        """Places, among those of all ranks, of the batches that are run."""
        return [
            place
            for place, held in enumerate(self._held_out)
            if held == held_out and (held or not place % thin)
        ]

    def _begin(
        self,
        found: Mapping[str, dict[bool, _Sums]],
        empty: Callable[..., LayerStats],
        place: int,
        held_out: bool,
        rows: Mapping[str, tuple[Tensor, Tensor]] | None,
    ) -> None:
        """Starts sums that are not there yet, around what the batch at a place looks like."""
        first = None if rows is None else {module: x for module, (x, _) in rows.items()}
        shifts = agreed_shifts(self._ranks, place % self._ranks.world, first)
        for module, shift_I in shifts.items():
            side = held_out and len(shift_I) <= WIDEST
            if side not in found[module]:
                device = layer_at(self.full.module, module).weight.device
                stats = empty(len(shift_I), device=device)
                stats.shift_I = shift_I.to(device)
                found[module][side] = _Sums(stats=stats)

    def _inputs(self, module: str, sides: Mapping[bool, _Sums]) -> LayerInputs:
        if False not in sides:
            raise CalibrationError(f"{module}: no calibration rows; give more prompts")
        stats = {side: sums.summed_up(self._ranks) for side, sums in sorted(sides.items())}
        return LayerInputs(
            fit=stats[False],
            held_out=stats.get(True),
            takes_bias=layer_at(self.full.module, module).bias is not None,
        )

    def _rows(
        self, piece: str, modules: Sequence[str], place: int
    ) -> tuple[Batch, dict[str, tuple[Tensor, Tensor]]]:
        """A batch of this rank, and by module the rows that count in both models."""
        index = place // self._ranks.world
        batch = self.batches[index]
        full = self._watched(self.full, piece, modules, index)
        alike = self.half is self.full
        half = full if alike else self._watched(self.half, piece, modules, index)
        rows = {}
        for module in modules:
            x = _counted(batch, full[module])
            rows[module] = x, x if half is full else _counted(batch, half[module])
        return batch, rows

    def _watched(
        self, chain: Chain, piece: str, modules: Sequence[str], index: int
    ) -> dict[str, Tensor]:
        named = {module: chain.module.get_submodule(module) for module in modules}
        if not chain.is_large or piece in (HEAD, TAIL) or len(named) > 1:
            return watch(named, lambda: self._run(chain, piece, index))
        key = chain is self.half, index
        if key not in self._memos:
            hidden = self._carries[index][0].hidden
            self._memos[key] = Memo(largest=2 * hidden.numel())
        with self._memos[key].used(chain.blocks[int(piece)]):
            return watch(named, lambda: self._run(chain, piece, index))

    def begin_anew(self, chain: Chain) -> None:
        """The piece's weights were changed: what one of the models has run of it is forgotten."""
        half = chain is self.half
        self._memos = {key: memo for key, memo in self._memos.items() if key[0] != half}

    def advance(self, piece: str) -> None:
        """Hands the states of both models on to the next piece."""
        results: list[tuple[Any, Any]] = []
        known: list[Tensor] = []
        for i in range(len(self.batches)):
            full = self._end(self.full, piece, i)
            half = full if self.half is self.full else self._end(self.half, piece, i)
            if piece == HEAD:
                full, half = _shared(full, known), _shared(half, known)
            results.append((full, half))
        if piece == TAIL:
            self.outputs = results
        else:
            self._carries = results

    def _end(self, chain: Chain, piece: str, index: int):  # type: ignore[no-untyped-def]
        """What `_run` returns, of a run that was begun before if there is one."""
        memo = self._memos.pop((chain is self.half, index), None)
        if memo is None:
            return self._run(chain, piece, index)
        with memo.used(chain.blocks[int(piece)]):
            return self._run(chain, piece, index)

    def _run(self, chain: Chain, piece: str, index: int):  # type: ignore[no-untyped-def]
        """A piece of one model on one batch: a Carry, or the output from the tail."""
        batch = self.batches[index]
        inputs = batch.full if chain is self.full else batch.half
        with products_for(self.full):
            if piece == HEAD:
                return chain.head(*inputs)
            carry = self._carries[index][0 if chain is self.full else 1]
            return chain.tail(carry, *inputs) if piece == TAIL else chain.block(int(piece), carry)


def _shared(carry: Carry, known: list[Tensor]) -> Carry:
    """The same; of arguments that equal a known one, such as a prompt's text, that one is held.

    What is one timestep's for every token is held for one token.
    """

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dim() > 2 and torch.equal(value, value[:, :1].expand_as(value)):
            value = value[:, :1].clone().expand_as(value)
        for other in known:
            if other.shape == value.shape and torch.equal(other, value):
                return other
        known.append(value)
        return value

    kwargs = {name: one(value) for name, value in carry.kwargs.items()}
    return replace(carry, args=tuple(map(one, carry.args)), kwargs=kwargs)


def _counted(batch: Batch, rows: Tensor) -> Tensor:
    """The rows of a module's input that count."""
    chosen = batch.rows_BS
    return rows if chosen is None or chosen.shape != rows.shape[:-1] else rows[chosen]
