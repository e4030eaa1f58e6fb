"""The denoising loop and the decoder on a small fake artifact, against numpy and by invariants."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hbxt_compress.clips import to_uint8
from hbxt_compress.errors import ArtifactError, HealthError, RuntimeUnavailable, UsageError
from hbxt_compress.runtime import Runtime, generate
from hbxt_compress.runtime.scheduler import Denoiser
from hbxt_compress.runtime.text import PromptTokenizer
from tests.fake_artifact import (
    LATENT_SHAPE,
    SAMPLER,
    TEXT_LENGTH,
    decoded,
    make_artifact,
    rewrite_manifest,
    text_features,
    velocity,
)

PROMPT = "a red circle moving left"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("runtime") / "artifact")


@pytest.fixture
def runtime(folder) -> Runtime:
    return Runtime.open(folder, provider="cpu", n_threads=1)


def by_hand(folder: Path, sampler, prompt: str, negative: str, noise: np.ndarray) -> np.ndarray:
    """The states after each step, from the graphs' arithmetic redone in numpy."""
    tokenize = PromptTokenizer(folder / "tokenizer", TEXT_LENGTH)
    cond, uncond = (text_features(*tokenize(text)) for text in (prompt, negative))
    denoiser, x, states = Denoiser(sampler), noise[None], []
    for t in denoiser.timesteps:
        late = sampler.boundary is not None and t < sampler.boundary * 1000
        scale = sampler.guidance_2 if late and sampler.guidance_2 else sampler.guidance
        v_cond, v_uncond = (velocity(x, t, c, seed=2 if late else 1) for c in (cond, uncond))
        x = denoiser.step(v_uncond + scale * (v_cond - v_uncond), x)
        states.append(x[0])
    return np.stack(states)


def noise(seed: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(
        LATENT_SHAPE, dtype=np.float32
    )


def test_clip_equals_the_arithmetic_done_by_hand(folder, runtime):
    clip = runtime.generate(PROMPT, negative="white", seed=5, keep_latents=True)
    expected = by_hand(folder, SAMPLER, PROMPT, "white", noise(5))
    assert clip.latents.shape == (3, *LATENT_SHAPE)
    np.testing.assert_allclose(clip.latents, expected, rtol=1e-4, atol=1e-4)
    difference = clip.frames.astype(int) - to_uint8(decoded(clip.latents[-1]))
    assert clip.frames.shape == (9, 16, 16, 3)
    assert np.abs(difference).max() <= 1
    assert (clip.prompt, clip.seed, clip.fps) == (PROMPT, 5, 8.0)


def test_same_seed_same_bytes_other_seed_other_bytes(runtime):
    first, again, other = (runtime.generate(PROMPT, seed=seed) for seed in (1, 1, 2))
    assert first.sha256 == again.sha256 != other.sha256
    assert first.latents is None


def test_given_noise_replaces_the_seed(runtime):
    assert (
        runtime.generate(PROMPT, latents=noise(7)).sha256 == runtime.generate(PROMPT, seed=7).sha256
    )


def test_guidance_one_runs_the_transformer_once_a_step(folder, runtime, monkeypatch):
    encoded = []
    original = Runtime.encode
    monkeypatch.setattr(Runtime, "encode", lambda self, p: encoded.append(p) or original(self, p))
    clip = runtime.generate(PROMPT, guidance=1.0, keep_latents=True, negative="white", check=False)
    assert encoded == [PROMPT]
    expected = by_hand(folder, replace(SAMPLER, guidance=1.0), PROMPT, "white", noise(0))
    np.testing.assert_allclose(clip.latents, expected, rtol=1e-4, atol=1e-4)


def test_negative_prompt_matters_only_with_guidance(runtime):
    with_guidance = [runtime.denoise(PROMPT, negative=n) for n in ("", "white")]
    assert np.abs(with_guidance[0] - with_guidance[1]).max() > 1e-3
    without = [runtime.denoise(PROMPT, negative=n, guidance=1.0) for n in ("", "white")]
    np.testing.assert_array_equal(*without)


def test_steps_and_progress(runtime):
    seen = []
    clip = runtime.generate(
        PROMPT, n_steps=5, keep_latents=True, progress=lambda *n: seen.append(n)
    )
    assert seen == [(i, 5) for i in range(1, 6)]
    assert clip.latents.shape[0] == 5
    np.testing.assert_array_equal(runtime.denoise(PROMPT, n_steps=5), clip.latents[-1])


@pytest.mark.parametrize("keep", [False, True])
def test_two_experts(tmp_path, keep):
    sampler = replace(SAMPLER, n_steps=6, boundary=0.8, guidance=3.0, guidance_2=2.0)
    folder = make_artifact(tmp_path / "two", sampler=sampler)
    with Runtime.open(folder, keep=keep) as runtime:
        clip = runtime.generate(PROMPT, seed=2, keep_latents=True, check=False)
        n_late = sum(sampler.second_expert(t) for t in sampler.timesteps())
        assert 0 < n_late < 6
        expected = by_hand(folder, sampler, PROMPT, "", noise(2))
        np.testing.assert_allclose(clip.latents, expected, rtol=1e-4, atol=1e-4)
        assert "transformer_2/model.onnx" in runtime.providers


def test_padding_rows_are_zero(folder, runtime):
    features = runtime.encode("red")
    ids, mask = PromptTokenizer(folder / "tokenizer", TEXT_LENGTH)("red")
    assert mask.sum() == 2
    np.testing.assert_allclose(features, text_features(ids, mask), atol=1e-6)
    assert (features[0, 2:] == 0).all()
    assert (features[0, :2] != 0).any()


def opened(runtime: Runtime) -> set[str]:
    return {path.split("/")[0] for path in runtime._residents.open}


def test_one_component_is_in_memory_at_a_time(runtime):
    residents = []
    runtime.generate(PROMPT, progress=lambda *_: residents.append(opened(runtime)))
    assert residents == [{"transformer"}] * 3
    frames = runtime.frames(noise(0))
    next(frames)
    assert opened(runtime) == {"vae_decoder"}
    runtime.generate(PROMPT)
    assert opened(runtime) == set()


def test_keep_opens_each_graph_once(folder, monkeypatch):
    paths = []
    real = generate.open_session

    def counting(path, *others, **options):
        paths.append(path)
        return real(path, *others, **options)

    monkeypatch.setattr(generate, "open_session", counting)
    with Runtime.open(folder, keep=True) as runtime:
        digests = {runtime.generate(PROMPT, seed=1).sha256 for _ in range(3)}
        assert len(paths) == 4
        assert set(runtime.providers.values()) == {"cpu"}
    assert opened(runtime) == set()
    assert digests == {Runtime.open(folder).generate(PROMPT, seed=1).sha256}


def test_frames_stream(runtime, monkeypatch):
    """The second latent frame is decoded only when its first frame is asked for."""
    frames = runtime.frames(noise(0))
    first = next(frames)
    assert (first.shape, first.dtype) == ((16, 16, 3), np.uint8)
    assert "vae_decoder/model.onnx" not in runtime.providers
    assert len(list(frames)) == 8
    assert "vae_decoder/model.onnx" in runtime.providers


@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        ("black", "all black"),
        ("constant", "constant: no frame varies"),
        ("nan", "not finite after step 1"),
        ("vae nan", "frame 0: "),
    ],
)
def test_unhealthy_output_is_an_error_unless_asked_for(tmp_path, fault, finding):
    runtime = Runtime.open(make_artifact(tmp_path / "sick", fault=fault))
    with pytest.raises(HealthError) as error:
        runtime.generate(PROMPT, seed=4)
    assert finding in str(error.value)
    assert "(seed 4)" in str(error.value)
    assert runtime.generate(PROMPT, seed=4, check=False).frames.shape == (9, 16, 16, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_steps": 0}, "n_steps 0"),
        ({"guidance": 0.0}, "guidance 0.0"),
        ({"seed": -1}, "seed -1"),
        ({"latents": np.zeros((3, 3, 2, 4), dtype=np.float32)}, r"latents are \(3, 3, 2, 4\)"),
    ],
)
def test_bad_arguments(runtime, arguments, message):
    with pytest.raises(UsageError, match=message):
        runtime.generate(PROMPT, **arguments)


def test_damage_is_refused_on_opening(tmp_path):
    folder = make_artifact(tmp_path / "a")
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer/tokenizer\.json"):
        Runtime.open(folder)


def test_session_entries_of_the_manifest_are_applied(tmp_path, monkeypatch):
    folder = make_artifact(tmp_path / "a", session={"session.of_the_future": "1"})
    seen = []
    real = generate.open_session
    monkeypatch.setattr(
        generate, "open_session", lambda *a, **k: seen.append(k["config"]) or real(*a, **k)
    )
    Runtime.open(folder).generate(PROMPT)
    assert seen == [{"session.of_the_future": "1"}] * 4


def test_a_missing_provider_is_an_error(folder):
    with pytest.raises(RuntimeUnavailable, match="text_encoder"):
        Runtime.open(folder, provider="rocm").generate(PROMPT)


def test_manifest_can_be_rewritten(tmp_path):
    folder = make_artifact(tmp_path / "a")
    rewrite_manifest(folder, sampler=replace(SAMPLER, n_steps=1))
    assert Runtime.open(folder).manifest.sampler.n_steps == 1


def test_no_torch(folder, tmp_path):
    """Generates and writes a video in a process where torch and its friends cannot be imported."""
    script = f"""
import sys
for name in ("torch", "torchvision", "diffusers", "transformers", "onnx", "pydantic"):
    sys.modules[name] = None
from pathlib import Path
from hbxt_compress.clips import ClipSet, write_mp4
from hbxt_compress.runtime import Runtime, generate
with Runtime.open(Path({str(folder)!r})) as runtime:
    clip = runtime.generate({PROMPT!r}, seed=1)
ClipSet(clips=(clip,)).save(Path({str(tmp_path / "set")!r}))
write_mp4(Path({str(tmp_path / "clip.mp4")!r}), clip.frames, clip.fps)
shelves = "algorithms", "formats", "graph", "metrics", "models", "pipeline", "render", "stages"
loaded = [m for m in sys.modules if m.split(".")[0] == "hbxt_compress" and m.count(".")]
assert not [m for m in loaded if m.split(".")[1] in shelves], loaded
sys.stdout.write(clip.sha256)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == Runtime.open(folder).generate(PROMPT, seed=1).sha256
    assert (tmp_path / "clip.mp4").is_file()


def test_streamed_frames_equal_the_clip_and_an_unhealthy_one_is_refused(tmp_path: Path) -> None:
    folder = make_artifact(tmp_path / "good")
    with Runtime.open(folder, provider="cpu") as runtime:
        whole = runtime.generate("a red circle", seed=2, n_steps=2)
        streamed = np.stack(list(runtime.stream("a red circle", seed=2, n_steps=2)))
    assert np.array_equal(streamed, whole.frames)
    for fault in ("black", "constant", "nan"):
        sick = make_artifact(tmp_path / fault, fault=fault)
        with Runtime.open(sick, provider="cpu") as runtime, pytest.raises(HealthError):
            list(runtime.stream("a red circle", n_steps=1))
