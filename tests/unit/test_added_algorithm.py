"""The README's "Add an algorithm": its code, as printed, passes what every rounder must pass."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from hbxt_compress.algorithms import ROUNDERS, Rounder
from hbxt_compress.strict import one_of
from tests.shelves import test_every_rounder as contract

_HEADING = "## Add an algorithm\n"
_MOST_LINES = 80


@pytest.fixture(scope="module")
def section(checkout: Path) -> str:
    """What stands under the heading, up to the next one of its size."""
    text = (checkout / "README.md").read_text(encoding="utf-8")
    assert text.count(_HEADING) == 1, "the README explains once how to add an algorithm"
    return re.split(r"^## ", text.split(_HEADING)[1], flags=re.M)[0]


@pytest.fixture(scope="module")
def code(section: str) -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```$", section, flags=re.M | re.S)
    return str(block)


@pytest.fixture(scope="module")
def name(section: str) -> str:
    """What the page calls it: the file's name is the name in the table and in the recipe."""
    found = re.findall(r"`hbxt_compress/algorithms/(\w+)\.py`", section)
    assert len(found) == 1
    return str(found[0])


@pytest.fixture(scope="module")
def kind(code: str, name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[type[Rounder]]:
    """The class, from a file of its own."""
    path = tmp_path_factory.mktemp("added") / f"{name}.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(f"added_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where pydantic looks up annotations
    spec.loader.exec_module(module)
    (public,) = module.__all__
    yield getattr(module, public)
    del sys.modules[spec.name]


def _contract() -> list[Any]:
    """Every test of the shelf that takes a rounder's name, once with each of its other values."""
    cases = []
    for title, function in vars(contract).items():
        if not title.startswith("test_") or not callable(function):
            continue
        marks = [m for m in getattr(function, "pytestmark", []) if m.name == "parametrize"]
        values = {mark.args[0]: list(mark.args[1]) for mark in marks}
        assert values.keys() == inspect.signature(function).parameters.keys(), title
        if values.pop("name", None) is None:
            continue
        for chosen in itertools.product(*values.values()):
            case = dict(zip(values, chosen, strict=True))
            cases.append(pytest.param(function, case, id="-".join([title[5:], *map(str, chosen)])))
    return cases


def test_the_contract_is_found() -> None:
    titles = {param.values[0].__name__ for param in _contract()}
    assert "test_rounding_is_deterministic_and_storable" in titles
    assert "test_knowing_the_inputs_is_worth_something" in titles
    assert len(titles) >= 4


@pytest.mark.parametrize(("function", "case"), _contract())
def test_the_printed_code_is_a_rounder(
    function: Callable[..., None],
    case: dict[str, object],
    name: str,
    kind: type[Rounder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert name not in ROUNDERS, "it is on the shelf now: print another example"
    monkeypatch.setitem(ROUNDERS, name, kind)  # type: ignore[arg-type]
    function(name=name, **case)


def test_it_is_short_and_keeps_the_rules_of_every_file(code: str) -> None:
    lines = code.splitlines()
    assert len(lines) < _MOST_LINES
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith('"""')
    assert "from __future__ import annotations" in lines
    assert "print(" not in code


def test_the_line_for_the_table_and_the_recipe_are_right(
    section: str, name: str, kind: type[Rounder]
) -> None:
    assert f'`"{name}": {kind.__name__}`' in section
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", section, flags=re.M | re.S)
    said = yaml.safe_load(block)["round"]
    assert len(said) > 1, "the page shows a setting of its own"
    chosen = TypeAdapter(one_of({**ROUNDERS, name: kind}))
    built = chosen.validate_python(said)
    assert isinstance(built, kind)
    assert chosen.dump_python(built).items() >= said.items()
    with pytest.raises(ValidationError):
        chosen.validate_python({**said, "no_such_setting": 1})
