"""Real videos as frames at another rate."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from hbxt_compress.clips import write_mp4
from hbxt_compress.errors import SourceError
from hbxt_compress.footage import timed_frames, video_seconds


def _grey(path: Path, levels: list[int], fps: float = 8.0) -> Path:
    """A video whose frames are uniformly grey: level k tells which one it is."""
    write_mp4(path, (np.full((32, 32, 3), level, np.uint8) for level in levels), fps)
    return path


def _shown(path: Path, n_frames: int, fps: float, start_s: float = 0.0) -> list[int]:
    """Which of the frames 0, 20, 40, ... were given."""
    found = timed_frames(path, n_frames=n_frames, fps=fps, start_s=start_s)
    return [round(float(frame.mean()) / 20) for frame in found]


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (8.0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (16.0, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
        (4.0, [0, 2, 4, 6, 8]),
        (5.0, [0, 1, 3, 4, 6, 8, 9]),  # 0, .2, .4, .6, .8, 1, 1.2 s of frames each .125 s
    ],
)
def test_the_frame_on_screen_at_each_moment(
    fps: float, expected: list[int], tmp_path: Path
) -> None:
    path = _grey(tmp_path / "v.mp4", [20 * k for k in range(10)])
    assert _shown(path, len(expected), fps) == expected


def test_moments_are_counted_from_the_start_that_is_asked_for(tmp_path: Path) -> None:
    path = _grey(tmp_path / "v.mp4", [20 * k for k in range(10)])
    assert _shown(path, 3, 8.0, 0.5) == [4, 5, 6]
    assert _shown(path, 3, 4.0, 0.3) == [2, 4, 6]
    with pytest.raises(SourceError, match=r"from 1\.00 s on it has 2 of the 3 frames"):
        _shown(path, 3, 8.0, 1.0)


def test_uneven_time_stamps_are_what_counts(tmp_path: Path) -> None:
    path, times = tmp_path / "v.mkv", (0, 100, 200, 1000, 1100)  # thousandths of a second
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 1000)
        for k, at in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * k, np.uint8), "rgb24")
            frame.pts, frame.time_base = at, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert _shown(path, 6, 5.0) == [0, 2, 2, 2, 2, 3]
    assert video_seconds(path) == pytest.approx(1.1, abs=0.15)


@pytest.mark.parametrize("fps", [8.0, 23.976, 30.0])
def test_length_is_that_of_all_frames(fps: float, tmp_path: Path) -> None:
    path = _grey(tmp_path / "v.mp4", [0] * 12, fps)
    assert video_seconds(path) == pytest.approx(12 / fps, abs=1e-3)
    assert len(_shown(path, 12, fps)) == 12


def test_a_video_that_ends_too_early_says_when(tmp_path: Path) -> None:
    path = _grey(tmp_path / "v.mp4", [0] * 5)
    with pytest.raises(SourceError, match=r"v\.mp4: from 0\.00 s on it has 5 of the 6 frames"):
        _shown(path, 6, 8.0)


@pytest.mark.parametrize("read", [video_seconds, lambda path: _shown(path, 1, 8.0)])
@pytest.mark.parametrize("content", [None, b"", b"no video at all" * 100])
def test_what_is_no_video_is_named(read, content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "v.mp4").write_bytes(content)
    with pytest.raises(SourceError, match=r"v\.mp4: not a readable video"):
        read(tmp_path / "v.mp4")


def test_real_files_of_every_kind_can_be_read(shared_data: Path) -> None:
    paths = sorted(p for p in (shared_data / "clips").iterdir() if p.suffix in (".mp4", ".mkv"))
    assert paths
    for path in paths[::6]:
        seconds = video_seconds(path)
        frames = list(timed_frames(path, n_frames=5, fps=8.0, start_s=seconds / 2 - 0.4))
        assert len(frames) == 5, path
        assert 1 < seconds < 60
        assert frames[0].dtype == np.uint8
        assert frames[0].std() > 1
