"""The bench's clips show just what the prompts say that they stand in for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from noised_clips import write_scenes, write_set

from hbxt_compress.clips import read_video
from hbxt_compress.prompts import load_prompts


def test_a_set_of_scenes_is_the_standard_one_with_clips(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes")
    found = load_prompts(str(write_set(tmp_path / "small.yaml", 32, 9)))
    own = load_prompts("standard")
    assert found.prompts == own.prompts
    assert (found.seed, found.n_steps, found.observe, found.held_out) == (
        own.seed, own.n_steps, own.observe, own.held_out,
    )  # fmt: skip
    assert found.clips is not None
    assert len({clip.sha256 for clip in found.clips.files}) == len(own.prompts)
    red = own.prompts.index("a red circle moving left on a white background")
    frames = read_video(tmp_path / "scenes" / found.clips.files[red].file)
    assert frames.shape == (17, 64, 64, 3)
    assert frames[:, 0, 0].min() > 240  # white
    red_T, other_T = frames[..., 0].min(axis=(1, 2)), frames[..., 1].min(axis=(1, 2))
    assert (red_T.astype(int) - other_T > 80).all()
    columns = [np.argwhere(frame[..., 1] < 100)[:, 1].mean() for frame in frames]
    assert columns[0] > columns[8] + 3 or columns[0] < columns[8] - 3  # it moves
