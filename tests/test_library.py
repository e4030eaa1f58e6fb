"""Every file of the library is valid, says what it is, and stands in its folder's README."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from hbxt_compress import library
from hbxt_compress.library import Shelf
from hbxt_compress.metrics import METRICS
from hbxt_compress.prompts import load_prompts
from hbxt_compress.recipe import load_recipe
from hbxt_compress.reference.shapes import Split, caption, scene
from hbxt_compress.suite import load_suite

RECIPES = library.names("recipes")
_WRITTEN: dict[str, tuple[Split, int]] = {"captions": ("train", 4)}  # all others: calibration, 1
SETS = library.names("calibration")
SUITES = library.names("eval/suites")


def test_the_library_has_what_the_product_promises() -> None:
    assert {"fp32", "fp16", "w8a16", "w8a8", "w4a16", "tiny"} <= set(RECIPES)
    assert {"w4a16-fast", "w4a16-budget"} <= set(RECIPES)
    assert {"standard", "tiny"} <= set(SETS)
    assert {"standard", "tiny"} <= set(SUITES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_short_valid_and_named_after_its_file(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert len(recipe.digest) == 64
    assert len(library.find("recipes", name).read_text().splitlines()) <= 40
    last = recipe.rules[-1]
    assert last.match == "*"
    assert last.why or recipe.name == "fp32", "what is left over needs a reason"


def test_recipes_differ() -> None:
    assert len({load_recipe(name).digest for name in RECIPES}) == len(RECIPES)


@pytest.mark.parametrize("name", SETS)
def test_every_prompt_set_is_what_the_generator_says(name: str) -> None:
    """Prompts to choose with may stand last, so that two sets can share them."""
    found = load_prompts(name)
    split, n_ways = _WRITTEN.get(name, ("calibration", 1))
    captions = list(_captions(split, len(found.prompts), n_ways))
    assert found.name == name
    if found.statistics is not None:
        n = found.statistics
        captions[n:] = captions[n + found.held_out :] + captions[n : n + found.held_out]
    assert list(found.prompts) == captions


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_is_what_the_generator_says(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    assert suite.prompts == _captions("evaluation", len(suite.prompts))


def test_no_prompt_is_both_calibrated_on_and_evaluated() -> None:
    seen = {prompt for name in SETS for prompt in load_prompts(name).prompts}
    judged = {prompt for name in SUITES for prompt in load_suite(name).prompts}
    assert seen
    assert judged
    assert not seen & judged


def test_the_clip_set_in_the_readme_is_valid(tmp_path: Path) -> None:
    page = (library.folder("calibration") / "README.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    path, names = tmp_path / "my-clips.yaml", [f"{i}.mp4" for i in range(5)]
    path.write_text(text)
    (tmp_path / "clips").mkdir()
    for name in names:
        (tmp_path / "clips" / name).write_bytes(name.encode())
    rows = "".join(f"{name},clip {name}\n" for name in names)
    (tmp_path / "clips" / "metadata.csv").write_text(f"file_name,caption\n{rows}")
    found = load_prompts(str(path))
    assert found.name == path.stem
    assert found.prompts == tuple(f"clip {name}" for name in names)


def test_promises_can_be_kept_or_broken_by_their_suite() -> None:
    for name in RECIPES:
        accept = load_recipe(name).accept
        missing = set(accept.limits) - set(load_suite(accept.suite).metrics)
        assert not missing, f"{name}: {accept.suite} does not measure {missing}"


def test_the_standard_suite_measures_every_kind_of_metric() -> None:
    measured = {METRICS[name].family for name in load_suite("standard").metrics}
    assert measured == {metric.family for metric in METRICS.values()}


@pytest.mark.parametrize(
    ("shelf", "readme"),
    [
        ("recipes", "recipes/README.md"),
        ("calibration", "calibration/README.md"),
        ("eval/suites", "eval/README.md"),
    ],
)
def test_every_file_has_one_row_in_the_readme(shelf: Shelf, readme: str, checkout: Path) -> None:
    text = (checkout / readme).read_text()
    rows = re.findall(r"^\| \[([^\]]+)\]\((?:suites/)?([^)]+)\.yaml\)", text, flags=re.M)
    assert all(shown == target for shown, target in rows)
    assert sorted(shown for shown, _ in rows) == list(library.names(shelf))


def _captions(split: Split, count: int, n_ways: int = 1) -> tuple[str, ...]:
    """The first captions of a split, each once; n_ways to say them take turns."""
    found: dict[str, None] = {}
    for index in itertools.count():
        if len(found) == count:
            return tuple(found)
        found[caption(scene(split, index), index % n_ways)] = None
    raise AssertionError
