"""ColorVideoVDP: the call everywhere, its scores where the package is installed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from hbxt_compress.clips import Clip, read_video
from hbxt_compress.metrics import Unavailable, WeightFiles
from hbxt_compress.metrics.cvvdp import CVVDP, Cvvdp


def _clip(size_px: int = 48, n_frames: int = 3) -> Clip:
    y, x = np.mgrid[0:size_px, 0:size_px]
    frames = [
        127 + 100 * np.sin(np.stack([x + 3 * t, y, x + y], axis=-1) / 7) for t in range(n_frames)
    ]
    return Clip(frames=np.rint(frames).astype(np.uint8), prompt="p", seed=0, fps=8.0)


def _noisy(clip: Clip, sigma: float) -> Clip:
    noise = np.random.default_rng(1).normal(size=clip.frames.shape)
    frames = np.rint(clip.frames + sigma * noise).clip(0, 255).astype(np.uint8)
    return replace(clip, frames=frames)


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycvvdp", None)
    with pytest.raises(Unavailable) as caught:
        CVVDP.load(WeightFiles())
    assert str(caught.value) == "no package cvvdp: pip install 'hbxt-compress[slow]'"
    with pytest.raises(Unavailable, match="load"):
        CVVDP.compare(_clip(), _clip())


class _Stub:
    """Stands for pycvvdp.cvvdp: keeps what it is called with."""

    version = "0.0"
    parameters_file = ""
    calls: list[dict[str, Any]]

    def __init__(self, display_name: str, device: torch.device, quiet: bool) -> None:
        assert (display_name, device.type, quiet) == ("standard_fhd", "cpu", True)
        self.calls = []

    def get_info_string(self) -> str:
        return '"Stub (standard_fhd)"'

    def predict(
        self, test: torch.Tensor, reference: torch.Tensor, **more: object
    ) -> tuple[torch.Tensor, dict[str, object]]:
        self.calls.append({"test": test, "reference": reference, **more})
        return torch.tensor(8.5), {}


def test_the_candidate_is_the_test_side(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cvvdp_parameters.json").write_text("{}")
    stub: Any = ModuleType("pycvvdp")
    stub.__spec__ = ModuleSpec("pycvvdp", None)
    stub.cvvdp = type("Stub", (_Stub,), {"parameters_file": str(tmp_path / "p.json")})
    monkeypatch.setitem(sys.modules, "pycvvdp", stub)
    metric, reference, candidate = CVVDP.load(WeightFiles()), _clip(), _noisy(_clip(), 9)
    assert metric.extractor == "Stub (standard_fhd)"
    assert metric.extractor_sha256 is not None
    assert len(metric.extractor_sha256) == 64
    reference.frames.setflags(write=False)  # as frames from a file are
    assert metric.compare(reference, candidate) == 8.5
    [call] = metric.model.calls
    assert np.array_equal(call["test"].numpy(), candidate.frames)
    assert np.array_equal(call["reference"].numpy(), reference.frames)
    assert (call["dim_order"], call["frames_per_second"]) == ("FHWC", 8.0)
    (tmp_path / "cvvdp_parameters.json").write_text("{ }")
    assert CVVDP.load(WeightFiles()).extractor_sha256 != metric.extractor_sha256


@pytest.fixture
def cvvdp() -> Iterator[Cvvdp]:
    try:
        yield CVVDP.load(WeightFiles())
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.timeout(300)  # torchvision is imported in the first test that needs it
def test_ten_is_no_difference_and_damage_lowers_it(cvvdp: Cvvdp) -> None:
    assert cvvdp.unit == "JOD"
    assert "standard_fhd" in str(cvvdp.extractor)
    clip = _clip()
    values = [cvvdp.compare(clip, _noisy(clip, sigma)) for sigma in (0, 2, 8, 40)]
    assert values[0] == 10
    assert (np.diff(values) < -0.05).all(), values


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_published_pair_of_videos(cvvdp: Cvvdp, shared_data: Path) -> None:
    """An example of the package itself; the README of an older version says 5.68."""
    if not os.environ.get("HBXT_SLOW"):
        pytest.skip("60 frames of 720p take minutes: set HBXT_SLOW=1")
    folder = shared_data / "clips"
    sides = [
        read_video(folder / f"example_media_structure_ferris-{name}.mp4")
        for name in ("ref", "test-wb")
    ]
    assert sides[0].shape == sides[1].shape == (60, 720, 1280, 3)
    reference, candidate = (Clip(frames=f, prompt="", seed=0, fps=25.0) for f in sides)
    assert cvvdp.compare(reference, candidate) == pytest.approx(5.562, abs=0.05)
