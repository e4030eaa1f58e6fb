"""Mutations of JSON documents and of YAML text: what a user, a bug or an attacker may write.

Everything is drawn from the generator that is given, so the same one makes the same file.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, Final

import yaml

__all__ = ["mutated_json", "mutated_settings", "mutated_value", "mutated_yaml"]

_DEEP: Final = "<deep>"  # stands for nesting that json.dumps itself could not write
_TWICE: Final = "<twice>"  # before a key that is to stand there twice
ODD: Final[tuple[object, ...]] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**30),
    0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), float("-inf"),
    "", " ", "x", "NaN", "1", "1e3", "null", "x" * 20_000, "\x00", "a\x00b", "a\nb", "\ud800",
    "\u202eevil", "\U0001f600", "[/bold]", "[red]", "{0}%s%d", "../../bystander/result.txt",
    "/etc/passwd", "..", ".", "~", "C:\\x", "-rf", "*", "{a,b", "[", "(" * 40 + "a+" + ")+" * 40,
    [], {}, [[]], {"": 1}, {"a": {}}, [None], list(range(3000)), [1, 2, 3, 4], ["a"], _DEEP,
)  # fmt: skip
"""values that belong nowhere"""


def mutated_json(random: Random, content: bytes) -> bytes:
    """A JSON file with one to three changes to its values; some that only text can have."""
    document = json.loads(content)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        document = mutated_value(random, document)
    return _dumped(document, ascii_only=random.random() < 0.5)


def mutated_settings(random: Random, content: bytes) -> bytes:
    """A YAML file as JSON, which is YAML, changed in its values: most of it stays valid."""
    changed = mutated_json(random, json.dumps(yaml.safe_load(content)).encode())
    return re.sub(rb"(?<=[ \n])(-?\d+)e([-+]\d+)", rb"\1.0e\2", changed)  # numbers to YAML, too


def mutated_value(random: Random, document: Any) -> Any:
    """A copy with one value removed, replaced, renamed, moved, doubled or added."""
    document = copy.deepcopy(document)
    places = list(_places(document))
    if not places or random.random() < 0.03:
        return random.choice(ODD)
    parent, key = random.choice(places)
    act = random.choice(_ACTS)
    act(random, parent, key)
    return document


def mutated_yaml(random: Random, content: bytes) -> bytes:
    """A YAML file changed as text: lines, indentation, anchors, tags, and what is no text."""
    lines = content.decode().splitlines()
    act = random.choice(_LINE_ACTS)
    return act(random, lines)


def _dumped(document: Any, *, ascii_only: bool) -> bytes:
    """JSON text, with nesting and duplicate keys where the marks stand."""
    text = json.dumps(document, ensure_ascii=ascii_only, indent=1)
    depth = 100_000
    text = text.replace(f'"{_DEEP}"', "[" * depth + "]" * depth).replace(f'"{_TWICE}', '"')
    return text.encode("utf-8", "surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of every value below the root."""
    if not isinstance(value, dict | list):
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, below in list(items):
        yield value, key
        if isinstance(below, dict | list):
            yield from _places(below)


def _remove(random: Random, parent: Any, key: Any) -> None:
    del parent[key]


def _replace(random: Random, parent: Any, key: Any) -> None:
    parent[key] = copy.deepcopy(random.choice(ODD))


def _other_number(random: Random, parent: Any, key: Any) -> None:
    old = parent[key]
    if isinstance(old, int | float) and not isinstance(old, bool):
        parent[key] = random.choice((-old, old + 1, old - 1, old * 1000, old / 2, str(old), [old]))
    else:
        _replace(random, parent, key)


def _rename(random: Random, parent: Any, key: Any) -> None:
    if isinstance(parent, dict):
        names = (f"{key}x", key.upper(), "", "__class__", f" {key}", "\ud800", "x" * 5000)
        parent[random.choice(names)] = parent.pop(key)
    else:
        parent[key] = {str(key): parent[key]}


def _add(random: Random, parent: Any, key: Any) -> None:
    new = copy.deepcopy(random.choice(ODD))
    if isinstance(parent, dict):
        parent[random.choice(("extra", "use", "sha256", "\U0001f600", "_name_or_path"))] = new
    else:
        parent.insert(key, new)


def _double(random: Random, parent: Any, key: Any) -> None:
    if isinstance(parent, dict):
        parent[f"{_TWICE}{key}"] = copy.deepcopy(random.choice((parent[key], *ODD[:20])))
    else:
        parent.insert(key, copy.deepcopy(parent[key]))


def _swap(random: Random, parent: Any, key: Any) -> None:
    other = random.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    parent[key], parent[other] = parent[other], parent[key]


def _wrap(random: Random, parent: Any, key: Any) -> None:
    parent[key] = random.choice(([parent[key]], {"value": parent[key]}, json.dumps(parent[key])))


_Act = Callable[[Random, Any, Any], None]
_ACTS: Final[tuple[_Act, ...]] = (
    _remove, _remove, _replace, _replace, _replace, _other_number, _other_number, _rename, _add,
    _double, _swap, _wrap,
)  # fmt: skip


_ODD_YAML: Final = (
    "!!python/object/apply:os.system ['touch ../../bystander/hacked']",
    "!!binary aGVsbG8=", "!custom x", "2020-01-01", "12:30", "0x1f", "0o17", "1_000", ".inf",
    ".nan", "no", "~", "*unknown", "&a [*a]", "{<<: *a}", "'unclosed", '"\\x00"', '"\\ud800"',
    "|\n  text\n", ">-\n text", "? x", "- - - x", "%", "@", "`", "1" * 5000, "9" * 400,
    "[" * 3000, "{a: " * 3000, "x" * 200_000, "\u202e", "\U0001f600", "..", "!!float x", "!!int x",
    "{use: }", "[/bold]",
)  # fmt: skip


def _line(random: Random, lines: list[str]) -> int:
    return random.randrange(len(lines))


def _joined(lines: list[str]) -> bytes:
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def _without_line(random: Random, lines: list[str]) -> bytes:
    del lines[_line(random, lines)]
    return _joined(lines)


def _line_twice(random: Random, lines: list[str]) -> bytes:
    i = _line(random, lines)
    return _joined([*lines[: i + 1], *lines[i:]])


def _indented(random: Random, lines: list[str]) -> bytes:
    i = _line(random, lines)
    lines[i] = random.choice(("\t", " ", "   ", "- ", "\u00a0", "#")) + lines[i]
    return _joined(lines)


def _other_value(random: Random, lines: list[str]) -> bytes:
    with_value = [i for i, line in enumerate(lines) if ": " in line] or [0]
    i = random.choice(with_value)
    lines[i] = f"{lines[i].partition(': ')[0]}: {random.choice(_ODD_YAML)}"
    return _joined(lines)


def _other_key(random: Random, lines: list[str]) -> bytes:
    i = _line(random, lines)
    lines[i] = f"{random.choice(('? [a]', '1', 'null', '<<', '*a', '!!str x', '.', ''))}: x"
    return _joined(lines)


def _bomb(random: Random, lines: list[str]) -> bytes:
    """Nine aliases of nine aliases...: a billion items in a few hundred bytes."""
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for i in range(1, 10):
        bomb.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]")
    at = _line(random, lines) if random.random() < 0.5 else len(lines)
    return _joined([*bomb, *lines] if random.random() < 0.5 else [*lines[:at], *bomb, *lines[at:]])


def _documents(random: Random, lines: list[str]) -> bytes:
    i = _line(random, lines)
    mark = random.choice(("---", "...", "%YAML 9.9", "%TAG ! x", "--- !!set", "# \x07"))
    return _joined([*lines[:i], mark, *lines[i:]])


def _encoded(random: Random, lines: list[str]) -> bytes:
    text = "\n".join(lines) + "\n"
    codec = random.choice(("utf-16", "utf-16-le", "utf-32", "latin-1", "utf-8-sig", "cp037"))
    text = text if codec != "latin-1" else text.replace("a", "\xe4", 3)
    return text.replace("\n", random.choice(("\n", "\r", "\r\n", "\x85"))).encode(codec, "replace")


def _other_root(random: Random, lines: list[str]) -> bytes:
    roots = ("", "# nothing", "- a\n- b", "text", "null", "{}", "[]", "!!map {}", "&a {b: *a}",
             "{" * 5000, "? " * 3000, "- " * 3000 + "x", "\x00", "\ufeff", "a: b: c")  # fmt: skip
    return random.choice(roots).encode()


_LINE_ACTS: Final[tuple[Callable[[Random, list[str]], bytes], ...]] = (
    _without_line, _line_twice, _indented, _other_value, _other_value, _other_value, _other_key,
    _bomb, _documents, _encoded, _other_root,
)  # fmt: skip
