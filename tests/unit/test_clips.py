"""Clips on disk and as video; the health check."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest

from hbxt_compress.clips import (
    Clip,
    ClipSet,
    contact_sheet,
    health,
    read_video,
    to_uint8,
    write_lossless_mp4,
    write_mp4,
)
from hbxt_compress.errors import RuntimeUnavailable, SourceError, StoreError, UsageError


def moving(n_frames: int = 9, height: int = 32, width: int = 48) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    frames = [np.stack([x * 4, y * 6, np.full_like(x, 10 * t)], axis=-1) for t in range(n_frames)]
    return np.stack(frames).astype(np.uint8)


def clip(seed: int = 0, *, latents: bool = False) -> Clip:
    states = np.random.default_rng(seed).standard_normal((2, 3, 3, 4, 4)).astype(np.float32)
    frames = moving() + np.uint8(seed)
    return Clip(
        frames=frames, prompt=f"p {seed} ü", seed=seed, fps=8.0, latents=states if latents else None
    )


def test_digest_covers_shape_and_bytes_only():
    one = clip()
    same = Clip(frames=one.frames.copy(), prompt="other", seed=9, fps=1.0)
    assert one.sha256 == same.sha256
    changed = one.frames.copy()
    changed[-1, -1, -1, -1] ^= 1
    reshaped = one.frames.reshape(9, 48, 32, 3)
    for frames in (changed, reshaped):
        assert Clip(frames=frames, prompt="", seed=0, fps=8.0).sha256 != one.sha256


def test_digest_does_not_depend_on_memory_layout():
    frames = clip().frames
    turned = np.asfortranarray(frames)
    assert Clip(frames=turned, prompt="", seed=0, fps=8.0).sha256 == clip().sha256


def test_set_round_trip(tmp_path):
    saved = ClipSet(clips=(clip(0, latents=True), clip(1)))
    saved.save(tmp_path / "set")
    loaded = ClipSet.load(tmp_path / "set")
    assert [(c.prompt, c.seed, c.fps) for c in loaded.clips] == [
        ("p 0 ü", 0, 8.0),
        ("p 1 ü", 1, 8.0),
    ]
    for before, after in zip(saved.clips, loaded.clips, strict=True):
        np.testing.assert_array_equal(before.frames, after.frames)
    np.testing.assert_array_equal(saved.clips[0].latents, loaded.clips[0].latents)
    assert loaded.clips[1].latents is None


def test_a_clip_gives_the_same_bytes_twice(tmp_path):
    for name in ("a", "b"):
        clip(1, latents=True).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert Clip.load(tmp_path / "a").sha256 == clip(1).sha256


def test_sealing_checks_what_it_seals(tmp_path):
    clip(0).save(tmp_path / ClipSet.file_name(0))
    clip(1).save(tmp_path / ClipSet.file_name(1))
    with pytest.raises(StoreError) as error:
        ClipSet.seal(tmp_path, [("p 0 ü", 0), ("other", 1), ("p 2 ü", 2)])
    assert "0001.safetensors: is of 'p 1 ü' (seed 1), not 'other'" in str(error.value)
    assert "0002.safetensors: not a readable clip" in str(error.value)
    assert not (tmp_path / "clips.json").exists()
    ClipSet.seal(tmp_path, [("p 0 ü", 0), ("p 1 ü", 1)])
    assert len(ClipSet.load(tmp_path).clips) == 2


def test_changed_and_missing_clips_are_all_named(tmp_path):
    ClipSet(clips=tuple(clip(i) for i in range(3))).save(tmp_path)
    content = bytearray((tmp_path / "0001.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "0001.safetensors").write_bytes(content)
    (tmp_path / "0002.safetensors").unlink()
    with pytest.raises(StoreError) as error:
        ClipSet.load(tmp_path)
    assert "0001.safetensors: frames changed" in str(error.value)
    assert "0002.safetensors" in str(error.value)
    assert "0000.safetensors" not in str(error.value)


@pytest.mark.parametrize("text", [None, "not json", json.dumps({"clips": None})])
def test_unreadable_index(tmp_path, text):
    if text is not None:
        (tmp_path / "clips.json").write_text(text)
    with pytest.raises(StoreError, match=r"clips\.json"):
        ClipSet.load(tmp_path)


def test_samples_are_clipped_then_rounded():
    samples = np.array([-9, -1.01, -1, 0, 0.999, 1, 1.01, 9, np.nan, np.inf, -np.inf])
    expected = [0, 0, 0, 128, 255, 255, 255, 255, 0, 255, 0]
    np.testing.assert_array_equal(to_uint8(samples), expected)


def test_uint8_round_trip_is_exact():
    values = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(values.astype(np.float32) / 127.5 - 1), values)


def test_mp4_round_trip(tmp_path):
    frames = moving()
    path = tmp_path / "deep" / "clip.mp4"
    assert write_mp4(path, iter(frames), 8) == 9
    back = read_video(path)
    assert back.shape == frames.shape
    assert back.dtype == np.uint8
    assert np.abs(back.astype(int) - frames).mean() < 3
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 8


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)])
def test_mp4_keeps_colours(tmp_path, colour):
    frames = np.broadcast_to(np.array(colour, dtype=np.uint8), (3, 32, 32, 3))
    write_mp4(tmp_path / "c.mp4", frames, 23.976)
    assert np.abs(read_video(tmp_path / "c.mp4").astype(int) - frames).max() <= 3


def test_read_video_stops_in_time(tmp_path):
    write_mp4(tmp_path / "c.mp4", moving(), 8)
    assert len(read_video(tmp_path / "c.mp4", max_frames=4)) == 4


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (moving()[:, :31], "even height"),
        ([moving()[0], moving(1, 16, 16)[0]], "frame 1 is"),
        ([moving()[0].astype(np.float32)], "float32"),
        ([], "no frames"),
    ],
)
def test_mp4_refuses_and_leaves_nothing(tmp_path, frames, message):
    (tmp_path / "clip.mp4").write_bytes(b"older")
    with pytest.raises(UsageError, match=message):
        write_mp4(tmp_path / "clip.mp4", frames, 8)
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    assert (tmp_path / "clip.mp4").read_bytes() == b"older"


def test_mp4_name(tmp_path):
    with pytest.raises(UsageError, match=r"ending in \.mp4"):
        write_mp4(tmp_path / "clip.gif", moving(), 8)


def test_no_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    with pytest.raises(RuntimeUnavailable, match=r"no H\.264 encoder"):
        write_mp4(tmp_path / "clip.mp4", moving(), 8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, b"", b"no video at all" * 100])
def test_unreadable_video(tmp_path, content):
    if content is not None:
        (tmp_path / "v.mp4").write_bytes(content)
    with pytest.raises(SourceError, match=r"v\.mp4"):
        read_video(tmp_path / "v.mp4")


def test_contact_sheet_shows_the_frames(tmp_path):
    first, second = moving(), 255 - moving()
    contact_sheet(tmp_path / "sheet.png", [first, second], n_columns=3)
    (sheet,) = read_video(tmp_path / "sheet.png")
    assert sheet.shape == (2 * 34, 3 * 50, 3)
    np.testing.assert_array_equal(sheet[1:33, 1:49], first[0])
    np.testing.assert_array_equal(sheet[1:33, 51:99], first[4])
    np.testing.assert_array_equal(sheet[35:67, 101:149], second[8])


def test_contact_sheet_of_different_sizes(tmp_path):
    with pytest.raises(UsageError, match="one frame size"):
        contact_sheet(tmp_path / "s.png", [moving(), moving(3, 16, 16)])


def test_healthy_clips():
    still = np.repeat(moving(1), 5, axis=0)
    dot_on_black = np.zeros((5, 16, 16, 3), dtype=np.uint8)
    dot_on_black[:, 8, 8] = (255, 0, 0)
    for frames in (moving(), still, dot_on_black, moving().astype(np.float32) / 255):
        assert health(frames) == []


@pytest.mark.parametrize(
    ("frames", "finding"),
    [
        (np.zeros((4, 8, 8, 3), dtype=np.uint8), "all black"),
        (np.full((4, 8, 8, 3), 127, dtype=np.uint8), "constant"),
        (np.full((4, 8, 8, 3), (255, 0, 0), dtype=np.uint8), "constant"),
        (np.arange(4, dtype=np.uint8).repeat(192).reshape(4, 8, 8, 3) * 60, "constant"),
        (np.full((4, 8, 8, 3), np.nan, dtype=np.float32), "768 of 768 values are not finite"),
        (np.full((4, 8, 8, 3), 2.0, dtype=np.float32), "not 0..1"),
        (np.zeros((4, 8, 8, 3), dtype=np.int64), "dtype int64"),
        (np.zeros((4, 3, 8, 8), dtype=np.uint8), "not T H W 3"),
        (np.zeros((0, 8, 8, 3), dtype=np.uint8), "not T H W 3"),
    ],
)
def test_unhealthy_clips(frames, finding):
    (found,) = health(frames)
    assert finding in found


def test_clips_of_a_folder_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    frames = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    made = [Clip(frames=frames + i, prompt=f"p{i}", seed=i, fps=8.0) for i in range(3)]
    ClipSet(clips=tuple(made)).save(tmp_path)
    found = ClipSet.load(tmp_path).clips
    assert len(found) == 3
    assert [one.prompt for one in found[1:]] == ["p1", "p2"]
    assert found[-1].sha256 == made[-1].sha256
    (tmp_path / ClipSet.file_name(1)).unlink()
    assert found[0].seed == 0
    with pytest.raises(StoreError, match=r"0001\.safetensors"):
        found[1]


@pytest.mark.parametrize("shape", [(5, 32, 48, 3), (2, 33, 47, 3)])
def test_a_lossless_video_gives_every_byte_back(
    tmp_path: Path, rng: np.random.Generator, shape: tuple[int, ...]
) -> None:
    frames = rng.integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / "new" / "clip.mp4"
    write_lossless_mp4(path, frames, 23.976)
    assert np.array_equal(read_video(path), frames)
    with av.open(str(path)) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(23.976, abs=1e-3)


def test_a_lossless_video_needs_its_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(av, "codecs_available", {"libx264"})
    with pytest.raises(RuntimeUnavailable, match="libx264rgb"):
        write_lossless_mp4(tmp_path / "c.mp4", np.zeros((1, 4, 4, 3), np.uint8), 8)
