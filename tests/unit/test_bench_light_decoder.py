"""What the light decoder's bench says of clips that are known."""

from __future__ import annotations

import numpy as np
import pytest
from light_decoder import Decoded, figures, sheet


def _clip(*levels: float) -> np.ndarray:
    """T H W 3, each frame of one level."""
    return np.stack([np.full((4, 5, 3), level) for level in levels])


def test_figures_of_clips_that_are_known() -> None:
    real = [_clip(0.5, 0.6), _clip(0.5, 0.5)]
    full = [real[0] + 0.1, real[1] + _clip(0.0, 0.02)]
    light = [real[0] + _clip(0.0, 0.1), real[1] + _clip(0.1, 0.1)]
    told = figures(
        Decoded(real=real, full=full, light=light, seconds=[(0.9, 0.3), (0.8, 0.1), (1.0, 0.2)])
    )
    assert told["psnr_full"] == pytest.approx((20 - 10 * np.log10(0.0002)) / 2)
    assert told["psnr_light"] == pytest.approx((-10 * np.log10(0.005) + 20) / 2)
    assert told["psnr_lost"] == pytest.approx(told["psnr_full"] - told["psnr_light"])
    assert told["temporal_full"] == pytest.approx(0.01)
    assert told["temporal_light"] == pytest.approx(0.05)
    assert told["temporal_more"] == pytest.approx(4)
    assert (told["ms_full"], told["ms_light"]) == pytest.approx((800, 100))
    assert told["faster"] == pytest.approx(8)


def test_figures_without_real_clips_count_from_the_full_decoders() -> None:
    full, light = [_clip(0.2, 0.4)], [_clip(0.3, 0.6)]
    told = figures(Decoded(real=None, full=full, light=light, seconds=[(1.0, 0.5)]))
    assert told["psnr_to_full"] == pytest.approx(-10 * np.log10((0.01 + 0.04) / 2))
    assert told["temporal_error"] == pytest.approx(0.1)
    assert told["temporal_change"] == pytest.approx(0.5)


def test_a_sheet_has_five_frames_a_row() -> None:
    clip = _clip(*np.linspace(0, 1, 17))
    image = sheet([clip, clip], scale=1)
    assert image.size == (25, 8)
    assert image.getpixel((24, 7)) == (255, 255, 255)
    assert image.getpixel((0, 0)) == (0, 0, 0)
