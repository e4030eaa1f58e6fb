"""CountedNames: what values would be called if more blocks had been traced than were.

torch's exporter and onnx_ir count: mul_7 in one block is mul_20 in the next. Some of these names
reach the files, as parts of the names of constants.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import zip_longest

import onnx_ir as ir

from hbxt_compress.graph.alike import BlocksDiffer, Match
from hbxt_compress.graph.builder import name_of

__all__ = ["CountedNames"]

_NUMBERS = re.compile(r"(\d+)")
_NAMELESS = ("val_", "")  # around the number that onnx_ir gives to a value without a name
Texts = tuple[str, ...]


class CountedNames:
    """How the numbers in names grow from block to block, learned from two that follow each other.

    match: the blocks as they were traced.

    Raises:
        BlocksDiffer: they do not grow evenly.
    """

    def __init__(self, match: Match) -> None:
        self._steps: dict[Texts, tuple[int, ...]] = {}  # by what stands between the numbers
        self._from: dict[Texts, tuple[int, ...]] = {}  # those of the second of the two blocks
        self.learn(match)

    def learn(self, match: Match) -> None:
        """Learns more names, those that an optimizer made of others."""
        for node, other in zip(match.nodes, match.others, strict=True):
            for value, counterpart in zip(node.outputs, other.outputs, strict=True):
                a, b = name_of(value), name_of(counterpart)
                (texts, numbers), (there, counted) = _parted(a), _parted(b)
                step = tuple(y - x for x, y in zip(numbers, counted, strict=False))
                if texts != there or self._steps.setdefault(texts, step) != step:
                    raise BlocksDiffer(f"{a} and {b} are not counted like others")
                self._from[texts] = min(counted, self._from.get(texts, counted))

    def later(self, name: str, n_blocks: int) -> str:
        """What is called so in one block, so many blocks later."""
        texts, numbers = _parted(name)
        steps = self._steps.get(texts)
        if steps is None:
            return name
        counted = [str(n + n_blocks * step) for n, step in zip(numbers, steps, strict=True)]
        return "".join(part for pair in zip_longest(texts, counted, fillvalue="") for part in pair)

    def count_on(self, graph: ir.Graph, initializers: Sequence[ir.Value], n_blocks: int) -> None:
        """Renames all from the second block on as if it had been traced so many blocks later.

        The graph calls its next nameless values accordingly.
        """
        made = (value for node in graph for value in node.outputs)
        for value in (*made, *initializers):
            texts, numbers = _parted(name_of(value))
            if texts in self._from and numbers >= self._from[texts]:
                value.name = self.later(name_of(value), n_blocks)
        n_skipped = n_blocks * self._steps.get(_NAMELESS, (0,))[0]
        nameless = ir.Node("", "Identity", [], num_outputs=n_skipped)
        graph.append(nameless)
        graph.remove(nameless)


def _parted(name: str) -> tuple[Texts, tuple[int, ...]]:
    """The texts around a name's numbers, and the numbers."""
    parts = _NUMBERS.split(name)
    return tuple(parts[::2]), tuple(int(number) for number in parts[1::2])
