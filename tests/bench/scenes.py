"""Clips to judge detectors on: drawn, filmed and generated, each with its frames at other times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from hbxt_compress.clips import Clip, ClipSet, read_video
from hbxt_compress.reference import shapes

__all__ = ["Scene", "bytes_of", "drawn", "filmed", "generated"]

N_FRAMES = 17


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scene:
    """A reference clip; `at` gives its frames, uint8, at other times (in frames, from 0 on)."""

    clip: Clip
    at: Callable[[np.ndarray], np.ndarray]
    other: Clip
    speedable: bool = True

    @property
    def frames(self) -> np.ndarray:
        return self.clip.frames


def bytes_of(values: np.ndarray) -> np.ndarray:
    """Values in 0..255 as uint8: clipped, then rounded."""
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


def drawn(n: int, first: int = 0) -> list[Scene]:
    """Procedural captioned scenes, 64x64x17."""
    whats = [shapes.scene("evaluation", first + i) for i in range(n)]
    clips = [
        Clip(frames=_soft(shapes.draw(what)), prompt=shapes.caption(what), seed=i, fps=8.0)
        for i, what in enumerate(whats)
    ]
    return [
        Scene(clip=clip, at=_redrawn(what), other=_another(clips, i))
        for i, (what, clip) in enumerate(zip(whats, clips, strict=True))
    ]


def _redrawn(what: shapes.Scene) -> Callable[[np.ndarray], np.ndarray]:
    def one(thing: shapes.Thing, t: float, step: float) -> shapes.Thing:
        dx = {"left": -1, "right": 1}.get(thing.motion, 0) * thing.speed * t
        dy = {"up": -1, "down": 1}.get(thing.motion, 0) * thing.speed * t
        turn = 2 * np.pi * t / (shapes.N_FRAMES - 1)
        speed = thing.speed if thing.motion == "circle" else thing.speed * step
        return replace(thing, x=thing.x + dx, y=thing.y + dy, phase=thing.phase + turn, speed=speed)

    def drawn_from(t: float, step: float) -> np.ndarray:
        return shapes.draw(replace(what, things=tuple(one(x, t, step) for x in what.things)))

    def at(times: np.ndarray) -> np.ndarray:
        step = float(times[1] - times[0])
        even = len(times) <= shapes.N_FRAMES and np.allclose(np.diff(times), step)
        if even and all(thing.motion != "circle" for thing in what.things):
            return _soft(drawn_from(float(times[0]), step)[: len(times)])
        return _soft(np.stack([drawn_from(float(t), 1.0)[0] for t in times]))

    return at


def _soft(clip: np.ndarray) -> np.ndarray:
    """Bytes of values in 0..1, their edges as soft as a decoder leaves them."""
    return bytes_of(255 * gaussian_filter(clip, (0, 0.6, 0.6, 0)))


def filmed(folder: Path, size: int = 96, cuts: int = 2) -> list[Scene]:
    """Cuts of the videos of a folder: centre crop, size x size x 17; each is cut at most `cuts`
    times, and every second frame is taken, so that times between frames are known. Fades from
    black, which show nothing yet, are left out.
    """
    found: list[tuple[Clip, np.ndarray]] = []
    paths = sorted(p for p in folder.iterdir() if p.suffix in (".mp4", ".mkv"))
    for path in [p for p in paths if "-test" not in p.stem and "_test-" not in p.stem]:
        film = read_video(path, max_frames=cuts * 2 * (N_FRAMES + 3))
        film = np.stack([_cropped(frame, size) for frame in film])
        span = 2 * (N_FRAMES + 3)
        for k in range(max(1, min(cuts, len(film) // span))):
            part = film[k * span : (k + 1) * span]
            if len(part) >= 2 * N_FRAMES and np.median(part.std(axis=(1, 2, 3))) >= 20:
                clip = Clip(frames=part[: 2 * N_FRAMES : 2], prompt=path.stem, seed=k, fps=12.0)
                found.append((clip, part))
    clips = [clip for clip, _ in found]
    return [
        Scene(clip=clip, at=_between(part, 2), other=_another(clips, i))
        for i, (clip, part) in enumerate(found)
    ]


def generated(folder: Path) -> list[Scene]:
    """The clips of a ClipSet; times between frames are blended."""
    clips = list(ClipSet.load(folder).clips)
    return [
        Scene(clip=c, at=_between(c.frames, 1), other=_another(clips, i), speedable=False)
        for i, c in enumerate(clips)
    ]


def _another(clips: Sequence[Clip], i: int) -> Clip:
    """Of a few other clips the one that looks least like it: one person is filmed many times."""
    others = [clips[(i + k) % len(clips)] for k in (3, 5, 7, 11)]
    size = clips[i].frames.astype(np.float32)
    return max(others, key=lambda other: float(np.mean((other.frames - size) ** 2)))


def _cropped(frame: np.ndarray, size: int) -> np.ndarray:
    side = min(frame.shape[:2])
    y, x = ((n - side) // 2 for n in frame.shape[:2])
    image = Image.fromarray(frame[y : y + side, x : x + side])
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))


def _between(film: np.ndarray, stride: int) -> Callable[[np.ndarray], np.ndarray]:
    def at(times: np.ndarray) -> np.ndarray:
        where = np.minimum(np.asarray(times) * stride, len(film) - 1)
        low = np.minimum(where.astype(int), len(film) - 2)
        part = (where - low)[:, None, None, None]
        return bytes_of((1 - part) * film[low] + part * film[low + 1])

    return at
