"""YAML text into JSON values, without YAML's surprises; every problem keeps its line.

PyYAML keeps the last of duplicate keys, reads `no` as false, `012` as 10 and `12:30` as 750. Here
each of these is a problem that is reported, not a value.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

from hbxt_compress.errors import RecipeError

__all__ = ["PLAIN_FLOAT", "Place", "Reading", "compose", "dump"]

PLAIN_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
Place = tuple[int | str, ...]  # keys and indices from the root of the document

_MOST_BYTES = 1_000_000
_MOST_NODES = 100_000
_MOST_CHARACTERS = 200  # of a place that a message names
_YAML = "tag:yaml.org,2002:"
_HALVES = re.compile("[\ud800-\udfff]")
_PLAIN_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")


def dump(document: object) -> str:
    """JSON values as YAML, keys in their order, a line for each short value."""
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)


def compose(path: Path) -> yaml.Node:
    """The root node of a YAML file, a mapping."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise RecipeError(
                f"{path}: larger than {_MOST_BYTES:,} bytes; this is not a settings file"
            )
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # a NUL or half a character in the name itself
        raise RecipeError(f"{str(path)!r}: no name of a file ({error})") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        hint = "; indent with spaces, not tabs" if "'\\t'" in str(error.problem) else ""
        raise RecipeError(f"{path}:{line}: not valid YAML: {error.problem}{hint}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"{path}:{line}: not valid YAML: a character that YAML forbids"
        ) from error
    except RecursionError as error:
        raise RecipeError(f"{path}: nested too deeply") from error
    if node is None:
        raise RecipeError(f"{path}: the file is empty")
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(
            f"{path}:{node.start_mark.line + 1}: must be a mapping (lines of `key: value`)"
        )
    return node


class Reading:
    """The JSON value of a YAML document, and its problems as (line, text)."""

    def __init__(self, root: yaml.Node) -> None:
        self.problems: list[tuple[int, str]] = []
        self._root = root
        self._bad: set[Place] = set()
        self._n_nodes = 0
        self.document = self._value(root, (), ())

    def reject(self, place: Place, text: str) -> None:
        """Adds a problem, at its line; not where YAML already had one."""
        if any(place[: len(bad)] == bad for bad in self._bad):
            return
        node = at = self._root
        for segment in place:
            below = _below(node, segment)
            if below is None:
                break
            at, node = below
        self._add(at, place, text)

    def _value(self, node: yaml.Node, place: Place, above: tuple[int, ...]) -> Any:
        """The JSON value of a node; `above` holds the ids of the nodes it lies in."""
        self._n_nodes += 1
        if id(node) in above or self._n_nodes > _MOST_NODES:
            if self._n_nodes <= _MOST_NODES + 1:
                self._add(
                    node,
                    place,
                    "an alias that contains itself, or aliases that multiply without end",
                )
            return None
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, place)
        if node.tag not in (_YAML + "map", _YAML + "seq"):
            return self._add(node, place, f"custom tag {node.tag} is not allowed; remove it")
        above = (*above, id(node))
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*place, i), above) for i, item in enumerate(node.value)]
        found: dict[str, Any] = {}
        for key_node, item in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _YAML + "str":
                self._add(
                    key_node,
                    place,
                    f"the key {str(key)[:40]!r} is not text; quote it or write the keys out",
                )
            elif _HALVES.search(key):
                self._add(key_node, place, "a key with half a character, a surrogate")
            elif key in found:
                self._add(
                    key_node,
                    (*place, key),
                    "duplicate key; YAML would silently keep the last",
                    hide=False,
                )
            else:
                found[key] = self._value(item, (*place, key), above)
        return found

    def _scalar(self, node: yaml.ScalarNode, place: Place) -> Any:
        kind, text = node.tag.removeprefix(_YAML), node.value
        if _HALVES.search(text):
            return self._add(node, place, "half a character, a surrogate without its pair")
        if kind in ("str", "null"):
            return text if kind == "str" else None
        if kind not in ("bool", "int", "float"):
            what = "a date" if kind == "timestamp" else f"of the custom tag {node.tag}"
            return self._add(node, place, f"{text!r} is {what} to YAML; quote it if text is meant")
        try:
            value = SafeConstructor().construct_object(node)
        except (ValueError, KeyError, OverflowError):
            return self._add(node, place, f"{text!r} is not a valid {kind}")
        if kind == "bool" and text.lower() not in ("true", "false"):
            return self._add(
                node, place, f"YAML reads {text} as {str(value).lower()}; write that, or quote it"
            )
        pattern = _PLAIN_INT if kind == "int" else PLAIN_FLOAT
        if kind == "float" and not math.isfinite(value):
            return self._add(node, place, f"{text} is not a finite number")
        if kind != "bool" and pattern.fullmatch(text) is None:
            return self._add(
                node, place, f"YAML reads {text} as {value}; write {value}, or quote it"
            )
        return value

    def _add(self, node: yaml.Node, place: Place, text: str, *, hide: bool = True) -> None:
        """Adds a problem; `hide` keeps pydantic's view of the same place out of the list."""
        if hide:
            self._bad.add(place)
        where = "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in place).lstrip(".")
        where = where if len(where) < _MOST_CHARACTERS else f"{where[:_MOST_CHARACTERS]}..."
        self.problems.append((node.start_mark.line + 1, f"{where}: {text}" if where else text))


def _below(node: yaml.Node, segment: int | str) -> tuple[yaml.Node, yaml.Node] | None:
    """An item of a node, after the node whose line a reader should look at: its key, if any."""
    if isinstance(node, yaml.SequenceNode) and isinstance(segment, int):
        return node.value[segment], node.value[segment]
    if isinstance(node, yaml.MappingNode):
        for key, item in node.value:
            if key.value == segment:
                return key, item
    return None
