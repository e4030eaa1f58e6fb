"""An analytic judge: what a clip of one plain moving shape shows, measured from its pixels.

Nothing here is learned and nothing is shared with the code that draws the clips. The object is
segmented by its distance from the background colour; its colour is a median, its shape is told by
the third and fourth angular moments about its centroid, its motion by the centroid's track.
A clip that fits no word gets None for that attribute.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["Judgement", "agreement", "expected", "judge"]

_COLOURS = {
    "red": (0.86, 0.13, 0.13),
    "green": (0.13, 0.69, 0.20),
    "blue": (0.16, 0.27, 0.91),
    "yellow": (0.94, 0.86, 0.12),
    "magenta": (0.86, 0.16, 0.78),
    "cyan": (0.12, 0.82, 0.86),
}
_BACKGROUNDS = {"black": 0.03, "gray": 0.45, "white": 0.95}
# (mean Re z^4 / mean |z|^4, |mean z^3| / mean |z|^3, 2 pi * radius of gyration^2 / area) of each
# ideal shape, z measured from the centroid with the axes of the frame.
_SHAPES = {
    "circle": (0.0, 0.0, 1.0),
    "square": (-0.429, 0.0, 1.047),
    "triangle": (0.030, 0.652, 1.222),
    "cross": (0.571, 0.0, 1.215),
}
_SHAPE_SCALE = np.array([0.25, 0.25, 0.5])
_DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

_LEAST_CONTRAST = 0.15  # of the object's brightest 1.5 % against the background, RGB in [0, 1]
_COVERED = 0.25  # least coverage that counts as object
_LEAST_AREA = 0.008  # of the frame
_STILL_SPREAD = 1 / 32  # of the frame's width: root mean square distance from the mean place
_STRAIGHT = 0.85  # least share of the track's variance that a uniform motion explains
_LEAST_TURN = 1.4 * np.pi  # about the mean place

_PROMPT = re.compile(
    r"a (?P<colour>{}) (?P<shape>{}) "
    r"(?:mov(?:ing|es) (?P<way>left|right|up|down|in a circle)|(?:standing|stands) still)"
    r"(?: on a|,) (?P<background>{}) background".format(
        "|".join(_COLOURS), "|".join(_SHAPES), "|".join(_BACKGROUNDS)
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What a clip shows, in the words of the prompts; None where no word fits."""

    colour: str | None
    shape: str | None
    motion: str | None
    background: str | None


def expected(prompt: str) -> Judgement | None:
    """What a prompt asks for; None if it is not about exactly one object in the known words."""
    found = _PROMPT.fullmatch(prompt.strip().lower().removesuffix("."))
    if found is None:
        return None
    way = found["way"] or "still"
    return Judgement(
        colour=found["colour"],
        shape=found["shape"],
        motion="circle" if way == "in a circle" else way,
        background=found["background"],
    )


def agreement(seen: Judgement, wanted: Judgement) -> dict[str, float]:
    """1.0 or 0.0 for each of colour, shape and motion."""
    names = ("colour", "shape", "motion")
    return {name: float(getattr(seen, name) == getattr(wanted, name)) for name in names}


def judge(frames: np.ndarray) -> Judgement:
    """What uint8 frames T H W 3 show."""
    clip = frames.astype(np.float64) / 255
    edges = (clip[:, :2], clip[:, -2:], clip[:, :, :2], clip[:, :, -2:])
    behind = np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)
    background = _background(behind)
    away = np.linalg.norm(clip - behind, axis=-1)
    n_top = max(1, int(0.015 * away.size))
    contrast = float(np.partition(away.ravel(), -n_top)[-n_top:].mean())
    if contrast < _LEAST_CONTRAST:
        return Judgement(colour=None, shape=None, motion=None, background=background)
    own = np.median(clip[away > 0.7 * contrast], axis=0)
    cover = np.clip((clip - behind) @ (own - behind) / np.sum((own - behind) ** 2), 0, 1)
    cover[cover < _COVERED] = 0
    centres, moments = [], []
    for frame in cover:
        place, moment = _measure(frame)
        centres.append(place)
        moments.append(moment)
    return Judgement(
        colour=_nearest(own, _COLOURS, 0.35),
        shape=_shape(np.array(moments)),
        motion=_motion(np.array(centres), width=clip.shape[2]),
        background=background,
    )


def _background(colour: np.ndarray) -> str | None:
    grays = {name: (level, level, level) for name, level in _BACKGROUNDS.items()}
    return _nearest(colour, grays, 0.3)


def _nearest(
    colour: np.ndarray, named: Mapping[str, tuple[float, ...]], farthest: float
) -> str | None:
    far = {name: float(np.linalg.norm(colour - np.array(value))) for name, value in named.items()}
    best = min(far, key=far.__getitem__)
    return best if far[best] <= farthest else None


def _measure(
    cover: np.ndarray,
) -> tuple[tuple[float, float], tuple[complex, complex, float, float, float, float]]:
    """The centre (x, y), and sums of z^4, z^3, |z|^4, |z|^3, |z|^2 and 1 over one frame's object.

    NaN where the frame shows none. Pixels too far from the object's middle to belong are left out.
    """
    height, width = cover.shape
    y, x = np.mgrid[:height, :width] + 0.5
    kept = cover
    z = np.zeros_like(cover, dtype=complex)
    for _ in range(3):
        area = kept.sum()
        if area < _LEAST_AREA * cover.size:
            return (np.nan, np.nan), (np.nan,) * 6
        cx, cy = (kept * x).sum() / area, (kept * y).sum() / area
        z = (x - cx) + 1j * (y - cy)
        kept = np.where(np.abs(z) < 2.0 * np.sqrt(area / np.pi), cover, 0)
    r = np.abs(z)
    sums = ((kept * z**4).sum(), (kept * z**3).sum(), (kept * r**4).sum(),
            (kept * r**3).sum(), (kept * r**2).sum(), kept.sum())  # fmt: skip
    return (cx, cy), sums


def _shape(moments: np.ndarray) -> str | None:
    """The shape from the frames' moments, (T, 6) complex."""
    seen = moments[~np.isnan(moments.real).any(axis=1)]
    if 2 * len(seen) < len(moments):
        return None
    z4, z3, r4, r3, r2, area = seen.T
    # Normalised frame by frame, for the object's size may change; medians outvote odd frames.
    measured = np.array([
        np.median((z4 / r4).real),
        np.abs(np.median((z3 / r3).real) + 1j * np.median((z3 / r3).imag)),
        np.median((2 * np.pi * r2 / area**2).real),
    ])  # fmt: skip
    far = {
        name: float(np.linalg.norm((measured - np.array(ideal)) / _SHAPE_SCALE))
        for name, ideal in _SHAPES.items()
    }
    best = min(far, key=far.__getitem__)
    return best if far[best] <= 1.5 else None


def _motion(centres: np.ndarray, width: int) -> str | None:
    """The motion word for a track of centres (T, 2) in pixels, x to the right and y down."""
    seen = ~np.isnan(centres[:, 0])
    if 2 * seen.sum() < len(centres) or seen.sum() < 3:
        return None
    t = np.flatnonzero(seen).astype(np.float64)
    track = centres[seen]
    offset = track - track.mean(axis=0)
    variance = float((offset**2).sum(axis=1).mean())
    if np.sqrt(variance) < _STILL_SPREAD * width:
        return "still"
    t -= t.mean()
    slope = t @ offset / (t @ t)
    if (slope**2).sum() * (t**2).mean() >= _STRAIGHT * variance:
        heading = slope / np.linalg.norm(slope)
        for word, direction in _DIRECTIONS.items():
            if heading @ np.array(direction) > np.cos(np.pi / 6):
                return word
        return None
    turn = np.unwrap(np.arctan2(offset[:, 1], offset[:, 0]))
    return "circle" if abs(turn[-1] - turn[0]) >= _LEAST_TURN else None
