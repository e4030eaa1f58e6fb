"""Decoding whole and in tiles: by invariants, with a pointwise decoder, and against diffusers."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hbxt_compress.cli import BUILTIN
from hbxt_compress.errors import ArtifactError, UsageError
from hbxt_compress.geometry import Geometry
from hbxt_compress.graph.check import check_targets
from hbxt_compress.graph.export import export_component
from hbxt_compress.graph.parity import require_parity
from hbxt_compress.manifest import Bucket
from hbxt_compress.models import family_of
from hbxt_compress.models.wan_vae_graph import vae_decoder_graphs
from hbxt_compress.reference.shapes import draw, scene
from hbxt_compress.runtime import Runtime
from hbxt_compress.runtime.decode import decode, ramps, starts
from hbxt_compress.runtime.session import Session, open_session
from hbxt_compress.source import locate
from hbxt_compress.tile import Tile
from tests.fake_artifact import make_artifact, rewrite_manifest
from tests.small_vaes import bucket_of, small_vae

pytestmark = pytest.mark.timeout(300)  # exports take a while where others compute, too
_FACTOR = 8


def _tile(height: int, width: int, overlap: int) -> Tile:
    return Tile(height=height, width=width, overlap=overlap, first="t_first.onnx", next="t.onnx")


_SIDES = [
    (whole, side, overlap)
    for whole in (1, 7, 30, 60, 104)
    for side in (1, 2, 5, 16, 32)
    for overlap in (0, 1, 3, 8, 15)
    if overlap < side <= whole
]


@pytest.mark.parametrize(("whole", "side", "overlap"), _SIDES)
def test_tiles_cover_a_side_with_the_overlap_asked_for_and_count_for_one(
    whole: int, side: int, overlap: int
) -> None:
    begins = starts(whole, side, overlap)
    assert (begins[0], begins[-1] + side) == (0, whole)
    steps = [later - one for one, later in pairwise(begins)]
    assert all(0 < step <= side - overlap for step in steps)
    assert not steps or max(steps) - min(steps) <= 1
    assert len(begins) == 1 or len(begins) - 1 == math.ceil((whole - side) / (side - overlap))
    total = np.zeros(whole)
    for begin, share in zip(begins, ramps(begins, side), strict=True):
        assert share.shape == (side,)
        assert share.min() >= 0
        assert share.max() <= 1
        total[begin : begin + side] += share
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_shares_rise_linearly_where_two_tiles_meet() -> None:
    first, second = ramps([0, 8], 16)
    assert first.tolist() == [1] * 10 + [0.875, 0.625, 0.375, 0.125] + [0] * 2
    assert second.tolist() == [0] * 2 + [0.125, 0.375, 0.625, 0.875] + [1] * 10
    first, second = ramps([0, 10], 10)
    assert (first == 1).all()
    assert (second == 1).all()


def test_a_tile_alone_counts_in_full() -> None:
    assert starts(9, 9, 3) == [0]
    assert starts(9, 12, 3) == [0]
    (share,) = ramps([0], 9)
    assert (share == 1).all()


class _Decoder:
    """Sessions of a decoder that shows the mean latent of now, after what it saw at first."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, file: str) -> _Decoder:
        self.calls.append(file)
        return self

    def run(self, inputs: dict[str, np.ndarray], **_: object) -> dict[str, np.ndarray]:
        first = "cache_in_0" not in inputs
        assert [call for call in self.calls if call != "run"][-1].endswith("first.onnx") == first
        seen = inputs["latent_sample"] if first else inputs["cache_in_0"]
        shown = inputs["latent_sample"] + 10 * seen
        frames = shown.mean(axis=1, keepdims=True).repeat(1 if first else 4, axis=2)
        frames = frames.repeat(_FACTOR, axis=3).repeat(_FACTOR, axis=4)
        self.calls.append("run")
        return {"sample": np.repeat(frames, 3, axis=1), "cache_out_0": seen}


def _bucket(tile: Tile | None, height: int = 6, width: int = 9) -> Bucket:
    return Bucket(
        geometry=Geometry(height=height * _FACTOR, width=width * _FACTOR, n_frames=9, fps=8.0),
        latent_shape=(2, 3, height, width),
        transformer="model.onnx",
        first="model_first.onnx",
        next="model.onnx",
        tile=tile,
    )


def _latents(height: int = 6, width: int = 9) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, height, width), dtype=np.float32)


@pytest.mark.parametrize(
    "tile",
    [_tile(32, 32, 8), _tile(48, 32, 16), _tile(16, 72, 8), _tile(32, 40, 0), _tile(40, 64, 32)],
    ids=str,
)
def test_tiles_of_what_each_pixel_shows_alone_make_up_the_whole(tile: Tile) -> None:
    """So every tile lies at its place and has the caches of that place."""
    whole = np.stack(list(decode(_latents(), _bucket(tile), _Decoder())))
    tiled = np.stack(list(decode(_latents(), _bucket(tile), _Decoder(), tiled=True)))
    assert whole.shape == (9, 48, 72, 3)
    assert whole.dtype == tiled.dtype == np.float32
    np.testing.assert_allclose(tiled, whole, atol=1e-4)


def test_a_tile_that_covers_the_frame_gives_its_very_bytes() -> None:
    bucket = _bucket(_tile(48, 72, 16))
    whole = list(decode(_latents(), bucket, _Decoder()))
    assert np.array_equal(whole, list(decode(_latents(), bucket, _Decoder(), tiled=True)))


def test_frames_come_out_before_the_next_latent_is_decoded() -> None:
    opened = _Decoder()
    frames = decode(_latents(), _bucket(_tile(48, 40, 8)), opened, tiled=True)  # type: ignore[arg-type]
    next(frames)
    assert opened.calls == ["t_first.onnx", "run", "run"]
    for _ in range(4):
        next(frames)
    assert opened.calls[3:] == ["t.onnx", "run", "run"]
    assert len(list(frames)) == 4


def _sessions(folder: Path) -> Callable[[str], Session]:
    opened: dict[str, Session] = {}

    def graph(file: str) -> Session:
        if file not in opened:
            opened[file] = open_session(folder / file, "cpu", n_threads=1)
        return opened[file]

    return graph


@pytest.fixture(scope="module", params=[True, False], ids=["wan2.2", "wan2.1"])
def exported(request, tmp_path_factory) -> tuple[nn.Module, Path, Bucket]:
    vae = small_vae(residual=request.param)
    factor = 8 if request.param else 4
    bucket = bucket_of(vae, (5, 6, 8), _tile(4 * factor, 4 * factor, 2 * factor))
    folder = tmp_path_factory.mktemp("vae")
    component = vae_decoder_graphs(vae, bucket)
    export_component(folder, component, {}, precision=32)
    require_parity(folder, component, tolerance=1e-5)
    return vae, folder, bucket


@pytest.mark.parametrize("n_frames", [1, 5, 17, 81])
def test_clips_are_decoded_as_by_diffusers(exported, n_frames: int) -> None:
    vae, folder, bucket = exported
    shape = (4, (n_frames + 3) // 4, 6, 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(n_frames))
    with torch.no_grad():
        expected = vae.decode(latents[None], return_dict=False)[0][0].permute(1, 2, 3, 0).numpy()
    got = np.stack(list(decode(latents.numpy(), bucket, _sessions(folder))))
    assert (
        got.shape == expected.shape == (n_frames, bucket.geometry.height, bucket.geometry.width, 3)
    )
    assert np.abs(got - expected).max() <= 1e-4
    assert n_frames == 1 or np.abs(expected).max() == 1.0  # so the clamp is compared, too


def test_tiles_are_decoded_as_by_diffusers(exported) -> None:
    """Each by itself, then blended by hand."""
    vae, folder, bucket = exported
    latents = torch.randn((4, 3, 6, 8), generator=torch.Generator().manual_seed(1))
    rows, columns, factor = [0, 2], [0, 2, 4], bucket.geometry.height // 6
    expected = np.zeros((9, 6 * factor, 8 * factor, 3), dtype=np.float32)
    down, across = [ramps([factor * b for b in s], 4 * factor) for s in (rows, columns)]
    for y, share_y in zip(rows, down, strict=True):
        for x, share_x in zip(columns, across, strict=True):
            with torch.no_grad():
                part = vae.decode(latents[None, :, :, y : y + 4, x : x + 4], return_dict=False)[0]
            place = (slice(factor * y, factor * (y + 4)), slice(factor * x, factor * (x + 4)))
            share = share_y[:, None, None] * share_x[:, None]
            expected[:, *place] += part[0].permute(1, 2, 3, 0).numpy() * share
    got = np.stack(list(decode(latents.numpy(), bucket, _sessions(folder), tiled=True)))
    assert np.abs(got - expected).max() <= 1e-4


def test_tiles_share_the_weights(exported) -> None:
    vae, folder, _ = exported
    parts = (*vae.decoder.parameters(), *vae.post_quant_conv.parameters())
    assert (folder / "model.onnx.data").stat().st_size < 4.2 * sum(p.numel() for p in parts)
    assert len(list(folder.glob("*.onnx"))) == 4


def test_providers_without_convolutions_over_frames_take_every_node(tmp_path: Path) -> None:
    """In float16, which HIP's attention asks for."""
    vae = small_vae(residual=True)
    component = vae_decoder_graphs(vae, bucket_of(vae))
    export_component(tmp_path, component, {}, precision=16, half=True)
    judged = {one.target: one.runtimes for one in check_targets(tmp_path, ("gfx1151", "gfx1201"))}
    for found in (judged["gfx1151"]["hip"], judged["gfx1201"]["directml"]):
        assert {(node.op, node.reason) for node in found.nodes if node.verdict != "runs"} == set()


def test_an_artifact_is_generated_from_in_tiles(tmp_path: Path) -> None:
    folder = make_artifact(tmp_path / "a", tile=_tile(8, 16, 0))
    clips = {}
    for tiled in (False, True):
        with Runtime.open(folder, provider="cpu", tiled=tiled) as runtime:
            clips[tiled] = runtime.generate("a red circle", seed=2)
            files = {name.split("/")[1] for name in runtime.providers if name.startswith("vae")}
            assert files == (
                {"t_first.onnx", "t.onnx"} if tiled else {"model_first.onnx", "model.onnx"}
            )
    difference = clips[True].frames.astype(int) - clips[False].frames
    assert np.abs(difference).max() <= 1


def test_an_artifact_without_tiles_says_so(tmp_path: Path) -> None:
    folder = make_artifact(tmp_path / "a")
    with pytest.raises(UsageError, match=r"no graphs for tiles of frames of 16 x 16 pixels"):
        Runtime.open(folder, tiled=True)


@pytest.mark.parametrize(
    ("tile", "problem"),
    [
        (
            _tile(12, 16, 0),
            "tile.height: 12 pixels, must be a multiple of the 8 that are one latent",
        ),
        (_tile(8, 0, 0), "tile.width: 0 pixels, must be"),
        (_tile(8, 16, 4), "tile.overlap: 4 pixels, must be a multiple of the 8"),
        (_tile(8, 16, -8), "tile.overlap: -8 pixels, must be"),
        (_tile(8, 24, 0), "tile.width: 24 pixels, but a frame has 16"),
        (_tile(8, 16, 8), "tile.overlap: 8 pixels, must be less than the height, 8"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_tile_that_cannot_be_is_refused_with_the_reason(
    tmp_path: Path, tile: Tile, problem: str
) -> None:
    folder = make_artifact(tmp_path / "a", tile=_tile(8, 16, 0))
    bucket = Runtime.open(folder).bucket
    rewrite_manifest(folder, buckets=(replace(bucket, tile=tile),))
    with pytest.raises(ArtifactError) as error:
        Runtime.open(folder)
    assert f"buckets[0].{problem}" in str(error.value)


def test_the_graphs_of_a_tile_are_needed(tmp_path: Path) -> None:
    folder = make_artifact(tmp_path / "a", tile=_tile(8, 16, 0))
    (folder / "vae_decoder" / "t.onnx").unlink()
    rewrite_manifest(folder, made_with={})
    with pytest.raises(ArtifactError, match=r"vae_decoder/t\.onnx: the runtime needs it"):
        Runtime.open(folder, tiled=True)


def test_frames_no_larger_than_a_tile_have_none() -> None:
    assert Tile.within((256, 200), 256, 64) is None
    tile = Tile.within((480, 192), 256, 64)
    assert tile is not None
    assert (tile.height, tile.width, tile.next) == (256, 192, "model_tile_256x192.onnx")
    assert not list(tile.problems((480, 192), 8))


_STREAM = """
import sys
from pathlib import Path
import numpy as np
from hbxt_compress.clips import to_uint8
from hbxt_compress.geometry import Geometry
from hbxt_compress.manifest import Bucket
from hbxt_compress.runtime.decode import decode
from hbxt_compress.runtime.session import open_session
from hbxt_compress.source import locate
from hbxt_compress.tile import Tile
folder, n_frames, tiled = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
bucket = {bucket!r}
opened = {{}}
def graph(file):
    if file not in opened:
        opened.clear()
        opened[file] = open_session(folder / file, "cpu", n_threads=1)
    return opened[file]
shape = (4, (n_frames + 3) // 4, *bucket.latent_shape[2:])
latents = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
frames = map(to_uint8, decode(latents, bucket, graph, tiled=tiled))
assert sum(1 for _ in frames) == n_frames
for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmHWM"):
        print(int(line.split()[1]) / 1024)
"""


@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read there")
def test_memory_does_not_grow_with_the_frames(tiled: bool, tmp_path: Path) -> None:
    """Peak of a process that decodes and keeps nothing, MB; 144 frames more would be 35."""
    vae = small_vae(residual=True, base_dim=16)
    bucket = bucket_of(vae, (5, 32, 40), _tile(256, 192, 64))
    export_component(tmp_path, vae_decoder_graphs(vae, bucket), {}, precision=32)
    peaks = []
    for n_frames in (17, 161):
        script = [sys.executable, "-c", _STREAM.format(bucket=bucket)]
        command = [*script, str(tmp_path), str(n_frames), str(tiled)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(float(done.stdout))
    assert peaks[1] <= 1.1 * peaks[0], peaks


def test_seams_do_not_show(tmp_path: Path) -> None:
    """The built-in model's VAE on a frame of 2 x 2 small tiles, its own world's shapes all over."""
    source = locate(BUILTIN)
    family = family_of(source)
    vae = family.load(source, "vae_decoder")
    scenes = [replace(scene("evaluation", i), background="black") for i in range(9)]
    clips = [draw(one)[:5] for one in scenes]
    rows = [np.concatenate(clips[i : i + 3], axis=2) for i in (0, 3, 6)]
    frames = torch.from_numpy(np.concatenate(rows, axis=1) * 2 - 1).permute(3, 0, 1, 2)[None]
    bucket = replace(
        family.buckets(source)[0],
        geometry=Geometry(height=192, width=192, n_frames=5, fps=8.0),
        latent_shape=(12, 2, 24, 24),
        tile=_tile(128, 128, 64),
    )
    export_component(tmp_path, vae_decoder_graphs(vae, bucket), {}, precision=32)
    with torch.no_grad():
        latents = vae.encode(frames.float()).latent_dist.mode()[0].numpy()
    whole, tiled = (
        np.stack(list(decode(latents, bucket, _sessions(tmp_path), tiled=tiled)))
        for tiled in (False, True)
    )
    error = ((whole - tiled) / 2) ** 2
    assert -10 * np.log10(error.mean()) >= 45
    assert error.mean() > 0
