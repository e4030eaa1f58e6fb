"""The analytic judge must be right about clips whose content is known."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from hbxt_compress.metrics.judge import Judgement, agreement, expected, judge
from hbxt_compress.reference import shapes

_WORDS = ("colour", "shape", "motion", "background")


def _truth(scene: shapes.Scene) -> Judgement:
    thing = scene.things[0]
    return Judgement(
        colour=thing.colour, shape=thing.shape, motion=thing.motion, background=scene.background
    )


def _frames(scene: shapes.Scene, blur_px: float, noise: float, seed: int) -> np.ndarray:
    clip = shapes.draw(scene)
    if blur_px:
        clip = gaussian_filter(clip, (0, blur_px, blur_px, 0))
    clip = clip + np.random.default_rng(seed).normal(0, noise / 255, clip.shape)
    return np.rint(np.clip(clip, 0, 1) * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("blur_px", "noise", "n_clips", "least"),
    [(0, 0, 144, 0.98), (0.7, 6, 72, 0.97), (1.2, 10, 36, 0.95)],
    ids=["clean", "soft and noisy", "worse"],
)
def test_right_about_real_clips(blur_px: float, noise: float, n_clips: int, least: float) -> None:
    right = dict.fromkeys(_WORDS, 0)
    for i in range(n_clips):
        scene = shapes.scene("evaluation", i)
        seen, truth = judge(_frames(scene, blur_px, noise, i)), _truth(scene)
        for word in _WORDS:
            right[word] += getattr(seen, word) == getattr(truth, word)
    assert min(right.values()) >= least * n_clips, right


@pytest.mark.parametrize("variant", range(4))
def test_prompts_in_every_wording_are_understood(variant: int) -> None:
    for i in range(24):
        scene = shapes.scene("evaluation", i)
        assert expected(shapes.caption(scene, variant)) == _truth(scene)


def test_every_word_of_the_generator_is_known() -> None:
    for colour, shape, motion, background in shapes.combinations("train"):
        prompt = f"a {colour} {shape} {shapes.MOTIONS[motion]} on a {background} background"
        assert expected(prompt) == Judgement(
            colour=colour, shape=shape, motion=motion, background=background
        )


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a cat walks on grass",
        "a red circle moving left",
        "a purple circle moving left on a black background",
        "a red circle moving left and a blue square moving up on a black background",
        "a red circle moving still on a black background",
    ],
)
def test_other_prompts_are_not_judged(prompt: str) -> None:
    assert expected(prompt) is None


def test_damage_to_one_attribute_is_seen_as_that() -> None:
    scene = shapes.Scene(
        things=(
            shapes.Thing(
                colour="red", shape="square", motion="left", radius=10, speed=1.5, x=50, y=30
            ),
        ),
        background="black",
    )
    frames = _frames(scene, 0, 0, 0)
    wanted = _truth(scene)
    assert agreement(judge(frames), wanted) == {"colour": 1, "shape": 1, "motion": 1}
    assert agreement(judge(frames[::-1]), wanted) == {"colour": 1, "shape": 1, "motion": 0}
    assert agreement(judge(frames[..., ::-1]), wanted) == {"colour": 0, "shape": 1, "motion": 1}
    frozen = judge(np.repeat(frames[:1], len(frames), axis=0))
    assert (frozen.shape, frozen.motion) == ("square", "still")


@pytest.mark.parametrize("level", [0, 115, 255])
def test_an_empty_clip_shows_no_object(level: int) -> None:
    seen = judge(np.full((17, 64, 64, 3), level, dtype=np.uint8))
    assert (seen.colour, seen.shape, seen.motion) == (None, None, None)
    assert seen.background is not None


def test_noise_alone_never_follows_a_prompt(rng: np.random.Generator) -> None:
    wanted = expected("a red circle moving left on a black background")
    assert wanted is not None
    for _ in range(5):
        frames = rng.integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)
        assert sum(agreement(judge(frames), wanted).values()) <= 1


def test_the_judge_and_the_table_of_metrics_need_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import hbxt_compress.metrics.judge; "
        "from hbxt_compress.metrics import METRICS; assert 'psnr' in METRICS"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
