"""Heat map: the output error of every layer, blocks as rows and roles in a block as columns.

Numbers first, colours beside them: every cell says its decibels in text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hbxt_compress.render.table import decibel, power_db, size

__all__ = ["LEVELS", "Cell", "Component", "Grid", "HeatMap", "heat_map"]

LEVELS = 7
_STEPS_DB = (1, 2, 3, 5, 6, 10, 15, 20, 30, 50, 100)
_IN_A_BLOCK = re.compile(r"(?P<list>.+?)\.(?P<block>\d+)\.(?P<role>.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One layer. text: its error in dB, or else its format; level: 0, good, to 6, or None if so.

    title: all that is known of it in one line.
    """

    name: str
    text: str
    level: int | None
    format: str
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Blocks of one list of modules. rows: (block, a cell or None for each role).

    format: what all of its rounded layers are stored in, nothing where they differ.
    """

    name: str
    roles: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    format: str

    @property
    def cells(self) -> list[Cell]:
        """All that are there."""
        return [cell for _, row in self.rows for cell in row if cell is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """A component's grids, and its layers that stand in no list of blocks."""

    name: str
    grids: tuple[Grid, ...]
    others: tuple[Cell, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """legend: what each level used means, from low to high; empty where nothing was measured."""

    components: tuple[Component, ...]
    legend: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.components)


def heat_map(layers: Sequence[Mapping[str, object]]) -> HeatMap:
    """The heat map of a manifest's layers, in their order; components without an error too."""
    errors = [db for layer in layers if (db := _error_db(layer)) is not None]
    start, step = _levels(errors)
    parts: dict[str, list[tuple[str, Cell]]] = {}
    for layer in layers:
        component, _, module = str(layer["name"]).partition("/")
        parts.setdefault(component, []).append((module, _cell(layer, start, step)))
    used = math.floor((max(errors) - start) / step) + 1 if errors else 0
    legend = tuple(
        f"{start + k * step} to {start + (k + 1) * step} dB" for k in range(min(used, LEVELS))
    )
    return HeatMap(components=tuple(_component(*each) for each in parts.items()), legend=legend)


def _error_db(layer: Mapping[str, object]) -> float | None:
    error = layer.get("error")
    if isinstance(error, int | float) and error > 0:
        return 10 * math.log10(error)
    return None


def _levels(errors: Sequence[float]) -> tuple[int, int]:
    """Where the lowest level starts, and how wide each is, in dB."""
    if not errors:
        return 0, 1
    for step in _STEPS_DB:
        start = math.floor(min(errors) / step) * step
        if max(errors) < start + LEVELS * step:
            break
    return start, step


def _cell(layer: Mapping[str, object], start: int, step: int) -> Cell:
    name, error, fmt = str(layer["name"]), _error_db(layer), str(layer["format"])
    level = None if error is None else min(LEVELS - 1, math.floor((error - start) / step))
    measured = _number(layer.get("error"))
    text = power_db(measured) if measured is not None else "kept" if fmt == "keep" else fmt
    activations = str(layer.get("activations", "keep"))
    told = ["kept as it is" if fmt == "keep" else fmt]
    if activations != "keep":
        told[0] += f" with {activations} input"
    told.insert(
        0 if measured is not None else 1, "no error" if measured is None else f"error {text}"
    )
    if (held_out := _number(layer.get("held_out"))) is not None:
        told.append(f"{power_db(held_out)} on held-out prompts")
    if (limit := _number(layer.get("limit_db"))) is not None and measured is not None:
        told.append(f"{decibel(limit)} above the limit of its bits")
    told.append(f"{size(_bytes(layer, 'bytes_before'))} to {size(_bytes(layer, 'bytes_after'))}")
    told.append(str(layer.get("reason", "")))
    return Cell(
        name=name,
        text=text.removesuffix(" dB"),
        level=level,
        format=fmt,
        title=f"{name}: {', '.join(told)}",
    )


def _component(name: str, layers: Sequence[tuple[str, Cell]]) -> Component:
    lists: dict[str, dict[str, dict[str, Cell]]] = {}
    for module, cell in layers:
        if found := _IN_A_BLOCK.fullmatch(module):
            blocks = lists.setdefault(found["list"], {})
            blocks.setdefault(found["block"], {})[found["role"]] = cell
    shown = {key: blocks for key, blocks in lists.items() if len(blocks) > 1}
    inside = {
        cell.name for blocks in shown.values() for row in blocks.values() for cell in _of(row)
    }
    return Component(
        name=name,
        grids=tuple(_grid(*each) for each in shown.items()),
        others=tuple(cell for _, cell in layers if cell.name not in inside),
    )


def _of(row: Mapping[str, Cell]) -> Iterator[Cell]:
    yield from row.values()


def _grid(name: str, blocks: Mapping[str, Mapping[str, Cell]]) -> Grid:
    roles = tuple(dict.fromkeys(role for row in blocks.values() for role in row))
    rounded = [cell for row in blocks.values() for cell in _of(row) if cell.level is not None]
    formats = {cell.format for cell in rounded}
    return Grid(
        name=name,
        roles=roles,
        rows=tuple(
            (block, tuple(blocks[block].get(role) for role in roles))
            for block in sorted(blocks, key=int)
        ),
        format=next(iter(formats)) if len(formats) == 1 else "",
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _bytes(layer: Mapping[str, object], key: str) -> int:
    value = layer.get(key)
    return value if isinstance(value, int) else 0
