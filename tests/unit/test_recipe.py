from __future__ import annotations

from pathlib import Path

import pytest

from hbxt_compress.algorithms.rtn import Rtn
from hbxt_compress.errors import RecipeError
from hbxt_compress.recipe import Recipe, Rule, load_recipe

_RECIPE = """\
name: mine
summary: s
calibration: tiny
rules:
  - {match: "a/*", weights: int4-g64}
  - {match: "*", weights: keep, why: rest}
round: {use: rtn, search: none}
accept: {suite: tiny, limits: {psnr: 20.0}}
"""


def _load(folder: Path, *changes: tuple[str, str]) -> Recipe:
    text = _RECIPE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "mine.yaml"
    path.write_text(text)
    return load_recipe(str(path))


def test_a_recipe_is_read_with_its_algorithm_built(tmp_path: Path) -> None:
    recipe = _load(tmp_path)
    assert recipe.round == Rtn(search="none")
    assert recipe.rules[0] == Rule(match="a/*", weights="int4-g64")
    assert recipe.accept.limits == {"psnr": 20.0}


def test_the_digest_changes_with_anything_that_is_said(tmp_path: Path) -> None:
    plain = _load(tmp_path).digest
    assert _load(tmp_path).digest == plain
    assert _load(tmp_path, ("search: none", "search: mse")).digest != plain
    assert _load(tmp_path, ("psnr: 20.0", "psnr: 20.5")).digest != plain
    # a default that is left out says the same as one that is written
    left_out = _load(tmp_path, ("{use: rtn, search: none}", "{use: rtn}")).digest
    assert left_out == _load(tmp_path, ("search: none", "search: mse")).digest


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "int4-g64",
            "int4-g46",
            ":5: rules[0].weights: unknown format 'int4-g46' (did you mean 'i",
        ),
        ('"a/*"', '"a/{b"', ":5: rules[0].match: pattern 'a/{b': a '{' is never closed"),
        ('"a/*"', '""', ":5: rules[0].match: "),
        (", why: rest", "", ":6: rules[1].why: missing; say why"),
        (", why: rest", ", why: ' '", ":6: rules[1].why: missing; say why"),
        ("use: rtn", "use: rtm", ":7: round.use: unknown name 'rtm' (did you mean 'rtn'?)"),
        ("search: none", "serch: none", ":7: round.serch: unknown key (did you mean 'search'?)"),
        (
            "search: none",
            "search: nine",
            ":7: round.search: must be 'none', 'mse' or 'weighted', not 'nine' ",
        ),
        ("round: {use: rtn, search: none}\n", "", ":1: round: missing; rules ask for int4-g64"),
        ("int4-g64", "fp16", ":7: round: nothing to round"),
        ("calibration: tiny", "calibration: tyni", ":3: calibration: unknown prompt set 'tyni' (d"),
        ("suite: tiny", "suite: tny", ":8: accept.suite: unknown suite 'tny' (did you mean 'tiny'"),
        ("psnr: 20.0", "pnsr: 20.0", ":8: accept.limits.pnsr: unknown metric 'pnsr' (did you mean"),
        ("psnr: 20.0", "psnr: 2e1", ":8: accept.limits.psnr: '2e1' is text to YAML; write 2.0e+1"),
        ("name: mine", "name: my/recipe", ":1: name: 'my/recipe' does not match"),
        ("summary: s\n", "", ":1: summary: missing"),
        ("weights: keep, why: rest", "weights: int8-channel", ":4: rules: the main format is int4"),
    ],
)
def test_one_mistake_gives_one_message(tmp_path: Path, old: str, new: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        _load(tmp_path, (old, new))
    lines = str(caught.value).splitlines()
    assert len(lines) == 1, lines
    assert lines[0].removeprefix(str(tmp_path / "mine.yaml")).startswith(expected)


def test_mistakes_everywhere_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        _load(
            tmp_path,
            ("summary: s", "sumary: s"),
            ("int4-g64", "int5"),
            (", why: rest", ""),
            ("search: none", "search: 1e-3, deep: yes"),
            ("psnr: 20.0", "psnr: 20.0, psnr: 21.0"),
        )
    places = [line.split(":")[1] for line in str(caught.value).splitlines()]
    assert places == ["1", "2", "5", "6", "7", "7", "8"]


def test_departing_from_the_main_format_is_fine_with_a_reason(tmp_path: Path) -> None:
    change = ("weights: keep, why: rest", "weights: int8-channel, why: too coarse in 4 bit")
    assert _load(tmp_path, change).rules[1].weights == "int8-channel"
