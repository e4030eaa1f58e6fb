"""VMAF and CAMBI: the conversion and the call everywhere, the scores where the package is."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from scipy.ndimage import gaussian_filter

from hbxt_compress.clips import Clip
from hbxt_compress.metrics import Unavailable, WeightFiles
from hbxt_compress.metrics.vmaf import CAMBI, VMAF, Libvmaf, run_libvmaf, to_yuv

_STUB = """#!/bin/sh
case "$*" in
  *-filters*) echo " .. {filter}           VV->V      compares two streams" ;;
  *-version*) echo "ffmpeg version 0-stub Copyright" ;;
  *) cp candidate.yuv "{out}/first.yuv"; cp reference.yuv "{out}/second.yuv"
     echo "$*" > "{out}/said"; {then} ;;
esac
"""


def _ffmpeg(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, then: str = "exit 1", name: str = "libvmaf"
) -> Path:
    """A program in ffmpeg's place; `then` is what it does after it kept its inputs."""
    path = folder / "ffmpeg"
    path.write_text(_STUB.format(filter=name, out=folder, then=then))
    path.chmod(0o755)
    stub = SimpleNamespace(get_ffmpeg_exe=lambda: str(path))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", stub)
    return path


def _clip(frames: np.ndarray) -> Clip:
    return Clip(frames=frames, prompt="p", seed=0, fps=8.0)


def _texture(n_frames: int = 4, size_px: int = 96) -> Clip:
    """Smooth coloured noise that drifts by two pixels a frame."""
    rng = np.random.default_rng(3)
    field = gaussian_filter(rng.normal(size=(size_px, size_px + 2 * n_frames, 3)), (2, 2, 0))
    field = np.rint(127 + 50 * field / field.std()).clip(0, 255).astype(np.uint8)
    return _clip(np.stack([field[:, 2 * t : 2 * t + size_px] for t in range(n_frames)]))


def _noisy(clip: Clip, sigma: float) -> Clip:
    noise = np.random.default_rng(1).normal(size=clip.frames.shape)
    frames = np.rint(clip.frames + sigma * noise).clip(0, 255).astype(np.uint8)
    return replace(clip, frames=frames)


def _blurred(clip: Clip, sigma_px: float) -> Clip:
    frames = gaussian_filter(clip.frames.astype(np.float64), (0, sigma_px, sigma_px, 0))
    return replace(clip, frames=np.rint(frames).astype(np.uint8))


@pytest.mark.parametrize(
    ("rgb", "yuv"),
    [
        ((0, 0, 0), (16, 128, 128)),
        ((255, 255, 255), (235, 128, 128)),
        ((255, 0, 0), (63, 102, 240)),
        ((0, 255, 0), (173, 42, 26)),
        ((0, 0, 255), (32, 240, 118)),
    ],
)
def test_colours_have_the_codes_of_bt709(rgb: tuple[int, ...], yuv: tuple[int, ...]) -> None:
    frame = np.full((2, 3, 3), rgb, dtype=np.uint8)
    planes = to_yuv(frame)
    assert planes.shape == (3, 2, 3)
    assert planes.dtype == np.uint8
    assert [int(plane[0, 0]) for plane in planes] == list(yuv)


def test_conversion_is_that_of_ffmpeg_to_one_code(rng: np.random.Generator) -> None:
    frame = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
    theirs = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
        format="yuv444p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
    )
    apart = np.abs(to_yuv(frame).astype(int) - theirs.to_ndarray().astype(int))
    assert apart.max() <= 1
    assert apart.mean() < 0.2


@pytest.mark.parametrize("metric", [VMAF, CAMBI], ids=lambda metric: metric.name)
def test_without_the_package_it_says_how_to_get_it(
    metric: Libvmaf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(Unavailable) as caught:
        metric.load(WeightFiles())
    assert str(caught.value) == "no package imageio-ffmpeg: pip install 'hbxt-compress[slow]'"
    with pytest.raises(Unavailable, match="load"):
        metric.compare(_texture(), _texture())


def test_an_ffmpeg_without_the_filter_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ffmpeg(tmp_path, monkeypatch, name="vmafmotion")
    with pytest.raises(Unavailable, match=r"no filter libvmaf: .*IMAGEIO_FFMPEG_EXE"):
        VMAF.load(WeightFiles())


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "is no program"), ("#!/bin/sh\nexit 7\n", "does not run")],
)
def test_a_program_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, says: str
) -> None:
    path = _ffmpeg(tmp_path, monkeypatch)
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(Unavailable, match=says) as caught:
        VMAF.load(WeightFiles())
    assert "IMAGEIO_FFMPEG_EXE" in str(caught.value)


def test_a_platform_without_a_program_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", SimpleNamespace(get_ffmpeg_exe=none))
    with pytest.raises(Unavailable, match="for this platform: name one in IMAGEIO_FFMPEG_EXE"):
        VMAF.load(WeightFiles())


def test_the_candidate_goes_first_and_both_at_one_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = {"frames": [{}] * 4, "pooled_metrics": {"vmaf": {"mean": 91.5}}}
    (tmp_path / "log").write_text(json.dumps(log))
    _ffmpeg(tmp_path, monkeypatch, then=f"cp {tmp_path}/log log.json")
    reference, candidate = _texture(), _noisy(_texture(), 9)
    metric = VMAF.load(WeightFiles())
    assert metric.compare(reference, candidate) == 91.5
    for name, clip in (("first.yuv", candidate), ("second.yuv", reference)):
        wanted = b"".join(to_yuv(frame).tobytes() for frame in clip.frames)
        assert (tmp_path / name).read_bytes() == wanted
    said = (tmp_path / "said").read_text()
    assert said.index("-r 8 -i candidate.yuv") < said.index("-r 8 -i reference.yuv")
    assert said.count("-f rawvideo -pix_fmt yuv444p -s 96x96") == 2
    assert metric.extractor == "vmaf_v0.6.1 in ffmpeg version 0-stub"


def test_frames_that_were_left_out_are_no_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log").write_text(json.dumps({"frames": [{}] * 3, "pooled_metrics": {}}))
    _ffmpeg(tmp_path, monkeypatch, then=f"cp {tmp_path}/log log.json")
    with pytest.raises(Unavailable, match="3 of 4 frames"):
        VMAF.load(WeightFiles()).compare(_texture(), _texture())


def test_a_run_that_fails_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ffmpeg(tmp_path, monkeypatch, then="echo first >&2; echo 'no room' >&2; exit 3")
    with pytest.raises(Unavailable) as caught:
        VMAF.load(WeightFiles()).compare(_texture(), _texture())
    assert str(caught.value) == "libvmaf failed on 4 frames of 96x96 (exit 3): no room"


def test_frames_too_small_are_refused_before_anything_runs() -> None:
    small = _texture(size_px=31)
    with pytest.raises(Unavailable, match="31x31 pixels are too small for libvmaf"):
        run_libvmaf("/nowhere", small, small)
    with pytest.raises(Unavailable, match=r"96x96 pixels are too small for cambi: .* 216"):
        replace(CAMBI, ffmpeg="/nowhere").compare(_texture(), _texture())


@pytest.fixture
def vmaf() -> Libvmaf:
    pytest.importorskip("imageio_ffmpeg", reason="no imageio-ffmpeg: pip install .[slow]")
    try:
        return VMAF.load(WeightFiles())
    except Unavailable as reason:
        pytest.skip(str(reason))


def test_a_clip_against_itself_starts_at_the_score_of_no_motion(vmaf: Libvmaf) -> None:
    clip = _texture()
    assert vmaf.ffmpeg is not None
    found = run_libvmaf(vmaf.ffmpeg, clip, clip)
    each = [frame["metrics"]["vmaf"] for frame in found["frames"]]
    assert each[0] == pytest.approx(97.43, abs=0.01)
    assert all(97.4 < value <= 100 for value in each)
    assert vmaf.compare(clip, clip) == pytest.approx(np.mean(each), abs=1e-4)


def test_damage_lowers_it_and_sides_are_not_alike(vmaf: Libvmaf) -> None:
    clip = _texture()
    for damage, strengths in ((_noisy, (0, 1, 3, 9)), (_blurred, (0, 0.5, 1, 2))):
        values = [vmaf.compare(clip, damage(clip, strength)) for strength in strengths]
        assert (np.diff(values) < -0.05).all(), values
    blurred = _blurred(clip, 1)
    assert vmaf.compare(clip, blurred) + 3 < vmaf.compare(blurred, clip)


def test_what_libvmaf_sees_is_the_luma_that_was_made_here(vmaf: Libvmaf) -> None:
    """Its own PSNR, plane by plane, against ours: nothing was resized, shifted or converted."""
    clip, other = _texture(), _noisy(_texture(), 6)
    assert vmaf.ffmpeg is not None
    found = run_libvmaf(vmaf.ffmpeg, clip, other, ("psnr",))
    for i, plane in enumerate(("psnr_y", "psnr_cb", "psnr_cr")):
        for t, frame in enumerate(found["frames"]):
            a, b = (to_yuv(side.frames[t])[i].astype(float) for side in (clip, other))
            wanted = 10 * np.log10(255**2 / np.mean((a - b) ** 2))
            assert frame["metrics"][plane] == pytest.approx(wanted, abs=1e-4)


def test_banding_counts_in_both_directions(vmaf: Libvmaf) -> None:
    """A dark ramp of 12 levels, whose steps are seen, against the same ramp dithered."""
    ramp = np.linspace(40, 52, 256)[None, :, None].repeat(240, axis=0).repeat(3, axis=2)
    noise = np.random.default_rng(0).normal(size=(2, *ramp.shape))
    smooth = _clip(np.rint(ramp + 3 * noise).astype(np.uint8))
    banded = _clip(np.rint(ramp).astype(np.uint8)[None].repeat(2, axis=0))
    cambi = CAMBI.load(WeightFiles())
    assert cambi.compare(banded, banded) == 0
    assert cambi.compare(smooth, banded) > 5
    assert cambi.compare(smooth, banded) == pytest.approx(cambi.compare(banded, smooth), abs=1e-6)
