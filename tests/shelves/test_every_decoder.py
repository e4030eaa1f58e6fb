"""Every decoder's training makes a whole model folder, and a killed run the same one."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hbxt_compress.algorithms import DECODERS
from hbxt_compress.algorithms.light_decoder import Light, Losses
from hbxt_compress.algorithms.training import Training
from hbxt_compress.errors import CalibrationError
from hbxt_compress.lessons import Lessons
from hbxt_compress.machine import Machine
from hbxt_compress.models import family_of
from hbxt_compress.prompts import load_prompts
from hbxt_compress.reference import shapes
from hbxt_compress.source import BUILTIN, locate
from hbxt_compress.stages.distill import STUDENT
from hbxt_compress.stages.lighten import lighten
from hbxt_compress.stages.teach import teach
from hbxt_compress.stages.view import _real, n_real_clips, view
from hbxt_compress.store import Entry, Store
from hbxt_compress.views import View, Views
from tests.watching import killed_at

_SHORT = Training(n_steps=130, batch=4, rate=3e-3, judge_every=60, average=0.9, warmup=5)
SMALL = {
    "light": Light(widths=(16, 8, 8), n_blocks=(1, 1, 0), train=_SHORT, n_clips=16, prompts="tiny")
}


_RESUMED = SMALL["light"].model_copy(
    update={
        "train": _SHORT.model_copy(update={"n_steps": 104, "batch": 2, "judge_every": 50}),
        "n_clips": 8,
    }
)


def seen(store: Store, folder: Path, how: Light) -> tuple[Entry, Entry]:
    """What the model made, and its views."""
    source = locate(str(folder))
    lessons = store.result(
        teach, source=source, prompts=load_prompts(how.prompts), n_clips=how.n_clips, levels=(),
        on=Machine(),
    )  # fmt: skip
    views = store.result(
        view, source=source, lessons=lessons, n_real=n_real_clips(source, how.n_real),
        features=how.wants_features, on=Machine(),
    )  # fmt: skip
    return lessons, views


def made(store: Store, folder: Path, how: Light) -> Entry:
    _, views = seen(store, folder, how)
    return store.result(lighten, source=locate(str(folder)), views=views, how=how, on=Machine())


def test_each_is_tried_here() -> None:
    assert set(SMALL) == set(DECODERS)


@pytest.mark.parametrize("name", DECODERS)
def test_students_are_models_of_their_family(
    name: str, micro_wan: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        entry = made(Store(tmp_path / "store"), micro_wan, SMALL[name])
    assert "no real clips are known" in caplog.text
    student, original = locate(str(entry.folder / STUDENT)), locate(str(micro_wan))
    new = {"decoder/config.json", "decoder/diffusion_pytorch_model.safetensors"}
    assert set(student.files) - set(original.files) == new
    assert {one: student.files[one] for one in original.files} == original.files
    family = family_of(student)
    assert family.load(student, "vae_decoder")(torch.zeros(1, 4, 2, 4, 4)).shape[2:] == (5, 32, 32)
    curve = [json.loads(x) for x in (entry.folder / "training.jsonl").read_text().splitlines()]
    judged = [one["held_out"] for one in curve if "held_out" in one]
    (folder,) = (tmp_path / "store" / "view").glob("*/made-00000.safetensors")
    last = View.load(folder).frames_N3THW[-1].float() / 127.5 - 1  # the clip that judges
    of_one_colour = float((last - last.mean((1, 2, 3), keepdim=True)).square().mean())
    assert min(judged) < of_one_colour < judged[0]  # it learnt more than how bright clips are
    told = json.loads((entry.folder / "lightened.json").read_text())
    assert told["held_out_psnr_made"] == pytest.approx(-10 * np.log10(min(judged) / 4), rel=1e-4)


@pytest.fixture(scope="module")
def viewed(micro_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that has the clips and the views, but no decoder."""
    root = tmp_path_factory.mktemp("viewed") / "store"
    seen(Store(root), micro_wan, _RESUMED)
    return root


@pytest.fixture(scope="module")
def undisturbed(viewed: Path, micro_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Entry:
    root = tmp_path_factory.mktemp("undisturbed") / "store"
    shutil.copytree(viewed, root)
    return made(Store(root), micro_wan, _RESUMED)


@pytest.mark.parametrize("until", [60, 101])
def test_a_killed_training_ends_the_same(
    until: int, viewed: Path, undisturbed: Entry, micro_wan: Path, tmp_path: Path
) -> None:
    store = Store(shutil.copytree(viewed, tmp_path / "store"))
    with killed_at(until):
        made(store, micro_wan, _RESUMED)
    torch.manual_seed(until)  # nothing may depend on what else was drawn
    again = made(store, micro_wan, _RESUMED)
    assert again.digest == undisturbed.digest
    lines = (again.folder / "training.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, 105))


@pytest.mark.parametrize("features", [0.0, 0.02])
@pytest.mark.parametrize("residual", [True, False], ids=["wan2.2-kind", "wan2.1-kind"])
def test_views_are_what_the_full_decoder_gives(
    features: float, residual: bool, tmp_path: Path
) -> None:
    from tests.micro import write_micro_wan

    folder = write_micro_wan(tmp_path / "wan", residual_vae=residual)
    how = SMALL["light"].model_copy(update={"losses": Losses(features=features)})
    lessons, entry = seen(Store(tmp_path / "store"), folder, how)
    views, source = Views(entry.folder), locate(str(folder))
    assert (views.n("real"), views.n("made")) == (0, 16)
    found, family = views.rows("made", [3, 11]), family_of(source)
    vae, taught = family.load(source, "vae"), Lessons(lessons.folder)
    z = taught.states([3, 11], [len(taught.levels_K) - 1] * 2)
    mean, std = (torch.tensor(s).view(1, -1, 1, 1, 1) for s in family.latent_statistics(source))
    assert torch.equal(found.latents_NCTHW, z * std + mean)
    with torch.no_grad():
        frames = vae.decode(found.latents_NCTHW, return_dict=False)[0]
        # a clip of one latent frame passes the blocks as it is
        first = vae.decoder.conv_in(vae.post_quant_conv(found.latents_NCTHW[:, :, :1]))
        middle = vae.decoder.mid_block(first)
    assert (found.frames_N3THW.float() / 127.5 - 1 - frames).abs().max() <= 1 / 255 + 1e-4
    if features:
        low, high = found.features
        assert low.shape[2:] == (2, 4, 4)
        assert high.shape[2:] == (3, 8, 8)  # both kinds double time and pixels there
        assert (low[:, :, :1].float() - middle).abs().max() <= 0.01 * middle.abs().max()
    else:
        assert found.features == []


def test_real_clips_are_the_built_in_models_own() -> None:
    source = locate(BUILTIN, hashed=False)
    assert n_real_clips(source, 7) == 7
    family = family_of(source)
    vae = family.load(source, "vae")
    found = _real(family, source, vae, [2], family.geometry(source))
    drawn = shapes.draw(shapes.scene("train", 2))
    got = found.frames_N3THW[0].permute(1, 2, 3, 0).numpy()
    assert np.abs(got / 255 - drawn).max() <= 0.5 / 255 + 1e-6
    with torch.no_grad():
        again = vae.decode(found.latents_NCTHW, return_dict=False)[0]
    error = (again[0].permute(1, 2, 3, 0).numpy() + 1) / 2 - drawn
    assert -10 * np.log10((error**2).mean()) > 22  # a round trip through its VAE


def test_a_loss_that_is_not_finite_is_told_with_its_batch(micro_wan: Path, tmp_path: Path) -> None:
    wild = SMALL["light"].model_copy(
        update={"train": _SHORT.model_copy(update={"rate": 1e30, "warmup": 0, "clip": 1e30})}
    )
    with pytest.raises(CalibrationError, match=r"step \d+: loss (nan|inf).*batch is in .*batch-"):
        made(Store(tmp_path / "store"), micro_wan, wild)
