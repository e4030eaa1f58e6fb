from __future__ import annotations

from pathlib import Path

import pytest

from hbxt_compress import library
from hbxt_compress.errors import RecipeError


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path]:
    """The two places of an installation, neither of them there yet."""
    return tmp_path / "_bundled", tmp_path / "checkout"


def _add(root: Path, name: str) -> Path:
    path = root / "recipes" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("name: x\n")
    return path


def test_the_wheel_s_folder_comes_first(roots: tuple[Path, Path]) -> None:
    bundled, checkout = _add(roots[0], "a"), _add(roots[1], "b")
    assert library.names("recipes", roots) == ("a",)
    assert library.find("recipes", "a", roots) == bundled
    assert library.find("recipes", "b", roots[1:]) == checkout


def test_a_checkout_is_used_where_nothing_is_bundled(roots: tuple[Path, Path]) -> None:
    path = _add(roots[1], "b")
    assert library.find("recipes", "b", roots) == path


def test_a_name_is_never_shadowed_by_a_file(
    roots: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _add(roots[0], "a")
    (tmp_path / "a").write_text("")
    monkeypatch.chdir(tmp_path)
    assert library.find("recipes", "a", roots) == path


@pytest.mark.parametrize("text", ["./a", "x/a", "a.yaml", "a.yml", "C:\\a"])
def test_anything_with_a_slash_or_an_ending_is_a_path(text: str, roots: tuple[Path, Path]) -> None:
    assert library.find("recipes", text, roots) == Path(text)


def test_an_unknown_name_lists_what_there_is(roots: tuple[Path, Path]) -> None:
    for name in ("w4a16", "fp16"):
        _add(roots[0], name)
    with pytest.raises(RecipeError, match=r"'w4a61' \(did you mean 'w4a16'\?\); .*: fp16, w4a16;"):
        library.find("recipes", "w4a61", roots)


def test_a_broken_installation_says_so(roots: tuple[Path, Path]) -> None:
    with pytest.raises(RecipeError, match="install hbxt-compress again"):
        library.names("recipes", roots)
