"""LPIPS against published and stored values, and its refusal to guess a trunk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hbxt_compress.clips import Clip
from hbxt_compress.metrics import METRICS, Unavailable, WeightFiles
from hbxt_compress.metrics import lpips as lpips_module
from hbxt_compress.metrics.lpips import Lpips, open_lpips
from hbxt_compress.metrics.weights import sha256_of

_TRUNK_SHA256 = "435cedb387e95bc8291893f61a3a64f0345b8c23a05139aceef43947efb3d52d"


@pytest.fixture(scope="module")
def squeeze(shared_data: Path) -> Lpips:
    return open_lpips("squeeze", WeightFiles(lpips_trunk=_trunk(shared_data)))


def _trunk(shared_data: Path) -> Path:
    path = shared_data / "lpips" / "squeeze.backbone.pth"
    if not path.is_file():
        pytest.skip(f"no {path.name} in the shared data")
    return path


def _image(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _clip(image: np.ndarray) -> Clip:
    return Clip(frames=image[None].repeat(2, axis=0), prompt="p", seed=0, fps=8)


def test_published_value_on_random_images(squeeze: Lpips) -> None:
    """torchmetrics' doctest: .1024 and .0938."""
    generator = torch.Generator().manual_seed(42)
    a, b = (torch.rand(2, 3, 100, 100, generator=generator) * 2 - 1 for _ in range(2))
    assert squeeze.distances(a, b).tolist() == pytest.approx([0.1023802, 0.0937736], abs=2e-6)


def test_stored_values_on_photographs(squeeze: Lpips, shared_data: Path) -> None:
    """Values 1e-5 apart from these mean another range, order of channels or trunk."""
    images = {n: _clip(_image(shared_data / "lpips" / f"ex_{n}.png")) for n in ("ref", "p0", "p1")}
    assert squeeze.compare(images["ref"], images["p0"]) == pytest.approx(0.7110476, abs=1e-5)
    assert squeeze.compare(images["ref"], images["p1"]) == pytest.approx(0.1479016, abs=1e-5)
    assert squeeze.compare(images["p0"], images["ref"]) == pytest.approx(0.7110476, abs=1e-5)


def test_black_against_white(squeeze: Lpips) -> None:
    black, white = (_clip(np.full((64, 64, 3), level, dtype=np.uint8)) for level in (0, 255))
    assert squeeze.compare(black, white) == pytest.approx(0.6420927, abs=1e-5)


def test_the_loaded_metric_says_what_it_is(squeeze: Lpips) -> None:
    assert squeeze.name == "lpips_squeeze"
    assert squeeze.extractor_sha256 == _TRUNK_SHA256


def test_images_in_another_range_are_refused(squeeze: Lpips) -> None:
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        squeeze.distances(torch.zeros(1, 3, 64, 64), torch.full((1, 3, 64, 64), 255.0))


def test_a_long_clip_is_the_mean_of_its_frames(squeeze: Lpips, rng: np.random.Generator) -> None:
    """Chunks of unequal length must not weigh differently."""
    a, b = (
        Clip(frames=rng.integers(0, 256, (18, 32, 32, 3), dtype=np.uint8), prompt="", seed=0, fps=8)
        for _ in range(2)
    )
    each = [
        squeeze.compare(
            Clip(frames=a.frames[t : t + 1], prompt="", seed=0, fps=8),
            Clip(frames=b.frames[t : t + 1], prompt="", seed=0, fps=8),
        )
        for t in range(18)
    ]
    assert squeeze.compare(a, b) == pytest.approx(np.mean(each), rel=1e-5)


@pytest.mark.parametrize("net", ["squeeze", "alex", "vgg"])
def test_a_missing_trunk_is_one_line_with_the_remedy(net: str, tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as caught:
        METRICS[f"lpips_{net}"].load(WeightFiles(lpips_trunk=tmp_path / "absent.pth"))
    assert "HBXT_LPIPS_TRUNK" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_is_downloaded_for_an_empty_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(Unavailable, match="torchvision's cache"):
        open_lpips("squeeze", WeightFiles())
    assert not list(tmp_path.rglob("*.pth"))


def test_another_trunk_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "trunk.pth").write_bytes(b"not a state dict")
    with pytest.raises(Unavailable, match="not the known trunk"):
        open_lpips("squeeze", WeightFiles(lpips_trunk=tmp_path / "trunk.pth"))


def test_a_trunk_of_another_net_is_refused(shared_data: Path) -> None:
    with pytest.raises(Unavailable, match="not the known trunk"):
        open_lpips("alex", WeightFiles(lpips_trunk=_trunk(shared_data)))


def test_a_trunk_is_loaded_tensor_by_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another net than the goldens', whose file is made up here and trusted for the test."""
    made = torch.nn.Sequential(*alexnet_features())
    whole = {f"features.{key}": value for key, value in made.state_dict().items()}
    torch.save(whole | {"classifier.1.weight": torch.zeros(2, 2)}, tmp_path / "alex.pth")
    monkeypatch.setitem(lpips_module._FEATURES_ONLY, "alex", sha256_of(tmp_path / "alex.pth"))
    metric = open_lpips("alex", WeightFiles(lpips_trunk=tmp_path / "alex.pth"))
    loaded = metric._model.get_submodule("net").state_dict()
    assert len(loaded) == len(whole) == 10
    for key, value in loaded.items():
        assert torch.equal(value, whole[f"features.{key.split('.', 1)[1]}"])
    del whole["features.0.bias"]
    torch.save(whole, tmp_path / "alex.pth")
    monkeypatch.setitem(lpips_module._FEATURES_ONLY, "alex", sha256_of(tmp_path / "alex.pth"))
    with pytest.raises(Unavailable, match="does not hold the tensors"):
        open_lpips("alex", WeightFiles(lpips_trunk=tmp_path / "alex.pth"))


def alexnet_features() -> list[torch.nn.Module]:
    """torchvision's AlexNet up to its classifier, random weights."""
    sizes = {0: (3, 64, 11), 3: (64, 192, 5), 6: (192, 384, 3), 8: (384, 256, 3), 10: (256, 256, 3)}
    return [torch.nn.Conv2d(*sizes[i]) if i in sizes else torch.nn.Identity() for i in range(13)]


def test_the_trunk_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HBXT_LPIPS_TRUNK", "/somewhere/trunk.pth")
    monkeypatch.delenv("HBXT_I3D", raising=False)
    files = WeightFiles.from_environment()
    assert files == WeightFiles(lpips_trunk=Path("/somewhere/trunk.pth"))
