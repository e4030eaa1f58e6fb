"""Several clip sizes in one artifact share its weights; each generates what it alone would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hbxt_compress.artifact import Artifact
from hbxt_compress.cli import main
from hbxt_compress.clips import read_video
from hbxt_compress.errors import SourceError, UsageError
from hbxt_compress.geometry import Geometry
from hbxt_compress.graph.check import check_targets
from hbxt_compress.machine import Machine
from hbxt_compress.pipeline import compress
from hbxt_compress.recipe import load_recipe
from hbxt_compress.runtime.generate import Runtime
from hbxt_compress.store import Store

_SIZES = "32x32x5,64x32x9,32x32x9"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("buckets") / "store")


@pytest.fixture(scope="module")
def folder(micro_wan: Path, store: Store) -> Path:
    recipe = load_recipe("w4a16-fast")
    return compress(recipe, str(micro_wan), store, machine=Machine(), sizes=_SIZES)


def test_sizes_share_one_weight_file(folder: Path, micro_wan: Path, store: Store) -> None:
    manifest = Artifact.open(folder).manifest
    assert [str(one.geometry) for one in manifest.buckets] == _SIZES.split(",")
    assert manifest.geometry.fps == 8.0
    assert [one.transformer for one in manifest.buckets] == [
        "model.onnx",
        "model_64x32x9.onnx",
        "model_32x32x9.onnx",
    ]
    assert [one.next for one in manifest.buckets] == [
        "model.onnx",
        "model_64x32.onnx",
        "model.onnx",  # a decoder takes frame by frame: their number does not matter
    ]
    one_size = compress(load_recipe("w4a16-fast"), str(micro_wan), store, machine=Machine())
    for component in ("text_encoder", "transformer", "vae_decoder"):
        data = f"{component}/model.onnx.data"
        alone, together = (path.joinpath(data).stat().st_size for path in (one_size, folder))
        assert together < 1.02 * alone + 20_000, component  # tables of positions are apart
    assert all(one.passes for one in check_targets(folder))


@pytest.mark.parametrize("size", _SIZES.split(","))
def test_each_size_generates_what_it_alone_would(
    size: str, folder: Path, micro_wan: Path, store: Store
) -> None:
    with Runtime.open(folder, size=size) as runtime:
        clip = runtime.generate("a red circle", seed=3, check=False)
    height, width, frames = (int(n) for n in size.split("x"))
    assert clip.frames.shape == (frames, height, width, 3)
    recipe = load_recipe("w4a16-fast")
    alone = compress(recipe, str(micro_wan), store, machine=Machine(), sizes=size)
    with Runtime.open(alone) as runtime:
        expected = runtime.generate("a red circle", seed=3, check=False)
    assert np.array_equal(clip.frames, expected.frames)


def test_the_command_chooses_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = tmp_path / "clip.mp4"
    words = ["generate", str(folder), "--prompt", "a red circle", "--geometry", "64x32x9"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--out", str(clip), "--steps", "1"])
    if ended.value.code == 0:  # random weights may give an unhealthy clip, which has its own tests
        assert read_video(clip).shape == (9, 64, 32, 3)
    with pytest.raises(SystemExit) as ended:
        main([*words[:-1], "640x480x9", "--out", str(clip)])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "640x480x9: not in this artifact, which has 32x32x5, 64x32x9, 32x32x9" in told


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ("32x32", "geometry '32x32': write height x width x frames, as 704x1280x121"),
        ("32x32x5,32x32x5", "geometry 32x32x5: stands there twice"),
        ("", "geometry '': write"),
    ],
)
def test_sizes_that_are_not_written_so_are_refused(sizes: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Geometry.parse(sizes, 8.0)


def test_sizes_that_the_model_cannot_take_are_refused_before_any_work(
    micro_wan: Path, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match="height 33: must be a multiple of") as refused:
        compress(
            load_recipe("w4a16-fast"),
            str(micro_wan),
            Store(tmp_path / "store"),
            machine=Machine(),
            sizes="32x32x5,33x32x6",
        )
    assert "n_frames 6" in str(refused.value)
    assert not (tmp_path / "store" / "quantize").exists()
