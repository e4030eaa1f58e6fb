"""Failure detectors: 0 for the reference, signed, sure of what people see, quiet about the rest."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from corpus import FAILURES as CORPUS
from failures import caught, false_alarms, honest, measured, seen
from honest_damage import HONEST
from scenes import Scene, drawn, filmed

from hbxt_compress.clips import Clip, health
from hbxt_compress.metrics.failures import FAILURES, find, signals
from hbxt_compress.metrics.failures.miniature import Timeline, block_means
from hbxt_compress.reference import shapes
from hbxt_compress.report import Finding

N_TRIALS = 12
TIME = ("slow_motion", "frozen", "dropped_frame", "repeated_frame", "frame_shuffle")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return drawn(8)


@pytest.fixture(scope="module")
def good(scenes: list[Scene]) -> dict[str, list[float | None]]:
    return measured(scenes, None, 0.0, ("nothing", *HONEST))[0]


def _with(scene: Scene, frames: np.ndarray) -> Clip:
    return replace(scene.clip, frames=frames)


def _signal(name: str, reference: Clip, candidate: Clip) -> float:
    value = FAILURES[name].signal(reference, candidate)
    assert value is not None
    return value


def _of(frames: np.ndarray, prompt: str = "a cat on a sofa") -> Clip:
    return Clip(frames=frames, prompt=prompt, seed=0, fps=8.0)


# ---------------------------------------------------------------------------------------- the rule


def _one(name: str, values: list[float | None]) -> Finding:
    (finding,) = find({name: values}, 0)
    return finding


def test_a_mean_beyond_the_tolerance_whose_interval_leaves_out_0_fails() -> None:
    found = _one("slow_motion", [-10.0, -9.0, -11.0, None, -10.0, -10.0, -9.0, -11.0, -10.0])
    assert (found.outcome, found.n, found.clips, found.n_needed) == ("fail", 8, (), None)
    assert found.value == -10.0
    assert found.interval is not None
    assert -11 < found.interval[0] < -10 < found.interval[1] < -9
    assert found.text.startswith("slow_motion: motion at another speed than the reference's: mean")
    assert "-10% [-10." in found.text
    assert "over 8 clips, more than the 4% that are overlooked" in found.text


def test_within_the_tolerance_nothing_is_found_however_sure_it_is() -> None:
    found = _one("slow_motion", [3.0] * 16)
    assert (found.outcome, found.value, found.interval) == ("pass", 3.0, (3.0, 3.0))
    assert found.text == "slow_motion: mean +3% [3, 3] over 16 clips, up to 4% are overlooked"


def test_too_few_clips_are_undecided_and_told_how_many_would_do() -> None:
    found = _one("slow_motion", [80.0, -40.0, 50.0, -60.0, 30.0, -30.0, 40.0, -22.0])
    assert found.outcome == "undecided"
    assert found.value == 6.0
    assert found.interval is not None
    half = (found.interval[1] - found.interval[0]) / 2
    assert found.n_needed == int(np.ceil(8 * (half / 6.0) ** 2))
    assert found.n_needed > 8
    assert f"it would take some {found.n_needed} such clips" in found.text


@pytest.mark.parametrize("n", [1, 2, 7])
def test_below_8_clips_only_a_single_clips_alarm_decides(n: int) -> None:
    assert _one("blur", [-30.0] * n).outcome == "pass"
    assert _one("blur", [-30.0] * n).n_needed == 8
    assert _one("blur", [-0.5] * n).outcome == "pass"
    assert _one("blur", [-0.5] * (n - 1) + [-80.0]).outcome == "fail"


def test_clips_that_fail_alone_are_named_by_their_place() -> None:
    values: list[float | None] = [0.0] * 40
    values[1], values[3], values[37] = None, 100.0, 50.0
    found = _one("frozen", values)
    assert (found.outcome, found.clips) == ("fail", (3, 37))
    assert "in clips 3, 37, by up to +100% of changes where 25 are too many" in found.text
    many = _one("frozen", [100.0] * 12)
    assert many.clips == tuple(range(12))
    assert "in clips 0, 1, 2, 3, 4, 5, 6, 7 and 4 more, by" in many.text


def test_what_no_clip_can_tell_is_said() -> None:
    found = _one("wrong_prompt", [None, None])
    assert (found.outcome, found.value, found.interval, found.n) == ("pass", None, None, 0)
    assert found.text == "wrong_prompt: cannot be told from these clips"


def test_findings_are_plain_json_and_the_same_for_the_same_seed(scenes: list[Scene]) -> None:
    pairs = [(s.clip, honest(s.clip, "four_bit", np.random.default_rng(0))) for s in scenes[:2]]
    found = find(signals(pairs), 3)
    assert [one.failure for one in found] == list(FAILURES)
    assert found == find(signals(pairs), 3)
    assert json.loads(json.dumps([asdict(one) for one in found], allow_nan=False))


# -------------------------------------------------------------------------------------- properties


def test_every_detector_is_in_the_table_by_its_name() -> None:
    assert [one.name for one in FAILURES.values()] == list(FAILURES)
    assert all(one.alarm is None or one.alarm >= one.tolerance for one in FAILURES.values())


def test_the_reference_against_itself_gives_0(scenes: list[Scene]) -> None:
    latents = np.random.default_rng(0).normal(size=(3, 2, 2, 4, 4)).astype(np.float32)
    for scene in scenes:
        clip = replace(scene.clip, latents=latents)
        for name, values in signals([(clip, clip)]).items():
            assert values[0] is not None or name in TIME, name
            assert values[0] in (None, pytest.approx(0, abs=1e-3)), name  # float32


SIGNS = [
    ("slow motion", 0.9, "slow_motion", -1),
    ("fast motion", 1.1, "slow_motion", 1),
    ("blur", 1.0, "blur", -1),
    ("sharpened", 1.0, "blur", 1),
    ("brighter", 4.0, "green_shift", 1),
    ("darker", -4.0, "green_shift", -1),
    ("limited range", 0.86, "contrast", -1),
    ("pale", 0.8, "saturation", -1),
    ("flicker", 3.0, "flicker", 1),
    ("local flicker", 4.0, "local_flicker", 1),
    ("noise left", 6.0, "grain", 1),
    ("doubled frame", 1.0, "dropped_frame", -1),
]


@pytest.mark.parametrize(("failure", "strength", "name", "sign"), SIGNS, ids=lambda v: str(v))
def test_signals_have_a_sign_and_lose_it_when_sides_are_swapped(
    scenes: list[Scene], failure: str, strength: float, name: str, sign: int
) -> None:
    for i, scene in enumerate(scenes[:4]):
        made = CORPUS[failure].make(scene, strength, np.random.default_rng(i))
        assert isinstance(made, np.ndarray)
        there = sign * _signal(name, scene.clip, _with(scene, made))
        back = sign * _signal(name, _with(scene, made), scene.clip)
        assert there > 0.3
        assert back < -0.3


@pytest.mark.parametrize("speed", [0.5, 0.8, 0.9, 0.95, 1.05, 1.1, 1.3])
def test_speed_is_measured_not_only_noticed(scenes: list[Scene], speed: float) -> None:
    for i, scene in enumerate(scenes[:5]):
        clip = _with(scene, scene.at(np.arange(17) * speed))
        noisy = honest(clip, "four_bit", np.random.default_rng(i))
        assert _signal("slow_motion", scene.clip, noisy) == pytest.approx(
            100 * (speed - 1), abs=2.5
        )


def test_a_clip_that_is_honestly_fast_or_busy_is_no_failure(scenes: list[Scene]) -> None:
    pairs = []
    for i, scene in enumerate(scenes):
        fast = _with(scene, scene.at(np.linspace(0, 16, 9))[:, :, ::-1])
        pairs.append((fast, honest(fast, "four_bit", np.random.default_rng(i))))
    found = find(signals(pairs), 0)
    assert [one.text for one in found if one.outcome != "pass" and one.failure in TIME] == []


def test_what_cannot_be_told_is_none(scenes: list[Scene]) -> None:
    still = _of(np.repeat(scenes[0].frames[:1], 9, axis=0))
    for name in TIME:
        assert FAILURES[name].signal(still, scenes[0].clip) is None, name
    grey = _of(np.repeat(scenes[0].frames[..., :1], 3, axis=-1))
    assert FAILURES["swapped_channels"].signal(grey, grey) is None
    assert FAILURES["saturation"].signal(grey, scenes[0].clip) is None
    for name in ("wrong_prompt", "non_finite", "off_by_one_step"):
        assert FAILURES[name].signal(grey, grey) is None, name
    flat = _of(np.full((9, 32, 32, 3), 255, dtype=np.uint8))
    for name in ("other_scene", "first_frame_only", "constant", "contrast", "blur", "red_shift"):
        assert FAILURES[name].signal(flat, flat) is None, name


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 40, 33), (5, 8, 90), (9, 65, 64)])
def test_clips_of_any_shape_give_finite_signals(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    a, b = (_of(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for _ in range(2))
    for values in signals([(a, b), (b, a)]).values():
        assert all(value is None or np.isfinite(value) for value in values)


@pytest.mark.parametrize("level", [0, 2, 90])
def test_what_health_calls_black_or_constant_is_found(scenes: list[Scene], level: int) -> None:
    rng = np.random.default_rng(0)
    for scene in scenes:
        frames = rng.integers(max(0, level - 1), level + 1, scene.frames.shape, dtype=np.uint8)
        assert health(frames)
        found = find(signals([(scene.clip, _with(scene, frames))]), 0)
        assert {"constant", *(["black"] if level < 3 else [])} <= {
            one.failure for one in found if one.outcome == "fail"
        }


# ------------------------------------------------------------------------------- literal oracles


def test_distances_between_frames_are_mean_squares_of_small_frames() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (4, 64, 96, 3), dtype=np.uint8) for _ in range(2))
    line = Timeline.of(a, b)
    small = [x.reshape(4, 32, 2, 48, 2, 3).mean(axis=(2, 4)) for x in (a, b)]
    for t in range(4):
        for u in range(4):
            assert line.across[t, u] == pytest.approx(np.mean((small[1][t] - small[0][u]) ** 2))
            assert line.reference[t, u] == pytest.approx(
                np.mean((small[0][t] - small[0][u]) ** 2), abs=1e-3
            )
    between = 0.75 * small[0][1] + 0.25 * small[0][2]
    at = line.at(np.full((1, 4), 1.25))
    assert at[0, 3] == pytest.approx(np.mean((small[1][3] - between) ** 2))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_block_means_cut_what_does_not_fill_a_block(dtype: type) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 13, 11, 3)).astype(dtype)
    expected = frames[:, :12, :9].reshape(2, 4, 3, 3, 3, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(block_means(frames, 3), expected, rtol=1e-5)
    assert block_means(frames, 300).shape == (2, 1, 1, 3)


def _boiling(levels: float, seed: int) -> np.ndarray:
    """17 frames of a still picture whose edges never are quite the same, as generated ones are."""
    rng = np.random.default_rng(seed)
    still = shapes.draw(shapes.scene("evaluation", 17))[0] * 200 + 20
    moved = rng.normal(0, levels, (17, 8, 8, 3)).repeat(8, axis=1).repeat(8, axis=2)
    return np.clip(still + moved, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", ["repeated_frame", "dropped_frame", "frame_shuffle"])
def test_pictures_that_boil_or_go_elsewhere_say_nothing_of_order(name: str) -> None:
    detector = FAILURES[name]
    for seed in range(20):
        reference, candidate = _boiling(1.5, seed), _boiling(6.0, 100 + seed)
        assert not detector.signal(_of(reference), _of(candidate))
    circles = [i for i in range(64) if "circle on" in shapes.caption(shapes.scene("evaluation", i))]
    drawn = [np.rint(shapes.draw(shapes.scene("evaluation", i)) * 255) for i in circles]
    for one, other in pairwise(drawn):
        assert not detector.signal(_of(one.astype(np.uint8)), _of(other.astype(np.uint8)))


def test_errors_in_other_directions_say_nothing_of_steps() -> None:
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(5, 4, 3, 8, 8)).astype(np.float32)
    clip = replace(_of(np.zeros((9, 32, 32, 3), dtype=np.uint8)), latents=latents)
    apart = latents.copy()
    apart[-1] += 5 * rng.normal(size=apart[-1].shape)
    assert FAILURES["off_by_one_step"].signal(clip, replace(clip, latents=apart)) is None


@pytest.mark.parametrize("radius", [18, 20])
def test_an_object_that_the_reference_has_not_shows_no_borders_of_tiles(radius: int) -> None:
    y, x = np.mgrid[:64, :64]
    inside = 1 / (1 + np.exp((np.hypot(x - 30, y - 34) - radius) / 1.5))
    empty = np.full((17, 64, 64, 3), 115, np.uint8)
    with_it = (empty - 95 * inside[..., None]).astype(np.uint8)
    alarm = FAILURES["seams"].alarm
    assert alarm is not None
    assert _signal("seams", _of(empty), _of(with_it)) < alarm / 4
    halves = np.where(x < 32, -2, 2)[..., None]  # beside it, or through it, a border is seen
    assert _signal("seams", _of(empty), _of((with_it + halves).astype(np.uint8))) > alarm


@pytest.mark.parametrize(("light", "dark", "wraps"), [(212, 43, False), (250, 4, True)])
def test_a_dark_spot_is_an_overflow_only_if_256_more_is_near(
    light: int, dark: int, wraps: bool
) -> None:
    right = np.full((17, 64, 64, 3), light, np.uint8)
    wrong = right.copy()
    wrong[:, 30:34, 30:34] = dark
    assert (_signal("uint8_wrap", _of(right), _of(wrong)) > 0) is wraps
    assert (_signal("uint8_wrap", _of(~right), _of(~wrong)) > 0) is wraps  # to white


def test_one_step_early_is_one_step() -> None:
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(5, 4, 3, 8, 8)).astype(np.float32)
    clip = replace(_of(np.zeros((9, 32, 32, 3), dtype=np.uint8)), latents=latents)
    off = FAILURES["off_by_one_step"]
    assert off.signal(clip, replace(clip, latents=latents[:-1])) == pytest.approx(-1)
    half = np.concatenate([latents[:-1], latents[-1:] * 0.5 + latents[-2:-1] * 0.5])
    assert off.signal(clip, replace(clip, latents=half)) == pytest.approx(-0.5)
    broken = np.full_like(latents, np.nan)
    assert off.signal(clip, replace(clip, latents=broken)) is None
    assert FAILURES["non_finite"].signal(clip, replace(clip, latents=broken)) == 100


def test_one_level_of_one_channel_is_one_level() -> None:
    frames = np.random.default_rng(0).integers(20, 200, (3, 32, 32, 3), dtype=np.uint8)
    moved = frames + np.array([1, 0, 3], dtype=np.uint8)
    found = signals([(_of(frames), _of(moved))])
    assert [found[f"{c}_shift"][0] for c in ("red", "green", "blue")] == [1, 0, 3]


# ------------------------------------------------------------------------------------- the corpus


@pytest.mark.parametrize("failure", [name for name in CORPUS if name != "one step early"])
def test_what_people_see_is_caught(
    scenes: list[Scene], good: dict[str, list[float | None]], failure: str
) -> None:
    damage = CORPUS[failure]
    kinds = ("nothing", *HONEST)
    damaged, visible = measured(scenes, damage, damage.visible, kinds, damage.caught_by)
    assert visible, "no scene shows it"
    whole, alone = caught(damaged, good, visible, damage, N_TRIALS)
    assert whole == 100
    assert alone in (None, 100)


@pytest.mark.parametrize("kind", HONEST)
def test_honest_candidates_are_let_pass(scenes: list[Scene], kind: str) -> None:
    pool, _ = measured(scenes, None, 0.0, (kind,))
    fired, _, by = false_alarms(pool, N_TRIALS)
    assert fired == 0, by


def test_the_corpus_is_what_it_says(scenes: list[Scene]) -> None:
    for name, damage in CORPUS.items():
        assert damage.visible in damage.strengths, name
        assert set(damage.caught_by) <= set(FAILURES), name
    for kind in HONEST:
        clip = honest(scenes[0].clip, kind, np.random.default_rng(0))
        assert clip.frames.shape == scenes[0].frames.shape
        assert (clip.frames != scenes[0].frames).any()
    four = honest(scenes[0].clip, "four_bit", np.random.default_rng(0)).frames
    error = np.mean((four.astype(float) - scenes[0].frames) ** 2)
    assert 10 * np.log10(255**2 / error) == pytest.approx(35, abs=0.3)
    assert not seen(scenes[0].frames, scenes[0].frames)


def test_drawn_scenes_are_drawn_at_other_times(scenes: list[Scene]) -> None:
    for scene in scenes:
        np.testing.assert_array_equal(scene.at(np.arange(17)), scene.frames)
    assert {shapes.caption(shapes.scene("evaluation", i)) for i in range(8)} == {
        scene.clip.prompt for scene in scenes
    }


def test_real_clips_are_judged_alike(shared_data: Path, tmp_path: Path) -> None:
    names = ("asl_gestures_again.mkv", "live-examples_media_examples_stream-of-water.mp4",
             "video.mp4")  # fmt: skip
    for name in names:
        (tmp_path / name).symlink_to(shared_data / "clips" / name)
    scenes = filmed(tmp_path, size=96, cuts=2)
    assert len(scenes) >= len(names)
    kinds = ("nothing", *HONEST)
    good = measured(scenes, None, 0.0, kinds)[0]
    fired, _, by = false_alarms(good, N_TRIALS)
    assert fired == 0, by
    for name in ("slow motion", "blur", "frozen", "seams", "dropped frame"):
        damage = CORPUS[name]
        damaged, visible = measured(scenes, damage, damage.visible, kinds, damage.caught_by)
        whole, alone = caught(damaged, good, visible, damage, N_TRIALS)
        assert whole == 100, name
        assert alone in (None, 100), name
