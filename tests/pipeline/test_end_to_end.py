"""The whole program on a micro model: quantize, resume after kill -9, generate, evaluate."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from torch import Tensor

from hbxt_compress import evaluation, pipeline
from hbxt_compress.artifact import Artifact
from hbxt_compress.errors import ArtifactError, SourceError
from hbxt_compress.machine import Machine
from hbxt_compress.recipe import load_recipe
from hbxt_compress.report import QualityReport
from hbxt_compress.runtime.generate import Runtime
from hbxt_compress.store import Store
from hbxt_compress.suite import Suite
from tests.micro import write_micro_wan
from tests.observed import changed

_NO_PIECE = ("journal.jsonl", "unfinished")


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_micro_wan(tmp_path_factory.mktemp("micro") / "wan")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def artifact(micro: Path, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "artifact"
    return pipeline.compress(load_recipe("tiny"), str(micro), store, machine=Machine(), out=out)


def _suite(**changes: object) -> Suite:
    document = {
        "name": "two", "summary": "two prompts", "seed": 1, "n_steps": 2,
        "metrics": ("psnr", "latent_error"), "prompts": ("a red circle", "a blue square"),
    }  # fmt: skip
    return Suite(**{**document, **changes})


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _killed_at_pieces(arguments: list[str], store: Path, out: Path) -> int:
    """Runs hbxt until it succeeds, killing it when a new piece appears, at most three times."""
    command = [sys.executable, "-m", "hbxt_compress", *arguments, "--store", str(store)]
    seen: set[str] = set()
    n_kills = 0
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                pieces = {str(p) for p in store.glob("*/*.partial/*") if p.name not in _NO_PIECE}
                if pieces - seen and n_kills < 3:  # a piece was just finished: the worst moment
                    seen |= pieces
                    process.kill()
                    n_kills += 1
                    assert not out.exists()
                time.sleep(0.02)
        code = process.returncode
    assert code == 0
    return n_kills


def test_the_artifact_is_whole_and_says_what_became_of_every_weight(
    artifact: Path, micro: Path, store: Store
) -> None:
    manifest = Artifact.open(artifact).manifest
    planned = pipeline.plan(load_recipe("tiny"), str(micro), store, machine=Machine())
    assert {layer.name: layer.format for layer in manifest.layers} == {
        layer.spec.name: layer.weights for layer in planned.layers
    }
    for layer in manifest.layers:
        assert layer.reason
        if layer.format.startswith("int"):
            assert layer.error is not None
            assert 0 < layer.error < 0.1
    for component, sizes in planned.components().items():
        graphs = sum(p.stat().st_size for p in (artifact / component).glob("*.onnx"))
        assert 0 <= manifest.components[component]["after"] - sizes["after"] <= graphs + 8192
        assert manifest.components[component]["before"] == sizes["before"]


def test_the_runtime_generates_from_it_and_repeats_itself(artifact: Path) -> None:
    with Runtime.open(artifact, provider="cpu") as runtime:
        one = runtime.generate("a red circle", seed=3, check=False, keep_latents=True)
        two = runtime.generate("a red circle", seed=3, check=False)
        other = runtime.generate("a red circle", seed=4, check=False)
    assert one.frames.shape == (5, 32, 32, 3)
    assert one.latents is not None
    assert one.latents.shape == (3, 4, 2, 4, 4)
    assert np.array_equal(one.frames, two.frames)
    assert not np.array_equal(one.frames, other.frames)


def test_two_runs_give_the_same_bytes(artifact: Path, micro: Path, tmp_path: Path) -> None:
    again = pipeline.compress(
        load_recipe("tiny"),
        str(micro),
        Store(tmp_path / "s"),
        machine=Machine(),
        out=tmp_path / "a",
    )
    assert _digest(again) == _digest(artifact)


def test_killed_again_and_again_it_finishes_with_the_same_bytes(
    artifact: Path, micro: Path, tmp_path: Path
) -> None:
    out = tmp_path / "artifact"
    arguments = ["quantize", "tiny", "--model", str(micro), "--out", str(out)]
    assert _killed_at_pieces(arguments, tmp_path / "store", out) == 3
    assert _digest(out) == _digest(artifact)


def test_the_reference_against_itself_is_perfect(micro: Path, store: Store, tmp_path: Path) -> None:
    folder = pipeline.compress(
        load_recipe("fp32"), str(micro), store, machine=Machine(), out=tmp_path / "fp32"
    )
    report = evaluation.evaluate(folder, _suite(), store, machine=Machine())
    values = {one.metric: one.value for one in report.measurements}
    assert values["latent_error"] == 0
    assert values["psnr"] is not None
    assert values["psnr"] >= 99


def test_evaluation_compares_with_full_precision(
    artifact: Path, store: Store, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    report = evaluation.evaluate(artifact, _suite(), store, machine=Machine(), out=out)
    values = {one.metric: one for one in report.measurements}
    assert report.n_clips == 2
    assert values["psnr"].value is not None
    assert 5 < values["psnr"].value < 90
    assert values["latent_error"].value is not None
    assert values["latent_error"].value > 0
    assert report.bytes_after < report.bytes_before
    assert {"report.json", "report.md", "report.html"} <= {p.name for p in out.iterdir()}
    assert json.loads((out / "report.json").read_text())["n_clips"] == 2
    again = evaluation.evaluate(artifact, _suite(), store, machine=Machine(), out=out)
    assert again == report


def test_killed_while_sampling_it_finishes_with_the_same_report(
    artifact: Path, store: Store, tmp_path: Path
) -> None:
    suite = tmp_path / "two.yaml"
    suite.write_text(
        "name: two\nsummary: two prompts\nseed: 1\nn_steps: 2\nmetrics: [psnr, latent_error]\n"
        "prompts: [a red circle, a blue square]\n"
    )
    out = tmp_path / "report"
    arguments = ["evaluate", str(artifact), "--suite", str(suite), "--out", str(out)]
    assert _killed_at_pieces(arguments, tmp_path / "store", out) == 3
    undisturbed = evaluation.evaluate(artifact, _suite(), store, machine=Machine())
    killed = QualityReport.load(out)
    assert killed.seconds.keys() == {"candidate", "reference"}
    assert replace(killed, seconds={}) == replace(undisturbed, seconds={})


def test_evaluation_refuses_another_model(artifact: Path, store: Store, tmp_path: Path) -> None:
    other = write_micro_wan(tmp_path / "other", seed=5)
    with pytest.raises(SourceError, match="not the model that"):
        evaluation.evaluate(artifact, _suite(), store, model=str(other), machine=Machine())


def test_a_changed_byte_is_refused(
    artifact: Path, micro: Path, store: Store, tmp_path: Path
) -> None:
    copy = pipeline.compress(
        load_recipe("tiny"), str(micro), store, machine=Machine(), out=tmp_path / "copy"
    )
    data = copy / "transformer" / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"transformer/model\.onnx\.data"):
        Runtime.open(copy)


def test_status_tells_what_is_done(
    micro: Path, store: Store, artifact: Path, tmp_path: Path
) -> None:
    assert artifact.exists()
    done = pipeline.status(load_recipe("tiny"), str(micro), store)
    assert [(stage, state) for stage, _, state, _ in done] == [
        ("calibrate", "done"),
        ("quantize", "done"),
        ("refine", "done"),
        ("export", "done"),
    ]
    fresh = pipeline.status(load_recipe("tiny"), str(micro), Store(tmp_path))
    assert [state for *_, state, _ in fresh] == ["missing"]


def test_a_model_with_two_experts_runs_both(tmp_path: Path) -> None:
    model = write_micro_wan(tmp_path / "wan", two_experts=True, residual_vae=False)
    recipe = load_recipe("tiny")
    folder = pipeline.compress(recipe, str(model), Store(tmp_path / "store"), machine=Machine())
    quantized = {layer.name for layer in Artifact.open(folder).manifest.layers if layer.error}
    for expert in ("transformer", "transformer_2"):
        assert f"{expert}/blocks.1.ffn.net.2" in quantized
    with Runtime.open(folder, provider="cpu") as runtime:
        assert runtime.manifest.sampler.boundary == 0.875
        runtime.generate("a red circle", n_steps=4, check=False)
        assert {"transformer/model.onnx", "transformer_2/model.onnx"} <= set(runtime.providers)


@pytest.mark.parametrize(("name", "op"), [("w8a8", "MatMulInteger"), ("w8a8-static", "MatMul")])
def test_smoothed_8_bit_inputs_reach_the_graph(
    name: str, op: str, micro: Path, store: Store, tmp_path: Path
) -> None:
    """With two input channels a hundred times as large as the others."""
    louder = changed(micro, tmp_path / "louder", _louder)
    smooth = load_recipe(name).model_copy(update={"calibration": "tiny"})
    plain = smooth.model_copy(update={"prepare": ()})
    made = [
        pipeline.compress(recipe, str(louder), store, machine=Machine(), out=tmp_path / f"{i}")
        for i, recipe in enumerate((smooth, plain, load_recipe("fp32")))
    ]
    rounded = [one for one in Artifact.open(made[0]).manifest.layers if one.activations != "keep"]
    smoothed = [one for one in rounded if "input smooth" in one.how]
    assert len(rounded) == 20
    assert any(one.name.endswith("attn1.to_q") for one in smoothed)
    nodes = onnx.load(made[0] / "transformer/model.onnx", load_external_data=False).graph.node
    assert sum(node.op_type == op for node in nodes) >= len(rounded)
    errors = [np.square(_latents(one) - _latents(made[2])).mean() for one in made[:2]]
    assert 0 < errors[0] < errors[1] / 2


def _latents(artifact: Path) -> np.ndarray:
    with Runtime.open(artifact, provider="cpu") as runtime:
        clip = runtime.generate("red", seed=3, n_steps=2, check=False, keep_latents=True)
    assert clip.latents is not None
    return clip.latents


def _louder(name: str, tensor: Tensor) -> Tensor:
    """The modulation of self-attention's input, two channels of it a hundred times as large."""
    if name.startswith("transformer/") and name.endswith("scale_shift_table"):
        tensor = tensor.clone()
        tensor[:, 1, [3, 9]] = 100
    return tensor
