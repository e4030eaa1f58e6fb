"""The shipped model: WanPipeline and our full-precision artifact generate the same clip."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from hbxt_compress import evaluation, pipeline
from hbxt_compress.machine import Machine
from hbxt_compress.metrics.judge import expected, judge
from hbxt_compress.models import family_of
from hbxt_compress.prompts import PromptSet
from hbxt_compress.recipe import load_recipe
from hbxt_compress.runtime.generate import Runtime
from hbxt_compress.runtime.noise import noise
from hbxt_compress.runtime.session import open_session
from hbxt_compress.source import BUILTIN, locate
from hbxt_compress.stages.calibrate import calibrate
from hbxt_compress.store import Store
from hbxt_compress.suite import load_suite
from hbxt_compress.trajectories import load_trajectories

_PROMPT = "a red circle moving right on a black background"
_SEED = 7


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def full_precision(store: Store) -> Path:
    return pipeline.compress(load_recipe("fp32"), BUILTIN, store, machine=Machine())


def test_wan_pipeline_and_the_artifact_agree_over_fifty_steps(full_precision: Path) -> None:
    from diffusers import WanPipeline

    source = locate(BUILTIN)
    family = family_of(source)
    shape, clip, spec = family.latent_shape(source), family.geometry(source), family.sampler(source)
    assert spec.n_steps == 50
    start = noise(_SEED, shape)
    pipe = WanPipeline.from_pretrained(source.folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt=_PROMPT, height=clip.height, width=clip.width, num_frames=clip.n_frames,
        num_inference_steps=spec.n_steps, guidance_scale=spec.guidance,
        latents=torch.from_numpy(start[None]),
        max_sequence_length=family.text_length(source), output_type="np",
    ).frames[0]  # fmt: skip
    with Runtime.open(full_precision, provider="cpu") as runtime:
        ours = runtime.generate(_PROMPT, seed=_SEED, n_steps=50)
    assert ours.frames.shape == theirs.shape
    assert np.abs(ours.frames.astype(np.float64) - theirs * 255).max() <= 2.0
    assert judge(ours.frames).colour == "red"


def test_it_follows_prompts_it_never_saw(full_precision: Path) -> None:
    prompts = (
        _PROMPT,
        "a blue square moving up on a white background",
        "a yellow circle standing still on a gray background",
    )
    right = 0
    with Runtime.open(full_precision, provider="cpu", keep=True) as runtime:
        for prompt in prompts:
            wanted, found = (
                expected(prompt),
                judge(runtime.generate(prompt, seed=1, n_steps=20).frames),
            )
            assert wanted is not None
            right += (wanted.colour, wanted.motion) == (found.colour, found.motion)
    assert right == len(prompts)


@pytest.fixture(scope="module")
def artifacts(store: Store) -> dict[str, Path]:
    return {
        name: pipeline.compress(load_recipe(name), BUILTIN, store, machine=Machine())
        for name in ("fp16", "w8a16", "w4a16-fast", "tiny")
    }


@pytest.fixture(scope="module")
def found(store: Store, artifacts: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Metrics and bytes by recipe, of the tiny suite."""
    suite, found = load_suite("tiny"), {}
    for name, folder in artifacts.items():
        report = evaluation.evaluate(folder, suite, store, machine=Machine())
        found[name] = {one.metric: one.value or 0.0 for one in report.measurements}
        found[name]["bytes"] = report.bytes_after
    return found


@pytest.mark.timeout(900)  # four recipes on the shipped model, one of them calibrated
def test_fewer_bits_cost_quality_in_the_order_of_the_recipes(
    found: dict[str, dict[str, float]],
) -> None:
    for metric in ("psnr", "ssim", "bytes"):
        assert found["fp16"][metric] > found["w8a16"][metric] > found["w4a16-fast"][metric]
    for metric in ("latent_error", "temporal_error"):
        assert found["fp16"][metric] < found["w8a16"][metric] < found["w4a16-fast"][metric]
    assert found["fp16"]["latent_error"] == 0  # the model ships in float16


@pytest.fixture(scope="module")
def calls(store: Store) -> list[dict[str, np.ndarray]]:
    """Both guidance branches of two prompts that no recipe calibrates on, at two of six steps."""
    source, suite = locate(BUILTIN), load_suite("tiny")
    family = family_of(source)
    prompts = PromptSet(
        name="unseen", summary="", prompts=suite.prompts[:2], seed=1, n_steps=6, observe=(1, 4)
    )
    seen = store.result(calibrate, source=source, prompts=prompts, on=Machine())
    encoder = family.chain(source, "text_encoder", family.load(source, "text_encoder"))
    found = []
    for one in load_trajectories(seen.folder):
        tokens = (one.ids_1S, one.mask_1S), (one.none_ids_1S, one.none_mask_1S)
        with torch.no_grad():
            texts = [encoder.whole(*pair).numpy() for pair in tokens]
        states = zip(one.latents_KCTHW.numpy(), one.timesteps_K.numpy(), strict=True)
        for (latents, t), text in product(states, texts):
            names = ("hidden_states", "timestep", "encoder_hidden_states")
            found.append(dict(zip(names, (latents[None], np.array([t]), text), strict=True)))
    return found


def _velocities(folder: Path, calls: list[dict[str, np.ndarray]]) -> np.ndarray:
    config = json.loads((folder / "manifest.json").read_text())["session"]
    session = open_session(folder / "transformer/model.onnx", "cpu", config=config)
    return np.stack([session.run(call)["out_hidden_states"] for call in calls])


@pytest.mark.timeout(900)
def test_calibration_pays_at_the_same_bytes(
    full_precision: Path,
    artifacts: dict[str, Path],
    found: dict[str, dict[str, float]],
    calls: list[dict[str, np.ndarray]],
) -> None:
    """Both store int4-g128; two prompts to learn from already take half off the velocity's error.

    At given states: how far clips end up from each other is chance where they part ways.
    """
    assert found["tiny"]["bytes"] < 1.02 * found["w4a16-fast"]["bytes"]
    wanted = _velocities(full_precision, calls)
    error = {
        name: float(np.square(_velocities(artifacts[name], calls) - wanted).sum())
        for name in ("tiny", "w4a16-fast")
    }
    assert 0 < error["tiny"] < 0.5 * error["w4a16-fast"]
    assert found["tiny"]["psnr"] > found["w4a16-fast"]["psnr"]
