"""The heat map: blocks by roles, decibels in text, one colour a level."""

from __future__ import annotations

import pytest

from hbxt_compress.render.heatmap import LEVELS, Cell, heat_map
from tests.shown_report import layers


def _layer(name: str, error: float | None, fmt: str = "int4-g64") -> dict[str, object]:
    return {
        "name": name, "format": fmt, "activations": "keep", "how": "rtn", "reason": "rule 2",
        "error": error, "held_out": error, "limit_db": 3.0, "bytes_before": 1000,
        "bytes_after": 300,
    }  # fmt: skip


def _cells(found: object) -> dict[str, Cell]:
    return {
        cell.name: cell
        for component in found.components  # type: ignore[attr-defined]
        for cell in (*component.others, *(c for grid in component.grids for c in grid.cells))
    }


@pytest.mark.parametrize("n_blocks", [6, 40])
def test_every_layer_has_one_cell(n_blocks: int) -> None:
    given = layers(n_blocks)
    found = heat_map(given)
    assert _cells(found).keys() == {str(layer["name"]) for layer in given}
    transformer, text_encoder, vae = found.components
    (grid,) = transformer.grids
    assert grid.name == "blocks"
    assert [block for block, _ in grid.rows] == [str(k) for k in range(n_blocks)]
    assert len(grid.roles) == 10
    assert all(len(row) == 10 for _, row in grid.rows)
    assert grid.format == "int4-g64"
    assert len(transformer.others) == 3
    assert [grid.name for grid in text_encoder.grids] == ["encoder.block"]
    assert (vae.grids, len(vae.others)) == ((), 1)


def test_a_role_that_a_block_lacks_is_empty_and_blocks_are_counted_not_spelt() -> None:
    found = heat_map([
        _layer("t/blocks.10.a", 0.1), _layer("t/blocks.2.a", 0.1), _layer("t/blocks.2.b", 0.1),
        _layer("t/alone.0.a", 0.1),
    ])  # fmt: skip
    (component,) = found.components
    (grid,) = component.grids
    assert [block for block, _ in grid.rows] == ["2", "10"]
    assert [cell and cell.name for cell in grid.rows[1][1]] == ["t/blocks.10.a", None]
    assert [cell.name for cell in component.others] == ["t/alone.0.a"]


def test_levels_grow_with_the_error_and_the_legend_says_how() -> None:
    errors = [10 ** (-db / 10) for db in (31.0, 29.9, 25.1, 20.0, 12.5)]
    found = heat_map([_layer(f"t/blocks.{i}.a", error) for i, error in enumerate(errors)])
    cells = _cells(found)
    assert [cells[f"t/blocks.{i}.a"].level for i in range(5)] == [0, 1, 2, 4, 6]
    assert [cells[f"t/blocks.{i}.a"].text for i in range(5)] == [
        "-31.0", "-29.9", "-25.1", "-20.0", "-12.5",
    ]  # fmt: skip
    assert found.legend[0] == "-33 to -30 dB"
    assert found.legend[6] == "-15 to -12 dB"
    assert len(found.legend) == LEVELS


@pytest.mark.parametrize("span", [0.0, 0.01, 1.0, 6.9, 7.0, 33.0, 200.0, 5000.0])
def test_every_span_of_errors_fits_the_levels(span: float) -> None:
    given = [_layer(f"t/blocks.{i}.a", 10 ** (-(2 + i / 4 * span) / 10)) for i in range(5)]
    found = heat_map([one for one in given if one["error"]])
    levels = [cell.level for cell in _cells(found).values()]
    assert all(level is not None and 0 <= level < len(found.legend) <= LEVELS for level in levels)


def test_what_has_no_error_has_no_colour_but_a_word() -> None:
    found = heat_map([
        _layer("t/a", None, "keep"), _layer("t/b", 0.0), _layer("t/c", None), _layer("t/d", 0.01),
    ])  # fmt: skip
    cells = _cells(found)
    assert [(cells[f"t/{k}"].text, cells[f"t/{k}"].level) for k in "abcd"] == [
        ("kept", None), ("exact", None), ("int4-g64", None), ("-20.0", 0),
    ]  # fmt: skip
    assert cells["t/a"].title.startswith("t/a: kept as it is, no error,")
    assert cells["t/c"].title.startswith("t/c: int4-g64, no error,")
    assert cells["t/d"].title == (
        "t/d: error -20.0 dB, int4-g64, -20.0 dB on held-out prompts, "
        "3.0 dB above the limit of its bits, 1.00 kB to 300 B, rule 2"
    )


def test_formats_that_differ_are_named_cell_by_cell() -> None:
    found = heat_map([
        _layer("t/blocks.0.a", 0.1), _layer("t/blocks.1.a", 0.1),
        _layer("t/blocks.1.b", None, "fp16"),
    ])  # fmt: skip
    assert found.components[0].grids[0].format == "int4-g64"
    assert found.components[0].grids[0].cells[2].text == "fp16"
    found = heat_map([_layer("t/blocks.0.a", 0.1, "int8"), _layer("t/blocks.1.a", 0.1)])
    assert found.components[0].grids[0].format == ""
    assert not heat_map([])
    assert heat_map([]).legend == ()
