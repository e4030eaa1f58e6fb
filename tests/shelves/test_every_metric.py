"""What must hold for every metric on the shelf: perfect at identity, worse with damage, honest."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from hbxt_compress.clips import Clip
from hbxt_compress.metrics import (
    METRICS,
    ClipMetric,
    Metric,
    NoReferenceMetric,
    PairMetric,
    SetMetric,
    Unavailable,
    WeightFiles,
)
from hbxt_compress.metrics.pixels import PSNR_CAP_DB, psnr, ssim
from hbxt_compress.metrics.sets import FVD_I3D
from hbxt_compress.metrics.weights import sha256_of
from hbxt_compress.reference import shapes

N_CLIPS = 12


def _clip(index: int) -> Clip:
    scene = shapes.scene("evaluation", index)
    rng = np.random.default_rng(index)
    return Clip(
        frames=np.rint(shapes.draw(scene) * 255).astype(np.uint8),
        prompt=shapes.caption(scene),
        seed=index,
        fps=8,
        latents=rng.normal(size=(3, 4, 5, 8, 8)).astype(np.float32),
    )


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [_clip(i) for i in range(N_CLIPS)]


def _noisy(clip: Clip, sigma: float) -> Clip:
    """The clip under the same noise, in pixels (sigma of 255) and in latents, at any strength."""
    rng = np.random.default_rng(clip.seed + 1000)
    frames = clip.frames + sigma * rng.normal(size=clip.frames.shape)
    assert clip.latents is not None
    noise = rng.normal(size=clip.latents.shape).astype(np.float32)
    return replace(
        clip,
        frames=np.rint(frames.clip(0, 255)).astype(np.uint8),
        latents=clip.latents + np.float32(sigma / 100) * noise,
    )


def _blurred(clip: Clip, sigma_px: float) -> Clip:
    frames = gaussian_filter(clip.frames.astype(np.float64), (0, sigma_px, sigma_px, 0))
    return replace(clip, frames=np.rint(frames).astype(np.uint8))


def _shuffled(clip: Clip) -> Clip:
    order = np.random.default_rng(clip.seed).permutation(len(clip.frames))
    return replace(clip, frames=clip.frames[order])


def _frozen(clip: Clip) -> Clip:
    return replace(clip, frames=np.repeat(clip.frames[:1], len(clip.frames), axis=0))


@pytest.fixture(params=sorted(METRICS), scope="module")
def metric(request: pytest.FixtureRequest) -> Metric:
    """Every metric, ready for use; skipped with its own reason where a network is missing."""
    files = WeightFiles()
    if request.param == "lpips_squeeze":
        folder: Path = request.getfixturevalue("shared_data")
        files = WeightFiles(lpips_trunk=folder / "lpips" / "squeeze.backbone.pth")
    try:
        return METRICS[request.param].load(files)
    except Unavailable as reason:
        pytest.skip(str(reason))


def _shown(metric: Metric, clips: list[Clip]) -> list[Clip]:
    """Fewer clips and frames for what takes long, larger ones for what needs them."""
    if metric.name == "cambi":
        enlarged = (clip.frames.repeat(4, axis=1).repeat(4, axis=2) for clip in clips[:2])
        return [replace(clip, frames=f) for clip, f in zip(clips, enlarged, strict=False)]
    if metric.name in ("vmaf", "cvvdp"):
        return [replace(clip, frames=clip.frames[:4]) for clip in clips[:2]]
    return clips


def _measured(metric: Metric, reference: list[Clip], candidate: list[Clip]) -> float:
    if isinstance(metric, NoReferenceMetric):
        sides = (metric.scores(side) for side in (reference, candidate))
        return float(np.mean([abs(b - a) for a, b in zip(*sides, strict=True)]))
    if isinstance(metric, SetMetric):
        return metric.measure(reference, candidate)
    if isinstance(metric, PairMetric):
        pairs = zip(reference, candidate, strict=True)
        return float(np.mean([metric.compare(*pair) for pair in pairs]))
    assert isinstance(metric, ClipMetric)
    scores = [metric.score(clip) for clip in candidate]
    return float(np.mean([score[metric.name] for score in scores if score is not None]))


def _perfect(metric: Metric) -> float:
    if metric.direction == "lower":
        return 0.0
    return {"psnr": PSNR_CAP_DB, "cvvdp": 10.0}.get(metric.name, 1.0)


def test_states_what_it_is(metric: Metric) -> None:
    key = metric.name.split("[")[0]
    assert key in METRICS
    assert metric.direction in ("lower", "higher")
    assert metric.least_n >= 1
    assert (metric.extractor is None) == (metric.extractor_sha256 is None)
    if metric.extractor_sha256 is not None:
        assert len(metric.extractor_sha256) == 64
        assert "[" not in metric.name or metric.extractor_sha256[:12] in metric.name
    kinds = (PairMetric, NoReferenceMetric, SetMetric, ClipMetric)
    assert [isinstance(metric, kind) for kind in kinds].count(True) == 1


def test_a_clip_against_itself_is_perfect(metric: Metric, clips: list[Clip]) -> None:
    clips = _shown(metric, clips)
    found = _measured(metric, clips, clips)
    if metric.name == "vmaf":  # its score at no motion, which each first frame has
        assert 97.4 < found <= 100
    else:
        assert found == pytest.approx(_perfect(metric), abs=1e-6)


def test_growing_noise_is_growing_damage(metric: Metric, clips: list[Clip]) -> None:
    if metric.name == "cambi":
        pytest.skip("noise is no banding; tests/unit/test_vmaf.py has some")
    clips = _shown(metric, clips)
    levels = (0, 4, 16, 64, 160) if isinstance(metric, ClipMetric) else (0, 4, 16, 64)
    values = [_measured(metric, clips, [_noisy(c, sigma) for c in clips]) for sigma in levels]
    signs = np.diff(values) * (1 if metric.direction == "lower" else -1)
    if isinstance(metric, ClipMetric):  # robust by design: may only break late
        assert (signs >= 0).all(), values
        assert abs(values[-1] - values[0]) > 0.1
    else:
        assert (signs > 0).all(), values


@pytest.mark.parametrize("name", ["psnr", "ssim", "fd_content", "kid_content"])
def test_growing_blur_is_growing_damage(name: str, clips: list[Clip]) -> None:
    metric = METRICS[name].load(WeightFiles())
    values = [_measured(metric, clips, [_blurred(c, s) for c in clips]) for s in (0, 0.7, 1.5, 3)]
    assert (np.diff(values) * (1 if metric.direction == "lower" else -1) > 0).all(), values


@pytest.mark.parametrize("name", ["fd", "kid"])
def test_shuffled_frames_have_the_same_content_but_another_time(
    name: str, clips: list[Clip]
) -> None:
    content, temporal = (
        METRICS[f"{name}_{part}"].load(WeightFiles()) for part in ("content", "temporal")
    )
    mixed = [_shuffled(clip) for clip in clips]
    noise = _measured(temporal, clips, [_noisy(clip, 4) for clip in clips])
    assert _measured(content, clips, mixed) == pytest.approx(0, abs=1e-6)
    assert _measured(temporal, clips, mixed) > 10 * abs(noise) > 0


@pytest.mark.parametrize(
    "name", ["motion_ratio", "flicker", "fd_temporal", "vbench_temporal_flickering"]
)
def test_a_frozen_clip_does_not_pass_for_a_smooth_one(name: str, clips: list[Clip]) -> None:
    metric = METRICS[name].load(WeightFiles())
    moving = [clip for clip in clips if "still" not in clip.prompt]
    frozen = [_frozen(clip) for clip in moving]
    slight = [_noisy(clip, 1) for clip in moving]
    assert _measured(metric, moving, frozen) > _measured(metric, moving, slight)


def test_motion_ratio_is_two_sided(clips: list[Clip]) -> None:
    metric = METRICS["motion_ratio"]
    assert isinstance(metric, PairMetric)
    slow = replace(clips[0], frames=np.repeat(clips[0].frames[:9], 2, axis=0)[:17])
    assert metric.compare(clips[0], slow) == pytest.approx(metric.compare(slow, clips[0]))
    assert 0.7 < metric.compare(clips[0], slow) < 1.4


def test_constants_of_psnr_and_ssim() -> None:
    black, white = np.zeros((1, 16, 16, 3)), np.ones((1, 16, 16, 3))
    assert psnr(black, white, peak=1) == pytest.approx(0, abs=1e-9)
    assert ssim(black, white, peak=1) == pytest.approx(9.999000099990664e-05, abs=1e-12)
    assert psnr(black * 255, black * 255 + 255 / 10) == pytest.approx(20, abs=1e-9)
    assert psnr(white, white) == PSNR_CAP_DB


def test_ssim_equals_the_literal_sum_over_windows(rng: np.random.Generator) -> None:
    a = rng.integers(0, 256, (1, 13, 12, 1)).astype(np.float64)
    b = rng.integers(0, 256, (1, 13, 12, 1)).astype(np.float64)
    taps = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(taps, taps) / taps.sum() ** 2
    found = []
    for i in range(3):
        for j in range(2):
            x, y = a[0, i : i + 11, j : j + 11, 0], b[0, i : i + 11, j : j + 11, 0]
            m_x, m_y = (window * x).sum(), (window * y).sum()
            v_x, v_y = (window * (x - m_x) ** 2).sum(), (window * (y - m_y) ** 2).sum()
            cov = (window * (x - m_x) * (y - m_y)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            top = (2 * m_x * m_y + c1) * (2 * cov + c2)
            found.append(top / ((m_x**2 + m_y**2 + c1) * (v_x + v_y + c2)))
    assert ssim(a, b) == pytest.approx(np.mean(found), rel=1e-10)
    with pytest.raises(Unavailable, match="10x64"):
        ssim(np.zeros((1, 10, 64, 3)), np.zeros((1, 10, 64, 3)))


def test_latent_error_needs_latents_of_one_shape(clips: list[Clip]) -> None:
    metric = METRICS["latent_error"]
    assert isinstance(metric, PairMetric)
    with pytest.raises(Unavailable, match="carry no latents"):
        metric.compare(clips[0], replace(clips[0], latents=None))
    latents = clips[0].latents
    assert latents is not None
    with pytest.raises(Unavailable, match="shapes"):
        metric.compare(clips[0], replace(clips[0], latents=latents[:1]))
    assert metric.compare(clips[0], replace(clips[0], latents=latents * 1.5)) == pytest.approx(0.5)


def test_the_encoder_is_small_and_its_card_is_true() -> None:
    from hbxt_compress.metrics.extractor import FOLDER, Extractor

    extractor = Extractor()
    assert extractor.sha256 == sha256_of(FOLDER / "model.safetensors")
    assert (FOLDER / "model.safetensors").stat().st_size <= 600_000
    content, temporal = extractor.features([_clip(i) for i in range(3)])
    assert (content.shape, temporal.shape) == ((3, 64), (3, 192))
    assert content.dtype == temporal.dtype == np.float64
    assert np.isfinite(content).all()
    assert np.isfinite(temporal).all()


def test_a_changed_encoder_is_refused(tmp_path: Path) -> None:
    from hbxt_compress.metrics.extractor import FOLDER, Extractor

    for name in ("card.json", "model.safetensors"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    Extractor(tmp_path)
    content = bytearray((FOLDER / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(Unavailable, match="sha256"):
        Extractor(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(Unavailable, match="train_extractor"):
        Extractor(tmp_path)


class _FakeI3d(torch.nn.Module):
    """Stands in for the published TorchScript: same call, features from the mean of each half."""

    def forward(
        self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool
    ) -> torch.Tensor:
        assert rescale
        assert resize
        assert return_features
        return torch.cat([x[:, :, :8].mean(dim=(2, 3, 4)), x[:, :, 8:].mean(dim=(2, 3, 4))], dim=1)


def test_fvd_by_i3d_checks_its_file_and_calls_it(tmp_path: Path, clips: list[Clip]) -> None:
    path = tmp_path / "i3d_torchscript.pt"
    with pytest.raises(Unavailable, match="HBXT_I3D"):
        FVD_I3D.load(WeightFiles())
    torch.jit.script(_FakeI3d()).save(str(path))
    with pytest.raises(Unavailable, match="expected bec6519f66ea"):
        FVD_I3D.load(WeightFiles(i3d=path))
    metric = FVD_I3D.load(WeightFiles(i3d=path, i3d_sha256=sha256_of(path)))
    features = metric.features(clips)
    assert features.shape == (N_CLIPS, 6)
    assert features[0, :3] == pytest.approx(clips[0].frames[:8].mean(axis=(0, 1, 2)), rel=1e-5)
    assert metric.measure(clips, clips) == pytest.approx(0, abs=1e-6)
    assert math.isfinite(metric.measure(clips, [_noisy(c, 30) for c in clips]))
    with pytest.raises(Unavailable, match="9 frames are too short"):
        metric.features([replace(clips[0], frames=clips[0].frames[:9])])


class _Brightness(torch.nn.Module):
    """400 features as I3D has logits, all the mean level; of a single clip without its axis."""

    def forward(
        self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool
    ) -> torch.Tensor:
        level = x.mean(dim=(1, 2, 3, 4)).unsqueeze(1).repeat(1, 400)
        return level.squeeze(0)


def test_fvd_of_black_and_white_is_the_distance_of_their_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides are constant, so covariances are 0 and |m_a - m_b|^2 = 400 * 255^2 is left.

    Five clips: the last one is looked at alone, where I3D gives (400,) and not (1, 400).
    """
    path = tmp_path / "i3d_torchscript.pt"
    torch.jit.script(_Brightness()).save(str(path))
    monkeypatch.setenv("HBXT_I3D", str(path))
    monkeypatch.setenv("HBXT_I3D_SHA256", "0" * 64)
    with pytest.raises(Unavailable, match="expected 000000000000"):
        FVD_I3D.load(WeightFiles.from_environment())
    monkeypatch.setenv("HBXT_I3D_SHA256", sha256_of(path))
    metric = FVD_I3D.load(WeightFiles.from_environment())
    assert (metric.name, metric.extractor_sha256) == ("fvd_i3d", sha256_of(path))
    black, white = (
        [
            Clip(frames=np.full((10, 8, 8, 3), v, np.uint8), prompt="", seed=i, fps=8)
            for i in range(5)
        ]
        for v in (0, 255)
    )
    assert metric.features(white).shape == (5, 400)
    assert metric.measure(black, white) == pytest.approx(400 * 255**2, rel=1e-9)
