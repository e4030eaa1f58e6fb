"""The stage that judges clips: what it refuses, what it writes, how it words its verdict."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hbxt_compress.clips import Clip, ClipSet
from hbxt_compress.errors import UsageError
from hbxt_compress.geometry import Geometry
from hbxt_compress.manifest import Bucket, LayerFate, Manifest
from hbxt_compress.metrics import WeightFiles
from hbxt_compress.report import Measurement, QualityReport
from hbxt_compress.sampler import SamplerSpec
from hbxt_compress.stages.measure import About, measure

CHEAP = ("psnr", "ssim", "temporal_error", "latent_error", "motion_ratio", "flicker")
PROMPT = "a red circle moving left on a black background"


def _manifest() -> Manifest:
    layer = LayerFate(
        name="transformer/blocks.0.attn1.to_q",
        format="int4-g128",
        activations="keep",
        how="rtn",
        reason="rule 2",
        shape=(256, 256),
        bytes_before=131072,
        bytes_after=34816,
        error=0.04,
        held_out=0.05,
        g1_db=3.0,
        g2_db=2.0,
        limit_db=4.0,
    )
    return Manifest(
        schema=3,
        recipe={"name": "w4a16"},
        source={"model": "builtin/tiny-wan"},
        components={
            "transformer": {"before": 1000, "after": 300},
            "vae": {"before": 500, "after": 500},
        },
        sampler=SamplerSpec(solver="euler", n_steps=3, shift=3.0, guidance=1.0),
        buckets=(
            Bucket(
                geometry=Geometry(height=16, width=16, n_frames=5, fps=8.0),
                latent_shape=(4, 2, 2, 2),
                transformer="model.onnx",
                first="model_first.onnx",
                next="model.onnx",
                tile=None,
            ),
        ),
        text_length=32,
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
        layers=(layer, replace(layer, name="transformer/proj_out", format="keep", error=None)),
        lineage=(),
        made_with={"numpy": "2"},
        session={},
        targets={},
        files=(),
    )


def _clips(n: int, seed: int = 0) -> list[Clip]:
    rng = np.random.default_rng(seed)
    return [
        Clip(
            frames=rng.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8),
            prompt=f"prompt {i}",
            seed=i,
            fps=8.0,
            latents=rng.normal(size=(3, 4, 2, 2, 2)).astype(np.float32),
        )
        for i in range(n)
    ]


def _damaged(clips: list[Clip], by: int = 3) -> list[Clip]:
    """Every other pixel brighter, the others darker: errors, but no failure that has a name."""
    sign = np.indices((16, 16)).sum(0)[:, :, None] % 2 * 2 - 1
    return [
        replace(
            clip,
            frames=np.clip(clip.frames.astype(int) + by * sign, 0, 255).astype(np.uint8),
            latents=clip.latents * 1.1 if clip.latents is not None else None,
        )
        for clip in clips
    ]


def _run(
    folder: Path,
    reference: list[Clip],
    candidate: list[Clip],
    metrics: tuple[str, ...] = CHEAP,
    limits: dict[str, float] | None = None,
) -> QualityReport:
    return measure(
        folder,
        ClipSet(clips=tuple(reference)),
        ClipSet(clips=tuple(candidate)),
        about=About(manifest=_manifest()),
        suite={"name": "tiny"},
        metrics=metrics,
        limits=limits or {},
        files=WeightFiles(lpips_trunk=folder / "absent.pth"),
    )


def _of(report: QualityReport, metric: str) -> Measurement:
    return next(one for one in report.measurements if one.metric.split("[")[0] == metric)


def test_a_report_and_its_files_are_written(tmp_path: Path) -> None:
    clips = _clips(3)
    report = _run(tmp_path, clips, _damaged(clips))
    assert QualityReport.load(tmp_path).to_json() == report.to_json()
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {
        "report.json", "report.md", "report.html", "junit.xml", "summary.md",
        "clips/0000.mp4", "clips/0001.mp4", "clips/0002.mp4",
    }  # fmt: skip
    assert (report.bytes_before, report.bytes_after, report.n_clips) == (1500, 800, 3)
    assert _of(report, "latent_error").value == pytest.approx(0.1, rel=1e-5)
    assert report.curves["latent_error/step"] == pytest.approx((0.1, 0.1, 0.1), rel=1e-5)
    assert len(report.curves["psnr/frame"]) == 5
    assert [layer["format"] for layer in report.layers] == ["int4-g128", "keep"]


def test_values_intervals_and_worst_clip(tmp_path: Path) -> None:
    clips = _clips(4)
    candidate = _damaged(clips[:3], 2) + _damaged(clips[3:], 20)
    one = _of(_run(tmp_path, clips, candidate), "psnr")
    assert one.value == pytest.approx(np.mean(one.per_clip))
    assert one.worst == min(one.per_clip) == one.per_clip[3]
    assert one.interval is not None
    assert one.interval[0] < one.value < one.interval[1]
    assert "bootstrap over clips" in one.interval_by


def test_identical_clips_are_perfect_and_said_to_be_identical(tmp_path: Path) -> None:
    clips = _clips(8)
    report = _run(tmp_path, clips, clips, limits={"psnr": 40.0})
    for name, perfect in (
        ("psnr", 100.0),
        ("ssim", 1.0),
        ("temporal_error", 0.0),
        ("flicker", 0.0),
    ):
        one = _of(report, name)
        assert one.value == pytest.approx(perfect)
        assert one.note == "identical clips"
    assert report.outcome == "pass"
    assert "8 of 8 clips are identical" in report.conclusion
    assert "identical" in (tmp_path / "report.md").read_text()


def _fewer(clips: list[Clip]) -> list[Clip]:
    return clips[:-1]


def _other_prompt(clips: list[Clip]) -> list[Clip]:
    return [replace(clips[0], prompt="another"), *clips[1:]]


def _other_seed(clips: list[Clip]) -> list[Clip]:
    return [replace(clips[0], seed=99), *clips[1:]]


def _fewer_frames(clips: list[Clip]) -> list[Clip]:
    return [replace(clips[0], frames=clips[0].frames[:4]), *clips[1:]]


def _smaller(clips: list[Clip]) -> list[Clip]:
    return [replace(clips[0], frames=clips[0].frames[:, :12]), *clips[1:]]


def _swapped(clips: list[Clip]) -> list[Clip]:
    return [clips[1], clips[0], *clips[2:]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_fewer, "3 reference and 2 candidate clips"),
        (_other_prompt, "clip 0: prompt 'prompt 0' and 'another'"),
        (_other_seed, "clip 0: seed 0 and 99"),
        (_fewer_frames, "clip 0: shape .5, 16, 16, 3. and .4, 16, 16, 3."),
        (_smaller, "clip 0: shape .5, 16, 16, 3. and .5, 12, 16, 3."),
        (_swapped, "clip 1: prompt"),
    ],
)
def test_sides_that_are_not_one_experiment_are_refused(
    change: object, said: str, tmp_path: Path
) -> None:
    assert callable(change)
    clips = _clips(3)
    with pytest.raises(UsageError, match=said):
        _run(tmp_path, clips, change(_damaged(clips)))
    assert not list(tmp_path.iterdir())


def test_no_clips_and_unknown_metrics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="0 reference"):
        _run(tmp_path, [], [])
    with pytest.raises(UsageError, match="unknown metrics psrn"):
        _run(tmp_path, _clips(1), _clips(1), metrics=("psrn",))


def _blackened(clip: Clip) -> Clip:
    return replace(clip, frames=np.zeros_like(clip.frames))


def _with_nan(clip: Clip) -> Clip:
    assert clip.latents is not None
    latents = clip.latents.copy()
    latents[-1, 0, 0, 0, 0] = np.nan
    return replace(clip, latents=latents)


@pytest.mark.parametrize(
    ("spoil", "said"), [(_blackened, "black"), (_with_nan, "latents are not finite")]
)
def test_unhealthy_clips_fail_and_nothing_looks_good(
    spoil: object, said: str, tmp_path: Path
) -> None:
    assert callable(spoil)
    clips = _clips(9)
    candidate = [*clips[:4], spoil(clips[4]), *clips[5:]]
    report = _run(tmp_path, clips, candidate, limits={"psnr": 10.0})
    assert report.outcome == "fail"
    assert [verdict.metric for verdict in report.verdicts] == ["health"]
    assert "clip 4 'prompt 4': candidate" in report.verdicts[0].reason
    assert said in report.verdicts[0].reason
    assert all(one.value is None for one in report.measurements)
    assert report.conclusion.startswith("FAIL: 1 of 9 clips are unhealthy")
    assert said in (tmp_path / "report.html").read_text()


def test_a_promise_is_judged_even_if_the_suite_does_not_list_it(tmp_path: Path) -> None:
    clips = _clips(8)
    report = _run(tmp_path, clips, _damaged(clips), metrics=("psnr",), limits={"ssim": 2.0})
    assert {verdict.metric: verdict.outcome for verdict in report.verdicts} == {"ssim": "fail"}
    assert report.conclusion == "FAIL: broken promises on ssim."


def test_too_few_clips_are_undecided_unless_the_interval_decides(tmp_path: Path) -> None:
    clips = _clips(4)
    candidate = _damaged(clips[:2], 2) + _damaged(clips[2:], 30)
    found = _of(_run(tmp_path, clips, candidate), "psnr")
    assert found.value is not None
    for limit, outcome in ((found.value, "undecided"), (5.0, "pass"), (90.0, "fail")):
        report = _run(tmp_path, clips, candidate, limits={"psnr": limit})
        assert report.outcome == outcome
        assert report.conclusion.lower().startswith(outcome)


def test_a_missing_trunk_is_a_note_and_the_verdict_rests_on_the_rest(tmp_path: Path) -> None:
    clips = _clips(8)
    limits = {"psnr": 5.0, "lpips_squeeze": 0.2}
    report = _run(tmp_path, clips, _damaged(clips), limits=limits)
    one = _of(report, "lpips_squeeze")
    assert one.value is None
    assert "HBXT_LPIPS_TRUNK" in one.note
    assert "\n" not in one.note
    assert [verdict.metric for verdict in report.verdicts] == ["psnr"]
    assert "lpips_squeeze could not be measured" in report.conclusion
    assert report.outcome == "pass"


def test_a_promise_that_nothing_can_check_is_not_kept(tmp_path: Path) -> None:
    clips = _clips(8)
    report = _run(tmp_path, clips, _damaged(clips), limits={"lpips_squeeze": 0.2})
    assert report.outcome == "undecided"
    assert "could not be measured, and nothing else was promised" in report.conclusion


def test_without_a_promise_there_is_no_verdict(tmp_path: Path) -> None:
    clips = _clips(2)
    report = _run(tmp_path, clips, _damaged(clips))
    assert (report.outcome, report.verdicts) == ("none", ())
    assert report.conclusion.startswith("No verdict")


def test_prompt_following_scores_both_sides_of_the_prompts_it_knows(tmp_path: Path) -> None:
    frames = np.zeros((5, 64, 64, 3), dtype=np.uint8)
    for t in range(5):
        y, x = np.mgrid[:64, :64]
        frames[t][(x - 44 + 6 * t) ** 2 + (y - 30) ** 2 < 100] = (219, 33, 33)
    known = Clip(frames=frames, prompt=PROMPT, seed=0, fps=8.0)
    other = replace(known, prompt="a cat")
    report = _run(
        tmp_path,
        [known, other],
        [replace(known, frames=frames[::-1]), replace(other, frames=frames[::-1])],
        metrics=("prompt_following",),
    )
    found = {one.metric: (one.value, one.reference, one.n) for one in report.measurements}
    assert found["prompt_following.motion"] == (0.0, 1.0, 1)
    assert found["prompt_following.colour"] == (1.0, 1.0, 1)
    assert found["prompt_following"][0] == pytest.approx(2 / 3)
    assert "1 of 2 prompts" in report.measurements[0].note


def test_set_metrics_below_256_clips_decide_only_by_interval(tmp_path: Path) -> None:
    clips = _clips(12)
    report = _run(
        tmp_path,
        clips,
        _damaged(clips, 40),
        metrics=(),
        limits={"fd_content": 1e9, "fd_temporal": 0.0},
    )
    content, temporal = _of(report, "fd_content"), _of(report, "fd_temporal")
    assert content.metric.startswith("fd_content[")
    assert content.extractor_sha256 is not None
    assert content.extractor_sha256[:12] in content.metric
    assert "halves" in content.interval_by
    assert temporal.interval is not None
    outcomes = {verdict.metric.split("[")[0]: verdict.outcome for verdict in report.verdicts}
    assert outcomes["fd_content"] == "pass"
    assert outcomes["fd_temporal"] == ("fail" if temporal.interval[0] > 0 else "undecided")


def test_the_same_clips_give_the_same_report(tmp_path: Path) -> None:
    clips = _clips(5)
    for name in ("a", "b"):
        _run(tmp_path / name, clips, _damaged(clips), limits={"psnr": 30.0})
    for name in ("report.json", "report.md", "report.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_scores_without_a_reference_count_in_both_directions(tmp_path: Path) -> None:
    """One clip flickers more than its reference, one less: the differences must not cancel."""
    still = [_flat_pair(20), _flat_pair(60)]
    other = [_flat_pair(60), _flat_pair(20)]
    report = _run(tmp_path, still, other, ("vbench_temporal_flickering",))
    found = _of(report, "vbench_temporal_flickering")
    assert found.value == pytest.approx(40 / 255)
    assert found.reference == pytest.approx(1 - 40 / 255)
    assert found.per_clip == pytest.approx([40 / 255, 40 / 255])
    assert (found.family, found.direction, found.n) == ("health", "lower", 2)
    assert found.note == "the candidate itself scores 0.8431"


def _flat_pair(step: int) -> Clip:
    """Two frames of a ramp, the second one brighter by `step`."""
    ramp = np.arange(16, dtype=np.uint8)[None, None, :, None].repeat(16, axis=1).repeat(3, axis=3)
    return Clip(frames=np.concatenate([ramp, ramp + step]), prompt="p", seed=0, fps=8.0)


def test_a_tool_that_is_not_installed_is_a_note_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.setitem(sys.modules, "pycvvdp", None)
    clips = _clips(2)
    report = _run(tmp_path, clips, _damaged(clips), ("psnr", "vmaf", "cvvdp"), {"vmaf": 90})
    assert _of(report, "psnr").value is not None
    for name in ("vmaf", "cvvdp"):
        assert _of(report, name).value is None
        assert "pip install 'hbxt-compress[slow]'" in _of(report, name).note
    assert report.outcome == "undecided"
    assert "hbxt-compress[slow]" in report.verdicts[0].reason
