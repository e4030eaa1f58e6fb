"""The failures that people see, done to clips.

A failure is a function of a Scene (a clip that can be asked for its frames at any time, and a
second clip) and a strength. Each states which of its strengths counts as visible and which
detectors must say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from scenes import Scene, bytes_of
from scipy.ndimage import gaussian_filter

from hbxt_compress.clips import Clip

__all__ = ["FAILURES", "Damage"]

Make = Callable[[Scene, float, np.random.Generator], np.ndarray | Clip | None]


@dataclass(frozen=True, slots=True)
class Damage:
    """A failure. make gives frames or a clip, None where the scene cannot show it.

    visible: the strength that a person sees. caught_by: one of these detectors must say so. alone:
    one such clip among others is a failure. by_content: how much it changes depends on the scene
    (on its motion, say), so that it must change more than 4 bits do to be seen there. smeared: a
    codec leaves little of it, which comes after clips are judged.
    """

    make: Make
    strengths: tuple[float, ...]
    visible: float
    caught_by: tuple[str, ...]
    alone: bool = False
    by_content: bool = False
    smeared: bool = False


def _black(s: Scene, share: float, rng: np.random.Generator) -> np.ndarray:
    out = s.frames.copy()
    out[round(len(out) * (1 - share)) :] = 0
    return out


def _constant(s: Scene, share: float, rng: np.random.Generator) -> np.ndarray:
    out = s.frames.copy()
    n = round(len(out) * share)
    out[len(out) - n :] = out.mean(axis=(0, 1, 2)).astype(np.uint8)
    return out


def _non_finite(s: Scene, share: float, rng: np.random.Generator) -> Clip:
    latents = np.zeros((3, 4, 5, 8, 8), dtype=np.float32) if s.clip.latents is None else (
        s.clip.latents.copy()
    )  # fmt: skip
    flat = latents[-1].reshape(-1)
    flat[rng.permutation(flat.size)[: max(1, round(share * flat.size))]] = np.nan
    return replace(s.clip, latents=latents)


def _frozen(s: Scene, share: float, rng: np.random.Generator) -> np.ndarray:
    out = s.frames.copy()
    k = round((len(out) - 1) * (1 - share))
    out[k:] = out[k]
    return out


def _speed(s: Scene, factor: float, rng: np.random.Generator) -> np.ndarray | None:
    return s.at(np.arange(len(s.frames)) * factor) if s.speedable or factor < 1 else None


def _flicker(s: Scene, levels: float, rng: np.random.Generator) -> np.ndarray:
    return bytes_of(s.frames + rng.normal(0, levels, (len(s.frames), 1, 1, 1)))


def _local_flicker(s: Scene, levels: float, rng: np.random.Generator) -> np.ndarray:
    t, h, w, _ = s.frames.shape
    blobs = gaussian_filter(rng.normal(size=(t, h, w)), (0, h / 10, w / 10))
    return bytes_of(s.frames + (levels * blobs / blobs.std())[..., None])


def _shift(s: Scene, levels: float, rng: np.random.Generator) -> np.ndarray:
    return bytes_of(s.frames + np.float64(levels))


def _channel_shift(s: Scene, levels: float, rng: np.random.Generator) -> np.ndarray:
    return bytes_of(s.frames + levels * np.eye(3)[round(abs(levels)) % 3])


def _contrast(s: Scene, factor: float, rng: np.random.Generator) -> np.ndarray:
    return bytes_of(16 + s.frames * factor if factor < 1 else (s.frames - 128.0) * factor + 128)


def _saturation(s: Scene, factor: float, rng: np.random.Generator) -> np.ndarray:
    grey = s.frames.mean(axis=-1, keepdims=True)
    return bytes_of(grey + (s.frames - grey) * factor)


def _blur(s: Scene, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return bytes_of(gaussian_filter(s.frames.astype(np.float32), (0, sigma, sigma, 0)))


def _sharpen(s: Scene, amount: float, rng: np.random.Generator) -> np.ndarray:
    x = s.frames.astype(np.float32)
    return bytes_of(x + amount * (x - gaussian_filter(x, (0, 1, 1, 0))))


def _seams(s: Scene, levels: float, rng: np.random.Generator) -> np.ndarray:
    """Tiles of a third to a half of the frame, each with an offset of its own."""
    _, h, w, _ = s.frames.shape
    tile = int(rng.integers(min(h, w) // 3, min(h, w) // 2 + 1))
    rows, columns = -(-h // tile), -(-w // tile)
    sign = (np.add.outer(np.arange(rows), np.arange(columns)) % 2) - 0.5
    offsets = levels * (sign + rng.uniform(-0.2, 0.2, sign.shape))
    field = np.kron(offsets, np.ones((tile, tile)))[:h, :w]
    return bytes_of(s.frames + field[..., None])


def _lines(s: Scene, levels: float, rng: np.random.Generator) -> np.ndarray:
    """A darker line of one pixel where tiles meet."""
    _, h, w, _ = s.frames.shape
    tile = int(rng.integers(min(h, w) // 3, min(h, w) // 2 + 1))
    out = s.frames.astype(np.float32)
    out[:, tile - 1 :: tile] -= levels
    out[:, :, tile - 1 :: tile] -= levels
    return bytes_of(out)


def _other_clip(s: Scene, _: float, rng: np.random.Generator) -> np.ndarray:
    return s.other.frames


def _first_frame_then_garbage(s: Scene, share: float, rng: np.random.Generator) -> np.ndarray:
    out = np.repeat(s.frames[:1], len(s.frames), axis=0)
    n = round(share * len(out))
    blobs = gaussian_filter(rng.normal(size=(n, *out.shape[1:])), (1, 2, 2, 0))
    out[len(out) - n :] = bytes_of(128 + 50 * blobs / blobs.std())
    return out


def _first_frame_then_fade(s: Scene, left: float, rng: np.random.Generator) -> np.ndarray:
    """The first frame, faded to grey until only the share `left` of its contrast is there."""
    kept = np.linspace(1, left, len(s.frames))[:, None, None, None]
    first = s.frames[:1].astype(np.float32)
    return bytes_of(kept * first + (1 - kept) * first.mean())


def _shuffle(s: Scene, reach: float, rng: np.random.Generator) -> np.ndarray:
    order = np.argsort(np.arange(len(s.frames)) + rng.uniform(0, reach, len(s.frames)))
    return s.frames[order]


def _dropped(s: Scene, n: float, rng: np.random.Generator) -> np.ndarray:
    k = int(rng.integers(3, len(s.frames) - 5))
    order = np.minimum(np.where(np.arange(len(s.frames)) < k, 0, int(n))
                       + np.arange(len(s.frames)), len(s.frames) - 1)  # fmt: skip
    return s.frames[order]


def _inserted(s: Scene, n: float, rng: np.random.Generator) -> np.ndarray:
    k = int(rng.integers(3, len(s.frames) - 5))
    t = np.arange(len(s.frames))
    return s.frames[np.where(t < k, t, np.maximum(t - int(n), k - 1))]


def _repeated(s: Scene, n: float, rng: np.random.Generator) -> np.ndarray:
    out = s.frames.copy()
    for k in rng.permutation(np.arange(3, len(out) - 3))[: int(n)]:
        out[k] = s.frames[k - 1]
    return out


def _wrap(s: Scene, share: float, rng: np.random.Generator) -> np.ndarray | None:
    """Sharpened past white at its brightest edges, a share of all values, and taken modulo 256."""
    x = s.frames.astype(np.float32)
    if np.quantile(x, 0.98) < 200:
        return None
    detail = x - gaussian_filter(x, (0, 1.5, 1.5, 0))
    sharp = np.where(x > 180, x + np.maximum(detail, 0), x)
    over = sharp >= np.quantile(sharp, 1 - share)
    excess = np.clip(sharp - 235, 0, 30)
    return np.where(over & (x > 180), excess, x).astype(np.uint8)


def _inverted(s: Scene, _: float, rng: np.random.Generator) -> np.ndarray:
    return 255 - s.frames


def _bgr(s: Scene, _: float, rng: np.random.Generator) -> np.ndarray:
    return np.ascontiguousarray(s.frames[..., ::-1])


def _residue(s: Scene, levels: float, rng: np.random.Generator) -> np.ndarray:
    """Noise of a latent's size that is left: grain of 2 pixels that stays for four frames."""
    t, h, w, _ = s.frames.shape
    grain = rng.normal(size=(-(-t // 4) + 1, h, w, 3)) @ (np.full((3, 3), 0.5) + np.eye(3))
    grain = gaussian_filter(grain, (0, 1.0, 1.0, 0))
    grain = np.repeat(grain, 4, axis=0)[3 : 3 + t]
    return bytes_of(s.frames + levels * grain / grain.std())


def _one_step_early(s: Scene, share: float, rng: np.random.Generator) -> Clip | None:
    """Latents that end a share of the last step early; None without latents.

    Frames are as they are: of the built-in model they change by 34 dB, without grain.
    """
    if s.clip.latents is None:
        return None
    last, before = s.clip.latents[-1], s.clip.latents[-2]
    ended = last + np.float32(share) * (before - last)
    return replace(s.clip, latents=np.concatenate([s.clip.latents[:-1], ended[None]]))


_SHIFTS = ("red_shift", "green_shift", "blue_shift")

FAILURES: Final[Mapping[str, Damage]] = {
    "black": Damage(_black, (0.1, 1.0), 0.1, ("black",), alone=True),
    "constant": Damage(_constant, (0.1, 1.0), 0.1, ("constant",), alone=True),
    "non-finite latents": Damage(_non_finite, (0.001,), 0.001, ("non_finite",), alone=True),
    "frozen": Damage(_frozen, (0.25, 0.5, 1.0), 0.5, ("frozen",), alone=True, by_content=True),
    "slow motion": Damage(_speed, (0.95, 0.9, 0.8), 0.9, ("slow_motion",), by_content=True),
    "fast motion": Damage(_speed, (1.05, 1.1), 1.1, ("slow_motion",), by_content=True),
    "flicker": Damage(_flicker, (1.5, 3.0), 3.0, ("flicker",)),
    "local flicker": Damage(_local_flicker, (2.0, 4.0), 4.0, ("local_flicker",)),
    "brighter": Damage(_shift, (2.0, 4.0), 4.0, _SHIFTS),
    "darker": Damage(_shift, (-2.0, -4.0), -4.0, _SHIFTS),
    "one channel shifted": Damage(_channel_shift, (2.0, 4.0), 4.0, _SHIFTS),
    "limited range": Damage(_contrast, (0.93, 0.86), 0.86, ("contrast",)),
    "pale": Damage(_saturation, (0.9, 0.8), 0.8, ("saturation",), by_content=True),
    "blur": Damage(_blur, (0.6, 1.0, 1.5), 1.0, ("blur",), by_content=True),
    "sharpened": Damage(_sharpen, (0.5, 1.0), 1.0, ("blur",)),
    "seams": Damage(_seams, (2.0, 4.0), 4.0, ("seams",), alone=True),
    "seam lines": Damage(_lines, (3.0, 6.0), 6.0, ("seams",), alone=True),
    "another clip's prompt": Damage(
        _other_clip, (1.0,), 1.0, ("wrong_prompt", "other_scene"), alone=True
    ),
    "first frame, then garbage": Damage(
        _first_frame_then_garbage, (0.25, 0.5), 0.5, ("first_frame_only",), alone=True
    ),
    "first frame, fading": Damage(
        _first_frame_then_fade, (0.6, 0.3), 0.3, ("first_frame_only",), alone=True
    ),
    "shuffled frames": Damage(
        _shuffle, (1.5, 3.0, 17.0), 3.0, ("frame_shuffle",), alone=True, by_content=True
    ),
    "dropped frame": Damage(
        _dropped, (1.0, 2.0), 1.0, ("dropped_frame",), alone=True, by_content=True
    ),
    "doubled frame": Damage(
        _inserted, (1.0, 2.0), 1.0, ("dropped_frame",), alone=True, by_content=True
    ),
    "repeated frame": Damage(
        _repeated, (1.0, 2.0), 1.0, ("repeated_frame",), alone=True, by_content=True
    ),
    "one step early": Damage(_one_step_early, (0.5, 1.0), 1.0, ("off_by_one_step",), alone=True),
    "noise left": Damage(_residue, (3.0, 6.0), 6.0, ("grain",)),
    "uint8 wrap": Damage(_wrap, (0.001, 0.003), 0.003, ("uint8_wrap",), alone=True, smeared=True),
    "inverted": Damage(_inverted, (1.0,), 1.0, ("inverted",), alone=True),
    "RGB as BGR": Damage(_bgr, (1.0,), 1.0, ("swapped_channels",), alone=True, by_content=True),
}
