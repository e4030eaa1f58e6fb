"""Noised clips: states as the formula says, sizes that fit, files known by their bytes."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hbxt_compress.clips import read_video, write_mp4
from hbxt_compress.errors import CalibrationError, SourceError
from hbxt_compress.geometry import Geometry
from hbxt_compress.machine import Machine
from hbxt_compress.models import family_of
from hbxt_compress.prompts import PromptSet, load_prompts, seed_of
from hbxt_compress.runtime.noise import noise
from hbxt_compress.stages.calibrate import calibrate
from hbxt_compress.stages.noise_clips import noise_clips
from hbxt_compress.stages.probe import probe
from hbxt_compress.stages.walk import walk
from hbxt_compress.store import Entry, Store, Work
from hbxt_compress.trajectories import load_trajectories
from tests.micro import write_micro_wan
from tests.observed import source_of, with_two_experts
from tests.real_clips import CAPTIONS, write_clips, write_set


@pytest.fixture
def clip_set(tmp_path: Path) -> PromptSet:
    write_clips(tmp_path / "clips")
    return load_prompts(str(write_set(tmp_path / "real.yaml", {})))


def _noised(model: Path, prompts: PromptSet, folder: Path) -> Entry:
    folder.mkdir()
    noise_clips(Work(folder), source_of(model), prompts, Machine())
    return Entry(folder=folder, stage="noise_clips", key="k", digest="d")


@pytest.mark.parametrize("residual", [True, False], ids=["wan2.2-ti2v-vae", "wan2.1-vae"])
def test_states_are_latents_under_noise_at_the_samplers_levels(
    residual: bool, clip_set: PromptSet, tmp_path: Path
) -> None:
    """x_t = (1 - sigma) x0 + sigma eps: sigma from diffusers' scheduler, x0 from its own VAE."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler  # once torchvision is mended

    model = write_micro_wan(tmp_path / "wan", residual_vae=residual)
    states = load_trajectories(_noised(model, clip_set, tmp_path / "n").folder)
    scheduler = UniPCMultistepScheduler.from_pretrained(model, subfolder="scheduler")
    scheduler.set_timesteps(3)
    vae = AutoencoderKLWan.from_pretrained(model / "vae")
    assert len(states) == 3
    for i, one in enumerate(states):
        path = tmp_path / "clips" / f"clip{i}.mp4"
        frames = torch.from_numpy(read_video(path)[2:7, :, 8:40]).float()  # the middle of all axes
        with torch.no_grad():
            posterior = vae.encode(frames.permute(3, 0, 1, 2)[None] / 127.5 - 1).latent_dist
        x0 = (posterior.mean[0] - 0.1) / 1.5
        digest = clip_set.clips.files[i].sha256
        assert one.latents_KCTHW.shape == (2, 4, 2, 4, 4)
        for k, x in zip((0, 2), one.latents_KCTHW, strict=True):
            sigma = float(scheduler.sigmas[k])
            eps = torch.from_numpy(noise(seed_of(5, f"{digest}:{k}"), (4, 2, 4, 4)))
            torch.testing.assert_close(x, (1 - sigma) * x0 + sigma * eps, rtol=1e-5, atol=1e-5)
        assert one.timesteps_K.tolist() == scheduler.timesteps[[0, 2]].tolist()
        assert one.guidance_K.tolist() == [3.0, 3.0]


def test_noise_differs_by_clip_and_step(
    clip_set: PromptSet, micro_wan: Path, tmp_path: Path
) -> None:
    first, second, _ = load_trajectories(_noised(micro_wan, clip_set, tmp_path / "n").folder)
    noisiest = [first.latents_KCTHW[0], second.latents_KCTHW[0], first.latents_KCTHW[1]]
    for i, a in enumerate(noisiest):
        for b in noisiest[:i]:
            together = torch.stack([a.flatten(), b.flatten()])
            assert abs(float(torch.corrcoef(together)[0, 1])) < 0.4


def test_texts_are_tokens_as_those_of_trajectories(
    clip_set: PromptSet, micro_wan: Path, tmp_path: Path
) -> None:
    noised = load_trajectories(_noised(micro_wan, clip_set, tmp_path / "n").folder)
    prompts = PromptSet(
        name="p", summary="s", prompts=CAPTIONS[:2], seed=5, n_steps=3, observe=(0, 2)
    )
    (tmp_path / "own").mkdir()
    calibrate(Work(tmp_path / "own"), source_of(micro_wan), prompts, Machine())
    for one, other in zip(load_trajectories(tmp_path / "own"), noised, strict=False):
        for name in ("timesteps_K", "guidance_K", "ids_1S", "mask_1S", "none_ids_1S"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert one.latents_KCTHW.shape == other.latents_KCTHW.shape


def test_encoding_is_the_inverse_of_decoding_in_the_samplers_units(micro_wan: Path) -> None:
    """What decode un-normalises, encode normalises; a random VAE inverts nothing itself."""
    source = source_of(micro_wan)
    family = family_of(source)

    class Same(torch.nn.Module):
        def encode(self, x: torch.Tensor) -> Any:
            return type("O", (), {"latent_dist": type("P", (), {"mode": lambda self: x})()})

        def decode(self, z: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
            return (z,)

    z = torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    back = family.encode(source, Same(), family.decode(source, Same(), z))
    torch.testing.assert_close(back, z)


def test_smaller_frames_are_scaled_and_cut_in_the_middle(micro_wan: Path, tmp_path: Path) -> None:
    """96x64 to 32x32: halved to 48x32 by the antialiased filter, then 8 columns off each side."""
    from hbxt_compress.stages import noise_clips as module

    frames = np.random.default_rng(0).integers(0, 255, (9, 64, 96, 3), dtype=np.uint8)
    write_mp4(tmp_path / "v.mp4", frames, 8)
    size = Geometry(height=32, width=32, n_frames=5, fps=8.0)
    got = module._frames(tmp_path / "v.mp4", size)
    stored = torch.from_numpy(read_video(tmp_path / "v.mp4")[2:7]).permute(0, 3, 1, 2).float()
    halved = F.interpolate(stored / 127.5 - 1, (32, 48), mode="bicubic", antialias=True)
    expected = halved[..., 8:40].clamp(-1, 1).permute(1, 0, 2, 3)[None]
    assert got.shape == (1, 3, 5, 32, 32)
    torch.testing.assert_close(got, expected)
    odd = module._frames(tmp_path / "v.mp4", replace(size, height=48, width=64))  # 72 x 48
    assert odd.shape == (1, 3, 5, 48, 64)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"height": 40}, r"height 40: must be a multiple of 16, 32 or 48"),
        ({"width": 8}, r"width 8: must be a multiple of 16, 16\nso say"),
        ({"n_frames": 6}, r"n_frames 6: must be a multiple of 4 and 1 more, 5 or 9"),
        ({"n_frames": 4}, r"n_frames 4: must be a multiple of 4 and 1 more, 1 or 5"),
        ({"height": 528}, r"height 528: is 33 tokens in a row, of at most 32"),
        ({"height": 40, "width": 40}, r"height 40(.|\n)*width 40"),
    ],
)
def test_a_size_that_the_model_cannot_take_is_refused_with_the_nearest_ones(
    size: dict[str, int], expected: str, micro_wan: Path, tmp_path: Path
) -> None:
    write_clips(tmp_path / "clips")
    prompts = load_prompts(str(write_set(tmp_path / "real.yaml", size)))
    with pytest.raises(SourceError, match=expected):
        _noised(micro_wan, prompts, tmp_path / "n")


def test_tokens_are_those_the_transformer_makes(micro_wan: Path) -> None:
    source = source_of(micro_wan)
    family = family_of(source)
    model = family.load(source, "transformer")
    for height, width, n_frames in ((32, 32, 5), (16, 64, 1), (48, 32, 13)):
        clip = Geometry(height=height, width=width, n_frames=n_frames, fps=8.0)
        patched = model.patch_embedding(torch.zeros(1, *family.latent_shape(source, clip)))
        assert patched[0, 0].numel() == family.tokens(source, clip)


def test_short_and_broken_clips_are_all_named(micro_wan: Path, tmp_path: Path) -> None:
    folder = write_clips(tmp_path / "clips", 2)
    y = np.zeros((3, 32, 32, 3), np.uint8)
    write_mp4(folder / "short.mp4", y, 8)
    (folder / "broken.mp4").write_bytes(b"nothing")
    names = ("clip0.mp4", "short.mp4", "broken.mp4")
    files = [{"file": name, "caption": "x"} for name in names]
    prompts = load_prompts(str(write_set(tmp_path / "real.yaml", {"files": files, "fps": 8.0})))
    with pytest.raises(CalibrationError) as caught:
        _noised(micro_wan, prompts, tmp_path / "n")
    text = str(caught.value)
    assert "2 of 3 clips cannot give 5 frames at 8 a second, which takes more than 0.50 s" in text
    assert "short.mp4: lasts 0.38 s" in text
    assert "broken.mp4: not a readable video" in text
    assert "clip0" not in text


def test_the_rate_is_the_models_own_unless_another_is_asked_for(
    micro_wan: Path, tmp_path: Path
) -> None:
    """Clips of 16 frames a second: at the model's 8 every second frame is taken."""
    write_clips(tmp_path / "clips", 2, n_frames=20, rate_fps=16.0)
    found = []
    for fps in ({}, {"fps": 8.0}, {"fps": 16.0}):
        prompts = load_prompts(str(write_set(tmp_path / "real.yaml", fps)))
        folder = _noised(micro_wan, prompts, tmp_path / str(len(found))).folder
        found.append(load_trajectories(folder)[0].latents_KCTHW)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_finished_clips_are_not_encoded_again(
    clip_set: PromptSet, micro_wan: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = _noised(micro_wan, clip_set, tmp_path / "n").folder
    bytes_of = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert set(bytes_of) == {f"prompt-00{i}.safetensors" for i in range(3)}
    (whole / "prompt-001.safetensors").unlink()
    caplog.set_level(logging.INFO, "hbxt_compress")
    noise_clips(Work(whole), source_of(micro_wan), clip_set, Machine())
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == bytes_of
    assert [r.getMessage() for r in caplog.records if "found" in r.getMessage()] == [
        "prompt-000.safetensors: found",
        "prompt-002.safetensors: found",
    ]
    assert [r.progress[:2] for r in caplog.records if hasattr(r, "progress")][-1] == (3, 3)


def test_results_are_filed_under_the_clips_bytes_wherever_they_lie(
    micro_wan: Path, tmp_path: Path
) -> None:
    store, source = Store(tmp_path / "store"), source_of(micro_wan)

    def key(path: Path) -> str:
        prompts = load_prompts(str(path))
        return store._address(noise_clips, {"source": source, "prompts": prompts, "on": Machine()})[
            0
        ].name

    write_clips(tmp_path / "a" / "clips")
    first = key(write_set(tmp_path / "a" / "real.yaml", {}))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert key(tmp_path / "b" / "real.yaml") == first
    renamed = tmp_path / "b" / "clips"
    (renamed / "clip1.mp4").rename(renamed / "other.mp4")
    text = (renamed / "metadata.csv").read_text()
    (renamed / "metadata.csv").write_text(text.replace("clip1.mp4", "other.mp4"))
    assert key(tmp_path / "b" / "real.yaml") == first
    (renamed / "metadata.csv").write_text(text.replace("clip1.mp4,two", "other.mp4,three"))
    assert key(tmp_path / "b" / "real.yaml") != first
    changed = tmp_path / "a" / "clips" / "clip2.mp4"
    changed.write_bytes(changed.read_bytes() + b"\0")
    assert key(tmp_path / "a" / "real.yaml") != first
    assert key(write_set(tmp_path / "b" / "real.yaml", {"n_frames": 9})) != first


def test_both_experts_see_their_share_at_the_size_of_the_clips(
    micro_wan: Path, tmp_path: Path
) -> None:
    """48x16 and 9 frames are 3 x 3 x 1 tokens, where the model's own clips are 2 x 2 x 2."""
    model = with_two_experts(micro_wan, tmp_path / "wan")
    write_clips(tmp_path / "clips", 3, n_frames=12)
    size = {"height": 16, "width": 48, "n_frames": 9}
    path = write_set(tmp_path / "real.yaml", size, observe=[0, 1, 2])
    seen = _noised(model, load_prompts(str(path)), tmp_path / "n")
    met: dict[str, set[float]] = {}
    for station in walk(source_of(model), load_trajectories(seen.folder), 1, torch.device("cpu")):
        if station.component == "text_encoder":
            continue
        for batch in station.sides.batches:
            met.setdefault(station.component, set()).update(batch.full[1].tolist())
            assert batch.full[0].shape[1:] == (4, 3, 2, 6)
    assert met == {"transformer": {999.0}, "transformer_2": {857.0, 600.0}}


def test_a_budget_can_be_measured_on_noised_clips(
    clip_set: PromptSet, micro_wan: Path, tmp_path: Path
) -> None:
    from hbxt_compress.plan import Choice

    source = source_of(micro_wan)
    seen = _noised(micro_wan, clip_set, tmp_path / "n")
    wanted = ("transformer/blocks.0.attn1.to_q", "vae_decoder/decoder.conv_out")
    choices = [
        Choice(spec=spec, formats=("int8-channel", "fp16"))
        for spec in family_of(source).layers(source)
        if spec.name in wanted
    ]
    (tmp_path / "p").mkdir()
    probe(Work(tmp_path / "p"), source, choices, seen, Machine())
    damages = json.loads((tmp_path / "p" / "damages.json").read_text())
    assert set(damages) == set(wanted)
    assert all(0 < row["int8-channel"] < 0.1 and row["fp16"] == 0 for row in damages.values())


def test_latents_that_are_not_finite_are_refused(
    clip_set: PromptSet, micro_wan: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(micro_wan, tmp_path / "wan"))
    config = json.loads((model / "vae/config.json").read_text())
    (model / "vae/config.json").write_text(json.dumps({**config, "latents_std": [1e-45] * 4}))
    with pytest.raises(CalibrationError, match=r"clip0\.mp4: the VAE's latents are not finite"):
        _noised(model, clip_set, tmp_path / "n")
