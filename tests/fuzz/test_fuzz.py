"""Malformed inputs through the command line: one message, no traceback, nothing else touched.

A few of every kind; `tests/bench/fuzz.py` runs as many as one likes, and other seeds.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from hbxt_compress import cli
from hbxt_compress.errors import UsageError
from tests.fuzz import campaign
from tests.fuzz.campaign import Outcome, Site, run_case
from tests.fuzz.kinds import KINDS

_CASES = 8
_BY_NAME = {kind.name: kind for kind in KINDS}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"))


def _shown(outcomes: list[Outcome]) -> str:
    return "\n\n".join(
        f"case {one.case}: {one.file}: hbxt {' '.join(one.command)}\n"
        + "\n".join(one.problems)
        + f"\nsaid: {one.said[:2000]}"
        for one in outcomes
        if one.problems
    )


@pytest.mark.parametrize("name", _BY_NAME)
def test_malformed_input_ends_with_a_message_that_names_it(name: str, site: Site) -> None:
    kind = _BY_NAME[name]
    outcomes = [run_case(site, kind, i) for i in range(_CASES)]
    assert not _shown(outcomes), _shown(outcomes)
    assert any(one.code != 0 for one in outcomes), "nothing was damaged"


@pytest.mark.parametrize("name", _BY_NAME)
def test_the_same_input_undamaged_is_taken(name: str, site: Site) -> None:
    kind = _BY_NAME[name]
    outcomes = [run_case(site, kind, i, damaged=False) for i in range(len(kind.commands))]
    assert not _shown(outcomes), _shown(outcomes)


@pytest.mark.parametrize("name", ["recipe w4a16", "manifest", "checkpoint .pt"])
def test_the_same_seed_damages_in_the_same_way(name: str, site: Site) -> None:
    kind = _BY_NAME[name]
    first = [run_case(site, kind, i) for i in range(3)]
    assert [(one.file, one.code) for one in first] == [
        (one.file, one.code) for one in (run_case(site, kind, i) for i in range(3))
    ]


def _raises() -> None:
    raise KeyError("a bug")


def _spins() -> None:
    while True:
        pass


def _writes() -> None:
    Path("../bystander/new.txt").write_text("x")


def _overwrites() -> None:
    Path("in/mine-w4a16.yaml").write_text("x")


def _loses() -> None:
    Path("out/kept.txt").unlink()


def _is_silent() -> None:
    raise UsageError("something is wrong")


def _passes_it_off() -> None:
    raise UsageError("mine-w4a16.yaml: Traceback (most recent call last)")


@pytest.mark.parametrize(
    ("act", "problem"),
    [
        (_raises, "traceback:"),
        (_spins, "hung:"),
        (_writes, "wrote outside the output folder: bystander/new.txt"),
        (_overwrites, "wrote outside the output folder: case/in/mine-w4a16.yaml"),
        (_loses, "lost: case/out/kept.txt"),
        (_is_silent, "the message names none of mine-w4a16.yaml"),
        (_passes_it_off, "a traceback was printed"),
    ],
)
def test_what_must_not_happen_is_noticed(
    act: Callable[[], None], problem: str, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.argument("recipe")
    def show(recipe: str) -> None:
        act()

    monkeypatch.setitem(cli.hbxt.commands, "show", click.command("show")(show))
    monkeypatch.setattr(campaign, "LIMIT_S", 0.5)
    outcome = run_case(site, _BY_NAME["recipe w4a16"], 0)
    (site.root / "bystander" / "new.txt").unlink(missing_ok=True)
    assert any(one.startswith(problem) for one in outcome.problems), outcome.problems


@pytest.mark.parametrize("name", ["recipe w4a16", "report.json", "artifact's bytes"])
def test_a_process_of_its_own_ends_likewise(name: str, site: Site) -> None:
    kind = _BY_NAME[name]
    case, _, command = site.case(kind, 1)
    run = subprocess.run(
        [sys.executable, "-m", "hbxt_compress", *command],
        cwd=case, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert run.returncode == run_case(site, kind, 1).code
    assert run.returncode in (0, 1, 2)
    assert "Traceback" not in run.stderr
