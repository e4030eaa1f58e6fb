"""The light decoder: causal, the same whole and streamed, of the sizes that are asked for."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hbxt_compress.algorithms.light_decoder import Light, error_terms
from hbxt_compress.errors import PlanError, RecipeError, SourceError
from hbxt_compress.geometry import Geometry
from hbxt_compress.graph.export import export_component
from hbxt_compress.lightened import as_if_lightened, new_decoder, write_decoder
from hbxt_compress.manifest import Bucket
from hbxt_compress.models import family_of
from hbxt_compress.models.light_decoder import CausalConv, Lift, LightDecoder
from hbxt_compress.models.light_decoder_graph import light_decoder_graphs
from hbxt_compress.recipe import load_recipe
from hbxt_compress.runtime.decode import decode
from hbxt_compress.runtime.session import open_session
from hbxt_compress.source import locate
from hbxt_compress.tile import Tile

_Z = 4
_SMALL = Light(widths=(16, 8, 8), n_blocks=(1, 1, 1), kernel=5)


def _decoder(factor: int, how: Light = _SMALL) -> LightDecoder:
    """With weights that are all different from 0 and norms' that are not 1."""
    torch.manual_seed(0)
    decoder = LightDecoder(**how.sizes(_Z, 4, factor))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return decoder.eval().requires_grad_(False)


def _bucket(factor: int, n_latents: int, tile: Tile | None = None) -> Bucket:
    height, width = 6, 5
    return Bucket(
        geometry=Geometry(
            height=height * factor, width=width * factor, n_frames=4 * n_latents - 3, fps=8.0
        ),
        latent_shape=(_Z, n_latents, height, width),
        transformer="t.onnx",
        first="model_first.onnx",
        next="model.onnx",
        tile=tile,
    )


def _frames(decoder: LightDecoder, latents: np.ndarray) -> np.ndarray:
    """T H W 3."""
    found = decoder(torch.from_numpy(latents)[None])[0].clamp(-1, 1)
    return found.permute(1, 2, 3, 0).numpy()


def _latents(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("factor", [8, 16])
def test_the_streamed_graphs_give_the_whole_clips_frames(factor: int, tmp_path: Path) -> None:
    decoder = _decoder(factor)
    export_component(tmp_path, light_decoder_graphs(decoder, _bucket(factor, 1)), {}, precision=32)
    sessions = {
        name: open_session(tmp_path / name, "cpu", n_threads=1)
        for name in ("model_first.onnx", "model.onnx")
    }
    for n_frames in (1, 5, 17):
        bucket = _bucket(factor, (n_frames + 3) // 4)
        latents = _latents(bucket.latent_shape)
        expected = _frames(decoder, latents)
        got = np.stack(list(decode(latents, bucket, sessions.__getitem__)))
        assert got.shape == expected.shape == (n_frames, 6 * factor, 5 * factor, 3)
        assert np.abs(expected).max() > 0.1
        assert np.abs(got - expected).max() <= 1e-4


def test_tiles_are_decoded_as_clips_of_their_own(tmp_path: Path) -> None:
    decoder, tile = _decoder(8), Tile.within((48, 40), 32, 16)
    bucket = _bucket(8, 2, tile)
    assert bucket.tile is not None
    export_component(tmp_path, light_decoder_graphs(decoder, bucket), {}, precision=32)
    latents = _latents(bucket.latent_shape)

    def graph(name: str):
        return open_session(tmp_path / name, "cpu", n_threads=1)

    got = np.stack(list(decode(latents, bucket, graph, tiled=True)))
    corner = _frames(decoder, np.ascontiguousarray(latents[:, :, :4, :4]))
    alone = 8  # pixels from the corner that no other tile shows
    assert got.shape == (5, 48, 40, 3)
    assert np.abs(got[:, :alone, :alone] - corner[:, :alone, :alone]).max() <= 1e-4
    assert np.abs(got - _frames(decoder, latents)).max() > 1e-3  # it does see tiles' edges


def test_frames_do_not_know_what_comes_later() -> None:
    decoder = _decoder(8)
    latents = torch.from_numpy(_latents((_Z, 3, 4, 4)))[None]
    later = latents.clone()
    later[:, :, 2] += 1
    before, after = decoder(latents), decoder(later)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert not torch.equal(before[:, :, 5:], after[:, :, 5:])


def test_a_lift_deals_channels_out_to_frames_and_pixels() -> None:
    torch.manual_seed(0)
    lift = Lift(3, 2, in_time=True)
    x = torch.randn(1, 3, 2, 2, 3)
    y = lift.conv(x)
    wanted = torch.zeros(1, 2, 4, 4, 6)
    for k, c, i, j, t, h, w in itertools.product(*map(range, (2, 2, 2, 2, 2, 2, 3))):
        wanted[0, c, 2 * t + k, 2 * h + i, 2 * w + j] = y[0, ((k * 2 + c) * 2 + i) * 2 + j, t, h, w]
    assert torch.equal(lift(x), wanted[:, :, 1:])
    assert torch.equal(lift(x, []), wanted)


def test_a_convolution_sees_its_past() -> None:
    torch.manual_seed(0)
    conv = CausalConv(4, 4, (3, 3, 3), groups=4)
    x = torch.randn(1, 4, 5, 6, 6)
    whole = conv(x)
    assert torch.allclose(conv(x[:, :, :2]), whole[:, :, :2], atol=1e-6)
    assert torch.allclose(conv(x[:, :, 2:], [x[:, :, :2]]), whole[:, :, 2:], atol=1e-6)


def test_the_error_terms_are_what_they_say() -> None:
    torch.manual_seed(0)
    e = torch.randn(2, 3, 3, 8, 12)
    found = {name: float(one) for name, one in error_terms(e).items()}
    assert found["squared"] == pytest.approx(float((e * e).mean()), rel=1e-5)
    assert found["absolute"] == pytest.approx(float(e.abs().mean()), rel=1e-5)
    temporal = torch.stack([e[:, :, t + 1] - e[:, :, t] for t in range(2)])
    assert found["temporal"] == pytest.approx(float(temporal.abs().mean()), rel=1e-5)
    steps = []
    for s in (1, 2, 4):
        small = torch.empty(2, 3, 3, 8 // s, 12 // s)
        for i, j in itertools.product(range(8 // s), range(12 // s)):
            small[..., i, j] = e[..., s * i : s * i + s, s * j : s * j + s].mean((-1, -2))
        steps.append((small[..., 1:, :] - small[..., :-1, :]).abs().mean())
        steps.append((small[..., 1:] - small[..., :-1]).abs().mean())
    assert found["gradient"] == pytest.approx(float(sum(steps)) / 6, rel=1e-4)


def test_the_first_frame_counts_as_often_as_it_is_told() -> None:
    torch.manual_seed(0)
    e, first = torch.randn(2, 3, 3, 8, 12), 4
    once, often = error_terms(e), error_terms(e, first)
    for name in ("squared", "absolute", "gradient"):
        by_frame = [float(error_terms(e[:, :, t : t + 1])[name]) for t in range(3)]
        wanted = (first * by_frame[0] + by_frame[1] + by_frame[2]) / (first + 2)
        assert float(often[name]) == pytest.approx(wanted, rel=1e-5)
    assert float(often["temporal"]) == float(once["temporal"])


def test_more_stages_repeat_the_first() -> None:
    sizes = _SMALL.sizes(48, 4, 16)
    assert sizes["widths"] == (16, 16, 8, 8)
    assert (sizes["n_separable"], sizes["n_lifts_in_time"], sizes["patch_size"]) == (3, 2, 2)


@pytest.mark.parametrize(
    ("factors", "told"),
    [
        ((4, 12), "12 pixels"),
        ((3, 8), "3 frames"),
        ((2, 4), "3 stages, 4 pixels"),
        ((8, 8), "fewer"),
    ],
)
def test_factors_that_cannot_be_are_refused(factors: tuple[int, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        _SMALL.sizes(4, *factors)


_RECIPE = """
name: one
summary: a light decoder
calibration: tiny
decoder: {}
rules:
  - {{match: "*", weights: fp32}}
accept: {{suite: tiny}}
"""


def _recipe(folder: Path, decoder: str):
    path = folder / "one.yaml"
    path.write_text(_RECIPE.format(decoder))
    return load_recipe(str(path))


def test_a_recipe_names_it_or_sets_it_up(tmp_path: Path) -> None:
    assert _recipe(tmp_path, "light").decoder == Light()
    written = "{use: light, widths: [32, 16, 8], train: {n_steps: 7}}"
    found = _recipe(tmp_path, written).decoder
    assert (found.widths, found.train.n_steps) == ((32, 16, 8), 7)
    assert _recipe(tmp_path, "light").digest != _recipe(tmp_path, written).digest


@pytest.mark.parametrize(
    ("decoder", "told"),
    [
        ("ligth", "unknown name 'ligth' \\(did you mean 'light'\\?\\)"),
        ("3", "must be a mapping that names one of them"),
        ("{use: light, kernel: 4}", "kernel 4: must be odd"),
        ("{use: light, widths: [8, 8]}", "2 widths, but n_blocks of 3"),
        ("{use: light, n_separable: 9}", "n_separable 9: there are 3 widths"),
        ("{use: light, wdiths: [8, 8, 8]}", "unknown key"),
        ("{use: light, made: 2}", "made"),
    ],
)
def test_a_recipe_that_is_wrong_is_told_its_line(decoder: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=told) as error:
        _recipe(tmp_path, decoder)
    assert "one.yaml:5" in str(error.value)


@pytest.fixture
def student(micro_wan: Path, tmp_path: Path) -> Path:
    """The micro model with an untrained decoder."""
    folder = tmp_path / "student"
    shutil.copytree(micro_wan, folder)
    decoder = new_decoder(locate(str(micro_wan)), _SMALL)
    write_decoder(folder / "decoder", decoder, decoder.state_dict())
    return folder


def test_a_folder_with_one_decodes_with_it(student: Path, micro_wan: Path) -> None:
    source, original = locate(str(student)), locate(str(micro_wan))
    family = family_of(source)
    decoder = family.load(source, "vae_decoder")
    assert isinstance(decoder, LightDecoder)
    count = sum(p.numel() for p in decoder.parameters())
    assert family.parameters(source)["vae_decoder"] == count
    layers = [one for one in family.layers(source) if one.component == "vae_decoder"]
    assert {one.parameter for one in layers} == {
        name for name, p in decoder.named_parameters() if p.ndim >= 2
    }
    z = torch.randn(1, *family.latent_shape(source))
    mean, std = (torch.tensor(s).view(1, -1, 1, 1, 1) for s in family.latent_statistics(source))
    frames = family.decode(source, decoder, z)
    assert torch.equal(frames, decoder(z * std + mean).clamp(-1, 1))
    assert frames.shape == (1, 3, 5, 32, 32)
    whole, same = family.load(source, "vae"), family.load(original, "vae")
    x = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    assert torch.equal(family.encode(source, whole, x), family.encode(original, same, x))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"z_dim": 5}, "latents of 5 channels, 4 frames and 8 pixels a side; the VAE's have 4, 4"),
        ({"patch_size": 4}, "16 pixels a side"),
        ({"_class_name": "Other"}, "describes Other, expected LightDecoder"),
        ({"widths": None}, "missing: widths"),
        ({"widths": [8, 8, 8]}, "weights and config.json disagree"),
        ({"widths": "abc"}, "describes no decoder"),
    ],
)
def test_a_decoder_that_does_not_fit_is_refused(
    change: dict[str, object], told: str, student: Path
) -> None:
    path = student / "decoder" / "config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    source = locate(str(student))
    with pytest.raises(SourceError, match=told) as error:
        family_of(source).skeleton(source, "vae_decoder")
    assert "decoder" in str(error.value)


def test_what_it_will_be_is_known_before(micro_wan: Path) -> None:
    source = locate(str(micro_wan), hashed=False)
    with as_if_lightened(source, _SMALL) as student:
        family = family_of(student)
        expected = sum(p.numel() for p in new_decoder(source, _SMALL).parameters())
        assert family.parameters(student)["vae_decoder"] == expected
        assert student.model == source.model
        folder = student.folder
    assert not folder.exists()
    with as_if_lightened(source, None) as same:
        assert same is source
    long = Light(widths=(8,) * 4, n_blocks=(0,) * 4)
    with pytest.raises(PlanError, match="4 stages, 8 pixels"), as_if_lightened(source, long):
        pass
