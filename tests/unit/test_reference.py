"""The reference model's data and training: disjoint splits, exact drawing, exact resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hbxt_compress.reference import loop, shapes, train_vae, whole_clip


def test_scenes_are_functions_of_split_and_index() -> None:
    assert shapes.scene("train", 5) == shapes.scene("train", 5)
    assert np.array_equal(
        shapes.draw(shapes.scene("train", 5)), shapes.draw(shapes.scene("train", 5))
    )
    assert shapes.scene("train", 5) != shapes.scene("calibration", 5)


def test_evaluation_shows_only_combinations_that_training_never_does() -> None:
    held_out = set(shapes.combinations("evaluation"))
    assert held_out.isdisjoint(shapes.combinations("train"))
    assert len(held_out) + len(shapes.combinations("train")) == 6 * 4 * 6 * 3
    seen = [shapes.scene("evaluation", i) for i in range(128)]
    pairs = {
        (s.things[0].colour, s.things[0].shape, s.things[0].motion, s.background) for s in seen
    }
    assert len(pairs) == 128
    assert pairs <= held_out
    shown = [shapes.scene("train", i) for i in range(300)]
    assert any(len(s.things) == 2 for s in shown)
    for s in shown:
        assert {(t.colour, t.shape, t.motion, s.background) for t in s.things}.isdisjoint(held_out)


def test_every_attribute_pair_is_still_trained_on() -> None:
    trained = shapes.combinations("train")
    assert {(c, s, m) for c, s, m, _ in trained} == {
        (c, s, m) for c, s, m, _ in shapes.combinations("evaluation")
    }


def test_a_thing_stays_inside_its_frame() -> None:
    for i in range(200):
        what = shapes.scene("evaluation", i)
        clip = shapes.draw(what)
        assert clip.shape == (17, 64, 64, 3)
        assert clip.dtype == np.float32
        background = np.asarray(shapes.BACKGROUNDS[what.background], np.float32)
        changed = (
            np.abs(clip - background).max(-1)
            / np.abs(np.asarray(shapes.COLOURS[what.things[0].colour]) - background).max()
        )
        edge = np.concatenate(
            [changed[:, 0], changed[:, -1], changed[:, :, 0], changed[:, :, -1]], axis=1
        )
        assert edge.max() < 0.5  # the soft tip of a triangle may graze the border, nothing more


def test_edges_are_anti_aliased_and_areas_are_right() -> None:
    for shape, area in (
        ("circle", np.pi),
        ("square", 4 * 0.88**2),
        ("cross", 20 / 9),
        ("triangle", 2.0),
    ):
        thing = shapes.Thing(
            colour="red", shape=shape, motion="still", radius=12.0, speed=1.5, x=32.3, y=32.6
        )
        clip = shapes.draw(shapes.Scene(things=(thing,), background="black"))
        cover = (clip[0, ..., 0] - 0.03) / (0.86 - 0.03)
        assert cover.sum() == pytest.approx(area * 144, rel=0.03)
        assert ((cover > 0.05) & (cover < 0.95)).any()


def test_captions_say_it_in_four_ways() -> None:
    what = shapes.scene("evaluation", 0)
    assert len({shapes.caption(what, v) for v in range(4)}) == 4
    assert shapes.caption(what).endswith(f"on a {what.background} background")


def test_the_datasets_rows() -> None:
    rows = shapes.dataset("calibration", range(2))
    assert rows.num_rows == 2
    assert np.asarray(rows[1]["clip"], dtype=np.uint8).shape == (17, 64, 64, 3)
    assert rows[0]["caption"] == shapes.caption(shapes.scene("calibration", 0))


def test_whole_clips_equal_the_chunk_loop_of_diffusers() -> None:
    torch.manual_seed(0)
    vae = train_vae.new_vae().eval()
    x = train_vae.clips("train", range(2))
    with torch.no_grad():
        moments = vae.encode(x).latent_dist.parameters
        torch.testing.assert_close(whole_clip.encode(vae, x), moments, rtol=1e-4, atol=1e-5)
        z = moments[:, : train_vae.Z_DIM]
        torch.testing.assert_close(
            whole_clip.decode(vae, z).clamp(-1, 1), vae.decode(z).sample, rtol=1e-4, atol=2e-5
        )


def test_a_resumed_training_equals_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(folder: Path, stop_at: int | None) -> torch.Tensor:
        torch.manual_seed(3)
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

        def step(k: int) -> float:
            if k == stop_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(k))
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return float(loss.detach())

        loop.run("toy", folder, 20, {"model": model, "optimizer": optimizer}, step)
        return model.weight.detach().clone()

    monkeypatch.setattr(loop, "_SAVE_EVERY_S", -1.0)
    whole = train(tmp_path / "a", None)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", 13)
    assert torch.equal(train(tmp_path / "b", None), whole)


def test_a_training_that_diverges_stops(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="step 0"):
        loop.run("toy", tmp_path, 3, {}, lambda k: float("nan"))
