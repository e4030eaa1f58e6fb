from __future__ import annotations

from pathlib import Path

import pytest

from hbxt_compress.errors import RecipeError
from hbxt_compress.prompts import seed_of
from hbxt_compress.suite import load_suite

_SUITE = "name: mine\nsummary: s\nseed: 5\nmetrics: [psnr, ssim]\nprompts: [a, b]\n"


def _load(folder: Path, text: str) -> object:
    path = folder / "mine.yaml"
    path.write_text(text)
    return load_suite(str(path))


def test_a_suite_gives_each_prompt_its_own_seed(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(_SUITE)
    suite = load_suite(str(path))
    assert suite.items() == [("a", seed_of(5, "a")), ("b", seed_of(5, "b"))]
    assert suite.n_steps is None


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("[psnr, ssim]", "[psnr, simm]", r":4: metrics\[1\]: unknown metric 'simm' \(did you mean"),
        ("[psnr, ssim]", "[psnr, psnr]", ":4: metrics: stands more than once: 'psnr'"),
        ("[psnr, ssim]", "[]", ":4: metrics: needs at least 1"),
        ("[a, b]", "[a, b, a]", ":5: prompts: stands more than once: 'a'"),
        ("[a, b]", "[]", ":5: prompts: needs at least 1"),
        ("seed: 5", "seed: -1", ":3: seed: "),
        ("seed: 5", "seed: 5\nn_steps: 0", ":4: n_steps: "),
        ("name: mine", "name: ../mine", ":1: name: '../mine' does not match"),
    ],
)
def test_bad_suites_are_refused(tmp_path: Path, old: str, new: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        _load(tmp_path, _SUITE.replace(old, new))
