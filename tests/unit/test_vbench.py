"""VBench: flickering against its formula, and the call of its package in a Python of its own."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from hbxt_compress.clips import Clip
from hbxt_compress.metrics import METRICS, Unavailable, WeightFiles
from hbxt_compress.metrics import vbench as vbench_module
from hbxt_compress.metrics.vbench import DIMENSIONS, VBENCH, VbenchScore, temporal_flickering
from hbxt_compress.metrics.weights import sha256_of

# A package in VBench's place: its constructor, its call, its file; scores by the first frame.
_PACKAGE = """
import json, os
from pathlib import Path
import av

class VBench:
    def __init__(self, device, full_info_dir, output_path):
        assert device == "device cpu", device
        assert full_info_dir.endswith("vbench/VBench_full_info.json"), full_info_dir
        self.out = Path(output_path)
        self.out.mkdir()

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False,
                 read_frame=False, mode="vbench_standard", **kwargs):
        assert local and mode == "custom_input"
        [dimension] = dimension_list
        assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
        assert Path(os.environ["VBENCH_CACHE_DIR"]).is_dir()
        if dimension == "subject_consistency":
            kept = Path(os.environ["TORCH_HOME"], "hub/checkpoints/dino_vitbase16_pretrain.pth")
            assert kept.read_text() == "weights"
        each = []
        for path in sorted(Path(videos_path).iterdir(), reverse=True):
            with av.open(str(path)) as container:
                [first, *_] = container.decode(video=0)
            value = first.to_ndarray(format="rgb24").mean() / 255
            value = value > 0.5 if dimension == "dynamic_degree" else value
            value = value * 100 if dimension == "imaging_quality" else value
            each.append({"video_path": str(path), "video_results": value.item()})
        ACTION
        (self.out / f"{name}_eval_results.json").write_text(json.dumps({dimension: [0.5, each]}))
"""
_TORCH = """
class cuda:
    is_available = staticmethod(lambda: False)
def device(name):
    return f"device {name}"
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WeightFiles:
    """A Python whose vbench and torch are stubs, and a folder with made-up weights."""
    _write_package(tmp_path, "pass")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), *sys.path]))
    for dimension in DIMENSIONS[1:]:
        for name in vbench_module._OPENED[dimension]:
            path = tmp_path / "cache" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("weights")
    monkeypatch.setattr(vbench_module, "_SHA256", {})
    return WeightFiles(vbench=Path(sys.executable), vbench_cache=tmp_path / "cache")


def _write_package(folder: Path, action: str) -> None:
    site = folder / "site"
    for name, text in (("vbench", _PACKAGE.replace("ACTION", action)), ("torch", _TORCH)):
        (site / name).mkdir(parents=True, exist_ok=True)
        (site / name / "__init__.py").write_text(text)
    about = site / "vbench-0.1.5.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vbench\nVersion: 0.1.5\n")


def _clips(*levels: int) -> list[Clip]:
    return [
        Clip(frames=np.full((3, 32, 48, 3), level, np.uint8), prompt=str(level), seed=0, fps=8.0)
        for level in levels
    ]


def test_flickering_of_known_clips() -> None:
    black, white = (np.full((1, 4, 4, 3), level, np.uint8) for level in (0, 255))
    grey = np.full((1, 4, 4, 3), 51, np.uint8)
    assert temporal_flickering(np.concatenate([white, white, white])) == 1
    assert temporal_flickering(np.concatenate([black, white, black])) == 0
    assert temporal_flickering(np.concatenate([black, grey])) == pytest.approx(0.8, abs=1e-12)
    assert temporal_flickering(np.concatenate([white, white, black])) == pytest.approx(0.5)
    with pytest.raises(Unavailable, match="2 frames"):
        temporal_flickering(white)


def test_flickering_equals_the_package_literally(rng: np.random.Generator) -> None:
    """vbench/temporal_flickering.py, in its order of operations and its float32."""
    frames = rng.integers(0, 256, (6, 9, 7, 3), dtype=np.uint8)
    errors = []
    for i in range(len(frames) - 1):
        a, b = (np.array(frames[i + k], dtype=np.float32) for k in (0, 1))
        errors.append(np.mean(np.abs(a - b)))
    wanted = (255.0 - np.mean(np.array(errors)).item()) / 255.0
    assert temporal_flickering(frames) == pytest.approx(wanted, abs=1e-6)


def test_every_dimension_is_on_the_shelf_and_two_sided() -> None:
    assert {metric.name for metric in VBENCH} == {f"vbench_{name}" for name in DIMENSIONS}
    for metric in VBENCH:
        assert METRICS[metric.name] is metric
        assert (metric.family, metric.direction) == ("health", "lower")


@pytest.mark.parametrize("metric", VBENCH[1:], ids=lambda metric: metric.dimension)
def test_without_the_package_it_says_how_to_get_it(
    metric: VbenchScore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable) as caught:
        metric.load(WeightFiles())
    assert "no package vbench: " in str(caught.value)
    assert "HBXT_VBENCH" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(Unavailable, match="load"):
        metric.scores(_clips(1))


def test_a_python_without_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "python"
    with pytest.raises(Unavailable, match=r"has no package vbench: .*HBXT_VBENCH"):
        VBENCH[1].load(WeightFiles(vbench=path))
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    with pytest.raises(Unavailable, match=r"has no package vbench: .*HBXT_VBENCH"):
        VBENCH[1].load(WeightFiles(vbench=path))


def test_weights_that_are_missing_or_others_are_named(
    files: WeightFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_name = {metric.dimension: metric for metric in VBENCH}
    assert files.vbench_cache is not None
    (files.vbench_cache / "raft_model/models/raft-things.pth").unlink()
    with pytest.raises(Unavailable) as caught:
        by_name["dynamic_degree"].load(files)
    assert "lacks raft_model/models/raft-things.pth" in str(caught.value)
    assert "eval/README.md" in str(caught.value)
    assert "VBENCH_CACHE_DIR" in str(caught.value)
    monkeypatch.undo()
    _write_package(files.vbench_cache.parent, "pass")
    monkeypatch.setenv("PYTHONPATH", str(files.vbench_cache.parent / "site"))
    with pytest.raises(Unavailable, match=r"ViT-B-32.pt has sha256 .* expected 40d365715913"):
        by_name["background_consistency"].load(files)


@pytest.mark.parametrize("metric", VBENCH[1:], ids=lambda metric: metric.dimension)
def test_clips_reach_the_package_unchanged_and_scores_come_back_in_order(
    metric: VbenchScore, files: WeightFiles
) -> None:
    loaded = metric.load(files)
    assert str(loaded.extractor).startswith("vbench 0.1.5: ")
    levels = (51, 204, 0, 255)
    wanted = [level / 255 for level in levels]
    if metric.dimension == "dynamic_degree":
        wanted = [0, 1, 0, 1]
    assert loaded.scores(_clips(*levels)) == pytest.approx(wanted, abs=1e-12)


def test_the_sha256_is_of_the_weights(files: WeightFiles) -> None:
    by_name = {metric.dimension: metric.load(files) for metric in VBENCH}
    assert files.vbench_cache is not None
    one = files.vbench_cache / "amt_model/amt-s.pth"
    assert by_name["motion_smoothness"].extractor_sha256 == sha256_of(one)
    two = by_name["aesthetic_quality"].extractor_sha256
    assert two is not None
    assert len(two) == 64
    (files.vbench_cache / "clip_model/ViT-L-14.pt").write_text("others")
    assert VBENCH[5].load(files).extractor_sha256 != two
    assert by_name["temporal_flickering"].extractor_sha256 is None


@pytest.mark.parametrize(
    ("action", "says"),
    [
        ("raise RuntimeError('out of memory')", r"exit 1\): RuntimeError: out of memory"),
        ("raise RuntimeError('Weights only: see weights_only')", "more than tensors"),
        ("del each[0]", "scored 1 of 2 clips, not 00001.mp4"),
        ("os._exit(0)", r"exit 0\): it said nothing"),
    ],
)
def test_what_goes_wrong_there_is_one_line_here(
    action: str, says: str, files: WeightFiles, tmp_path: Path
) -> None:
    _write_package(tmp_path, action)
    metric = next(one for one in VBENCH if one.dimension == "motion_smoothness").load(files)
    with pytest.raises(Unavailable, match=says) as caught:
        metric.scores(_clips(10, 20))
    assert "\n" not in str(caught.value)


def test_both_are_taken_from_the_environment() -> None:
    found = WeightFiles.from_environment({"HBXT_VBENCH": "/v/python", "VBENCH_CACHE_DIR": "/c"})
    assert found == WeightFiles(vbench=Path("/v/python"), vbench_cache=Path("/c"))
    assert WeightFiles.from_environment({}) == WeightFiles()
