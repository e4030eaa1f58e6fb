"""Procedural captioned clips: what the reference model learned and what it is judged on.

One clip is one or two coloured shapes, each with one motion, on a plain background; drawn with
signed distances, so edges are anti-aliased. A scene is a pure function of (split, index): training,
calibration and evaluation never share a seed, and evaluation uses only attribute combinations that
the other splits never show (for every colour, shape and motion, one background is held out).

Clips are float32 arrays T H W C in [0, 1], sRGB values as displayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "FPS",
    "MOTIONS",
    "N_FRAMES",
    "SHAPES",
    "SIZE_PX",
    "Scene",
    "Split",
    "Thing",
    "caption",
    "combinations",
    "dataset",
    "draw",
    "scene",
]

Split = Literal["train", "calibration", "evaluation"]

SIZE_PX = 64
N_FRAMES = 17
FPS = 8

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.13, 0.13),
    "green": (0.13, 0.69, 0.20),
    "blue": (0.16, 0.27, 0.91),
    "yellow": (0.94, 0.86, 0.12),
    "magenta": (0.86, 0.16, 0.78),
    "cyan": (0.12, 0.82, 0.86),
}
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS: dict[str, str] = {
    "left": "moving left",
    "right": "moving right",
    "up": "moving up",
    "down": "moving down",
    "circle": "moving in a circle",
    "still": "standing still",
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.03, 0.03, 0.03),
    "gray": (0.45, 0.45, 0.45),
    "white": (0.95, 0.95, 0.95),
}
_DIRECTION = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_SEED = {"train": 1, "calibration": 2, "evaluation": 3}
_TWO_OBJECTS = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One moving shape. Lengths in pixels, speed in pixels a frame; (x, y) is where it starts."""

    colour: str
    shape: str
    motion: str
    radius: float
    speed: float
    x: float
    y: float
    phase: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What one clip shows; the last of `things` is drawn on top."""

    things: tuple[Thing, ...]
    background: str


def combinations(split: Split) -> list[tuple[str, str, str, str]]:
    """(colour, shape, motion, background) that a split may show; evaluation's are held out."""
    found = []
    for c, s, m, b in product(
        *map(range, (len(COLOURS), len(SHAPES), len(MOTIONS), len(BACKGROUNDS)))
    ):
        held_out = (c + s + m) % len(BACKGROUNDS) == b
        if held_out == (split == "evaluation"):
            found.append((list(COLOURS)[c], SHAPES[s], list(MOTIONS)[m], list(BACKGROUNDS)[b]))
    return found


def scene(split: Split, index: int) -> Scene:
    """Scene number `index` of a split; evaluation walks all its combinations before any repeats."""
    rng = np.random.default_rng([_SEED[split], index])
    allowed = combinations(split)
    if split == "evaluation":
        order = np.random.default_rng([_SEED[split], index // len(allowed)]).permutation(
            len(allowed)
        )
        pick = allowed[order[index % len(allowed)]]
    else:
        pick = allowed[rng.integers(len(allowed))]
    colour, shape, motion, background = pick
    things = [_place(rng, colour, shape, motion)]
    if split == "train" and rng.random() < _TWO_OBJECTS:
        others = [c for c in allowed if c[3] == background and c[0] != colour]
        things.append(_place(rng, *others[rng.integers(len(others))][:3]))
    return Scene(things=tuple(things), background=background)


def _place(rng: np.random.Generator, colour: str, shape: str, motion: str) -> Thing:
    """A thing whose whole path stays inside the frame."""
    radius = rng.uniform(8.0, 12.5)
    speed = rng.uniform(1.25, 2.0)
    low, high = radius + 1, SIZE_PX - radius - 1
    x, y = rng.uniform(low, high, size=2)
    if motion in _DIRECTION:
        travel = speed * (N_FRAMES - 1)
        dx, dy = _DIRECTION[motion]
        x = (
            rng.uniform(low, high - travel)
            if dx > 0
            else rng.uniform(low + travel, high)
            if dx
            else x
        )
        y = (
            rng.uniform(low, high - travel)
            if dy > 0
            else rng.uniform(low + travel, high)
            if dy
            else y
        )
    elif motion == "circle":
        orbit = 6.0 * speed
        x, y = rng.uniform(low + orbit, high - orbit, size=2)
    return Thing(
        colour=colour, shape=shape, motion=motion, radius=radius, speed=speed,
        x=float(x), y=float(y), phase=rng.uniform(0, 2 * np.pi),
    )  # fmt: skip


def caption(what: Scene, variant: int = 0) -> str:
    """The caption of a scene; variant 0 is the canonical wording, 1 to 3 say the same otherwise."""
    parts = []
    for thing in what.things:
        motion = MOTIONS[thing.motion]
        if variant % 2:
            motion = motion.replace("moving", "moves").replace("standing", "stands")
        parts.append(f"a {thing.colour} {thing.shape} {motion}")
    text = " and ".join(parts)
    return (
        f"{text} on a {what.background} background"
        if variant < 2
        else f"{text}, {what.background} background"
    )


def _path(thing: Thing, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if thing.motion in _DIRECTION:
        dx, dy = _DIRECTION[thing.motion]
        return thing.x + dx * thing.speed * t, thing.y + dy * thing.speed * t
    if thing.motion == "circle":
        angle = thing.phase + 2 * np.pi * t / (N_FRAMES - 1)
        return thing.x + 6 * thing.speed * np.cos(angle), thing.y + 6 * thing.speed * np.sin(angle)
    return np.full_like(t, thing.x), np.full_like(t, thing.y)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance in pixels (negative inside) to a shape of radius r centred at 0."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.88 * r
    if shape == "cross":
        a, b = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(a - r, b - r / 3), np.maximum(a - r / 3, b - r))
    side = (2 * np.abs(x) - (y + r)) / np.sqrt(5.0)  # apex at (0, -r), base corners at (+-r, +r)
    return np.maximum(side, y - r)


def draw(what: Scene) -> np.ndarray:
    """The clip of a scene: float32, T H W 3, in [0, 1]."""
    t = np.arange(N_FRAMES, dtype=np.float64)
    grid = np.arange(SIZE_PX) + 0.5
    clip = np.empty((N_FRAMES, SIZE_PX, SIZE_PX, 3))
    clip[:] = BACKGROUNDS[what.background]
    for thing in what.things:
        cx, cy = _path(thing, t)
        x = grid[None, None, :] - cx[:, None, None]
        y = grid[None, :, None] - cy[:, None, None]
        cover = np.clip(0.5 - _distance(thing.shape, x, y, thing.radius), 0.0, 1.0)[..., None]
        clip = clip * (1 - cover) + np.asarray(COLOURS[thing.colour]) * cover
    return clip.astype(np.float32)


def dataset(split: Split, indices: Sequence[int]) -> Dataset:
    """Rows {index, caption, colour, shape, motion, background, clip uint8 T H W 3} of a split."""
    from datasets import Dataset

    rows: dict[str, list[object]] = {
        key: [] for key in ("index", "caption", "colour", "shape", "motion", "background", "clip")
    }
    for index in indices:
        what = scene(split, index)
        first = what.things[0]
        values = (
            index, caption(what), first.colour, first.shape, first.motion, what.background,
            np.rint(draw(what) * 255).astype(np.uint8),
        )  # fmt: skip
        for key, value in zip(rows, values, strict=True):
            rows[key].append(value)
    return Dataset.from_dict(rows)
