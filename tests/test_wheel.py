"""What the wheel installs: one top-level name, the library's data, the reference model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hbxt_compress.recipe import load_recipe

MOST_MODEL_BYTES = 24_000_000
DATA = ("recipes", "calibration", "eval")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Path:
    """The wheel of this checkout."""
    pytest.importorskip("hatchling", reason="the build backend comes with the dev extra")
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    _run(sys.executable, "-m", "pip", "wheel", *options, "-w", str(folder), str(checkout))
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def members(wheel: Path) -> dict[str, int]:
    """Size in bytes of every file in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {one.filename: one.file_size for one in archive.infolist()}


def _run(*command: str, **environment: str) -> str:
    """What a command prints; the test fails with its complaints if it fails."""
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_only_one_name_is_installed(members: dict[str, int]) -> None:
    tops = {name.split("/")[0] for name in members}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hbxt_compress"}
    assert len(tops) == 2


def test_every_file_of_the_library_is_bundled(members: dict[str, int], checkout: Path) -> None:
    for folder in DATA:
        files = [p for p in (checkout / folder).rglob("*") if p.suffix in (".yaml", ".md", ".json")]
        assert files
        for path in files:
            name = f"hbxt_compress/_bundled/{path.relative_to(checkout).as_posix()}"
            assert members.get(name) == path.stat().st_size, name


def test_every_module_and_nothing_private_is_in_it(members: dict[str, int], checkout: Path) -> None:
    source = {
        path.relative_to(checkout).as_posix()
        for path in (checkout / "hbxt_compress").rglob("*.py")
        if "_bundled" not in path.parts
    }
    assert source == {name for name in members if name.endswith(".py")}
    assert not [name for name in members if "__pycache__" in name or name.endswith((".log", ".pt"))]


def test_the_reference_model_is_in_it_and_small(members: dict[str, int]) -> None:
    model = "hbxt_compress/reference/tiny-wan/"
    assert f"{model}model_index.json" in members
    assert sum(size for name, size in members.items() if name.startswith(model)) <= MOST_MODEL_BYTES
    assert any(name.startswith("hbxt_compress/reference/extractor/") for name in members)
    assert any("/templates/" in name for name in members)


def test_the_installed_wheel_runs_from_its_own_data(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--target", str(site)]
    _run(sys.executable, "-m", "pip", "install", *options, str(wheel))
    code = (
        "import os, sys; os.chdir(sys.argv.pop(1)); from hbxt_compress import cli, library; "
        "sys.stderr.write(str(library.folder('recipes'))); cli.main()"
    )
    command = [sys.executable, "-c", code, str(elsewhere), "show", "w4a16"]
    run = subprocess.run(
        command, capture_output=True, text=True, check=True,
        cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert run.stderr == str(site / "hbxt_compress" / "_bundled" / "recipes")
    assert json.loads(run.stdout)["digest"] == load_recipe("w4a16").digest
