"""Which provider runs a graph, and what is said where it cannot."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from hbxt_compress.errors import ArtifactError, RuntimeUnavailable, UsageError
from hbxt_compress.manifest import TargetRecord
from hbxt_compress.runtime import session
from hbxt_compress.runtime.gpus import Gpu
from hbxt_compress.runtime.session import installed_providers, open_session
from hbxt_compress.runtime.settings import ProviderSettings, cache_folder, settings_for
from tests.fake_artifact import LATENT_SHAPE, TEXT_LENGTH, make_artifact, velocity


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> Path:
    folder = make_artifact(tmp_path_factory.mktemp("session") / "artifact")
    return folder / "transformer" / "model.onnx"


def pretend(monkeypatch, *names: str) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [*names, "CPUExecutionProvider"])


class ForgetfulSession:
    """What onnxruntime-rocm does without ROCm: takes the request and computes on the CPU."""

    def __init__(self, path, options, providers=None, enable_fallback=1):
        self.asked, self.options, self.retries = providers, options, enable_fallback

    def disable_fallback(self):
        pass

    def get_providers(self):
        return ["CPUExecutionProvider"]


def test_cpu_runs_the_graph(graph):
    opened = open_session(graph, "cpu", n_threads=1)
    assert opened.provider == "cpu"
    assert opened.input_shapes["hidden_states"] == (1, *LATENT_SHAPE)
    generator = np.random.default_rng(0)
    x = generator.standard_normal((1, *LATENT_SHAPE)).astype(np.float32)
    text = generator.standard_normal((1, TEXT_LENGTH, 4)).astype(np.float32)
    t = np.array([500], dtype=np.float32)
    inputs = {"hidden_states": x, "timestep": t, "encoder_hidden_states": text}
    out = opened.run(inputs)["out_hidden_states"]
    np.testing.assert_allclose(out, velocity(x, 500, text), rtol=1e-5, atol=1e-6)


def test_auto_without_any_gpu_provider_is_the_cpu_and_says_so(graph, monkeypatch, caplog):
    pretend(monkeypatch)
    with caplog.at_level(logging.INFO):
        assert open_session(graph, "auto").provider == "cpu"
    assert "transformer/model.onnx runs on cpu" in caplog.text


def test_unknown_provider(graph):
    with pytest.raises(UsageError, match="'cuda': must be one of auto, cpu, migraphx"):
        open_session(graph, "cuda")


@pytest.mark.parametrize("provider", ["migraphx", "rocm", "amdgpu"])
def test_a_provider_that_is_not_installed(graph, monkeypatch, provider):
    pretend(monkeypatch)
    with pytest.raises(RuntimeUnavailable) as error:
        open_session(graph, provider)
    message = str(error.value)
    assert f"{provider}: not part of onnxruntime {ort.__version__}" in message
    assert f"onnxruntime {ort.__version__} with cpu" in message
    assert "--provider cpu" in message


@pytest.mark.parametrize("provider", ["rocm", "auto"])
def test_a_silent_fallback_is_refused(graph, monkeypatch, provider):
    pretend(monkeypatch, "ROCMExecutionProvider")
    monkeypatch.setattr(ort, "InferenceSession", ForgetfulSession)
    with pytest.raises(RuntimeUnavailable, match="runs on CPUExecutionProvider"):
        open_session(graph, provider)


def test_a_gpu_is_asked_for_alone_and_without_fallback(graph, monkeypatch, caplog):
    seen = []

    class GpuSession(ForgetfulSession):
        def get_providers(self):
            seen.append(self)
            return ["MIGraphXExecutionProvider"]

        def get_inputs(self):
            return []

        get_outputs = get_inputs

    pretend(monkeypatch, "MIGraphXExecutionProvider")
    monkeypatch.setattr(ort, "InferenceSession", GpuSession)
    monkeypatch.setenv("HBXT_OWN", "user's")
    monkeypatch.delenv("HBXT_NEW", raising=False)
    told = {
        "migraphx": ProviderSettings(
            environment={"HBXT_NEW": "attention", "HBXT_OWN": "fused"},
            options={"migraphx_fp16_enable": "1"},
        ),
        "cpu": ProviderSettings(environment={"HBXT_OWN": "cpu"}),
    }
    opened = open_session(graph, "auto", settings=told)
    assert os.environ["HBXT_NEW"] == "attention"
    assert os.environ["HBXT_OWN"] == "user's"
    assert "HBXT_OWN is user's here; this artifact was made for fused" in caplog.text
    monkeypatch.delenv("HBXT_NEW")
    assert opened.provider == "migraphx"
    assert seen[0].asked == [("MIGraphXExecutionProvider", {"migraphx_fp16_enable": "1"})]
    assert seen[0].retries == 0
    assert seen[0].options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


def test_auto_names_every_gpu_that_failed(graph, monkeypatch):
    class Broken:
        def __init__(self, path, options, providers=None, enable_fallback=1):
            where = "/a/b.cc:1 f() [ONNXRuntimeError] : 1 : FAIL : "
            raise RuntimeError(f"{where}{providers[0][0]} is broken\nand more")

    pretend(monkeypatch, "MIGraphXExecutionProvider", "ROCMExecutionProvider")
    monkeypatch.setattr(ort, "InferenceSession", Broken)
    with pytest.raises(RuntimeUnavailable) as error:
        open_session(graph, "auto")
    message = str(error.value)
    assert "migraphx: MIGraphXExecutionProvider is broken\n" in message
    assert "rocm: ROCMExecutionProvider is broken\n" in message
    assert "b.cc" not in message


def test_plug_in_library_that_does_not_load(graph, monkeypatch, tmp_path):
    library = tmp_path / "libamdgpu_ep.so"
    library.write_bytes(b"not a library")
    monkeypatch.setenv(session.AMDGPU_LIBRARY, str(library))
    assert installed_providers()[0] == "amdgpu"
    with pytest.raises(RuntimeUnavailable, match=r"amdgpu: .*libamdgpu_ep\.so"):
        open_session(graph, "amdgpu")


def test_plug_in_without_a_gpu(graph, monkeypatch):
    monkeypatch.setenv(session.AMDGPU_LIBRARY, "some.so")
    monkeypatch.setattr(ort, "register_execution_provider_library", lambda name, path: None)
    with pytest.raises(RuntimeUnavailable, match="finds no GPU"):
        open_session(graph, "amdgpu")


def test_session_entries_reach_onnxruntime_even_unknown_ones(graph, monkeypatch):
    seen = []
    real = ort.InferenceSession

    def spy(path, options, **others):
        seen.append(options)
        return real(path, options, **others)

    monkeypatch.setattr(ort, "InferenceSession", spy)
    entries = {"session.qdq_matmulnbits_accuracy_level": "1", "session.of_the_future": "yes"}
    assert open_session(graph, "cpu", config=entries).provider == "cpu"
    for key, value in entries.items():
        assert seen[0].get_session_config_entry(key) == value


def test_a_graph_that_cannot_be_read(tmp_path):
    path = tmp_path / "transformer" / "model.onnx"
    path.parent.mkdir()
    path.write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match=r"transformer/model\.onnx cannot run"):
        open_session(path, "cpu")


def test_nothing_is_printed(graph, monkeypatch, capfd):
    open_session(graph, "cpu")
    with pytest.raises(ArtifactError):
        open_session(graph.with_name("absent.onnx"), "cpu")
    assert capfd.readouterr() == ("", "")


_RECORD = TargetRecord(
    runtime="migraphx",
    nodes={"runs": 3},
    settings={
        "migraphx": {
            "environment": {"MIGRAPHX_MLIR_USE_SPECIFIC_OPS": "attention"},
            "options": {"migraphx_model_cache_dir": "{cache}"},
        },
        "amdgpu": {"environment": {}, "options": {"cache_dir": "{cache}", "device_id": "0"}},
    },
)


def _gpu(target: str) -> Gpu:
    return Gpu(target=target, n_compute_units=64, vram_bytes=1 << 34)


def test_settings_are_those_of_the_first_gpu(tmp_path):
    found = settings_for({"gfx1201": _RECORD}, [_gpu("gfx1201"), _gpu("gfx1100")], tmp_path)
    assert found["migraphx"].environment == {"MIGRAPHX_MLIR_USE_SPECIFIC_OPS": "attention"}
    assert found["migraphx"].options == {"migraphx_model_cache_dir": str(tmp_path)}
    assert found["amdgpu"].options == {"cache_dir": str(tmp_path), "device_id": "0"}
    kept = settings_for({"gfx1201": _RECORD}, [_gpu("gfx1201")])["amdgpu"].options["cache_dir"]
    assert kept == str(cache_folder() / "compiled")


def test_a_gpu_that_nobody_checked_gets_no_settings_and_is_told(caplog):
    assert settings_for({"gfx1201": _RECORD}, [_gpu("gfx1102")]) == {}
    assert "was checked for gfx1201, not for the GPU here, gfx1102" in caplog.text
    caplog.clear()
    assert settings_for({"gfx1201": _RECORD}, []) == {}
    assert settings_for({}, [_gpu("gfx1201")]) == {}
    assert not caplog.text


def test_the_cache_folder_is_the_users(tmp_path):
    assert cache_folder({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "hbxt"
    assert cache_folder({"XDG_CACHE_HOME": "not/absolute"}) == Path.home() / ".cache" / "hbxt"
    assert cache_folder({}) == Path.home() / ".cache" / "hbxt"


def test_inputs_and_outputs_of_other_names_sizes_and_types_are_refused(graph):
    opened = open_session(graph, "cpu", n_threads=1)
    x = np.zeros((1, *LATENT_SHAPE), np.float32)
    text, t = np.zeros((1, TEXT_LENGTH, 4), np.float32), np.zeros(1, np.float32)
    inputs = {"hidden_states": x, "timestep": t, "encoder_hidden_states": text}
    with pytest.raises(ArtifactError, match=r"transformer/model\.onnx: takes encoder_hidden"):
        opened.run({"x": x})
    with pytest.raises(ArtifactError, match=r"model\.onnx: fails on cpu: .*hidden_states"):
        opened.run({**inputs, "hidden_states": x[:, :1]})
    with pytest.raises(ArtifactError, match=r"has no output sample of shape \[1, 'any'\]"):
        opened.run(inputs, sample=(1, None))
    for shape in ((1, 3), (1, 3, 3, 2, 4)):
        with pytest.raises(ArtifactError, match=r"gives float32 \[1, 3, 3, 2, 2\] as out_hidden"):
            opened.run(inputs, out_hidden_states=shape)
    found = opened.run(inputs, out_hidden_states=(1, 3, None, 2, 2))
    assert found["out_hidden_states"].shape == x.shape


def test_want_of_memory_is_no_damage(graph, monkeypatch):
    opened = open_session(graph, "cpu", n_threads=1)

    class Full:
        def run(self, outputs, inputs):
            raise session.RuntimeException("Failed to allocate memory for requested buffer")

    monkeypatch.setattr(opened, "_inner", Full())
    with pytest.raises(RuntimeUnavailable, match="fails on cpu: Failed to allocate"):
        opened.run(dict.fromkeys(opened.input_shapes, np.zeros(1)))
