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


def test_several_seeds_and_controls(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(_SUITE + "n_seeds: 3\ncontrols: [ulp, seed, fp16]\nn_control_clips: 8\n")
    suite = load_suite(str(path))
    assert suite.items()[:2] == [("a", seed_of(5, "a")), ("b", seed_of(5, "b"))]
    assert [prompt for prompt, _ in suite.items()] == ["a", "b"] * 3
    assert len({seed for _, seed in suite.items()}) == 6
    assert suite.control_items() == suite.items()
    others = suite.control_items(other_seeds=True)
    assert [prompt for prompt, _ in others] == ["a", "b"] * 3
    assert not {seed for _, seed in others} & {seed for _, seed in suite.items()}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("controls: [ulps]", r":6: controls\[0\]: unknown recipe 'ulps'"),
        ("controls: [ulp, ulp]", ":6: controls: stands more than once: 'ulp'"),
        ("n_seeds: 0", ":6: n_seeds: "),
        ("n_control_clips: 4", ":6: n_control_clips: "),
    ],
)
def test_bad_controls_are_refused(tmp_path: Path, line: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        _load(tmp_path, f"{_SUITE}{line}\n")
