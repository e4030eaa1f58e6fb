"""How the outside talks about weights: names, shapes, and patterns that select them.

A layer's name is `<component>/<module path>`, for example `transformer/blocks.3.attn1.to_q`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from typing import Literal, NewType

__all__ = ["Depth", "LayerKind", "LayerName", "LayerSpec", "Pair", "matches"]

LayerName = NewType("LayerName", str)
LayerKind = Literal["linear", "conv2d", "conv3d", "embedding"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One weight that a rule may select, read from file headers alone.

    shape is torch's, output features first; block is the index of the transformer block it belongs
    to, or None.
    """

    name: LayerName
    kind: LayerKind
    shape: tuple[int, ...]
    dtype: str
    block: int | None

    @property
    def component(self) -> str:
        return self.name.split("/", 1)[0]

    @property
    def module(self) -> str:
        return self.name.split("/", 1)[1]

    @property
    def parameter(self) -> str:
        """The weight's name inside its component's state dict."""
        return f"{self.module}.weight"

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two linears of a block, by module path, and the features between them.

    joint: heads (tokens mix them linearly, head by head) or hidden (each goes through a function of
    its own). n_heads: how many runs of neighbouring features must stay apart.
    """

    first: str
    second: str
    joint: Literal["heads", "hidden"]
    n_heads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """How a component's files say how many blocks it has, and how large a vocabulary.

    prefix: what the names of a block's tensors begin with, its index next. count: the key of
    config.json with their number. tables: tensors with a row for each word; rows: the key with how
    many, "" if there are none.
    """

    prefix: str
    count: str
    tables: tuple[str, ...] = ()
    rows: str = ""


def matches(pattern: str, name: str) -> bool:
    """Whether a rule's pattern selects a layer: `*` any run of characters, `{a,b}` alternatives.

    Raises:
        ValueError: braces that do not close, or more stars than any name needs.
    """
    return _compiled(pattern).fullmatch(name) is not None


_MOST_STARS, _MOST_CHARACTERS = 5, 1000  # matching takes time that grows with each star


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    out, depth = [], 0
    pattern = re.sub(r"\*+", "*", pattern)
    if len(pattern) > _MOST_CHARACTERS or pattern.count("*") > _MOST_STARS:
        raise ValueError(
            f"pattern {pattern[:60]!r}: has {pattern.count('*')} stars and {len(pattern)} "
            f"characters, at most {_MOST_STARS} and {_MOST_CHARACTERS} will do"
        )
    for character in pattern:
        if character == "*":
            out.append(".*")
        elif character == "{":
            out.append("(?:")
            depth += 1
        elif character == "}" and depth:
            out.append(")")
            depth -= 1
        elif character == "," and depth:
            out.append("|")
        else:
            out.append(re.escape(character))
    if depth:
        raise ValueError(f"pattern {pattern!r}: a '{{' is never closed")
    return re.compile("".join(out))
