"""Failures of content: another prompt, another scene, a scene that goes away, one step off."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hbxt_compress.clips import Clip
from hbxt_compress.metrics.failures.miniature import miniature
from hbxt_compress.metrics.judge import agreement, expected, judge

__all__ = [
    "FIRST_FRAME_ONLY",
    "OFF_BY_ONE_STEP",
    "OTHER_SCENE",
    "WRONG_PROMPT",
    "FirstFrameOnly",
    "OffByOneStep",
    "OtherScene",
    "WrongPrompt",
]

_FLAT = 2.0  # of 255: a frame whose miniature spreads less shows nothing to find again


def _likeness(reference: Clip, candidate: Clip) -> np.ndarray | None:
    """How much of the reference's frames each of the candidate's shows; float64, no flat ones.

    1 as the reference, 0 nothing of it, less than 0 its negative: the slope of the candidate's
    frame on the reference's frame that is most like it, so that neither speed nor noise counts.
    None where more than half of the reference's frames are flat.
    """
    right, wrong = (miniature(clip.frames).astype(np.float64) for clip in (reference, candidate))
    drawn = right.std(axis=1) >= _FLAT
    if drawn.mean() < 0.5:
        return None
    right, wrong = (one[drawn] - one[drawn].mean(axis=1, keepdims=True) for one in (right, wrong))
    sizes = np.einsum("tn,tn->t", right, right)
    products = wrong @ right.T
    best = np.argmax(products / np.sqrt(sizes), axis=1)
    t = np.arange(len(products))
    best = np.where(products[t, t] >= 0.9 * sizes, t, best)
    return np.asarray(products[t, best] / sizes[best])


@dataclass(frozen=True, slots=True, kw_only=True)
class WrongPrompt:
    """Words of the prompt that the candidate shows, by the analytic judge."""

    name: str = "wrong_prompt"
    meaning: str = "the prompt is followed less or more than by the reference"
    unit: str = "% of words"
    tolerance: float = 10.0
    alarm: float | None = 60.0

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """Percent of colour, shape and motion, the candidate's less the reference's, -100..100.

        None for a prompt that is not in the judge's words.
        """
        wanted = expected(reference.prompt)
        if wanted is None:
            return None
        scores = [
            np.mean(list(agreement(judge(clip.frames), wanted).values()))
            for clip in (candidate, reference)
        ]
        return float(100 * (scores[0] - scores[1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherScene:
    """How much of the reference's picture the candidate shows at all."""

    name: str = "other_scene"
    meaning: str = "another scene than the reference's"
    unit: str = "% of the picture"
    tolerance: float = 20.0
    alarm: float | None = 50.0

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """100 * (slope of its frames on the reference's - 1), at the median over frames.

        -100 shows nothing of it; None where the reference is flat.
        """
        shown = _likeness(reference, candidate)
        return None if shown is None else float(100 * (np.median(shown) - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstFrameOnly:
    """Whether the picture that the clip begins with goes away."""

    name: str = "first_frame_only"
    meaning: str = "the picture fades or falls to pieces after the first frames"
    unit: str = "% of the picture"
    tolerance: float = 15.0
    alarm: float | None = 40.0

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """100 * (slope on the reference's frames, last quarter less first frame).

        None where the reference is flat, or the first frame shows nothing of it already.
        """
        shown = _likeness(reference, candidate)
        if shown is None or shown[0] < 0.5:
            return None
        return float(100 * (np.median(shown[-max(1, len(shown) // 4) :]) - shown[0]))


@dataclass(frozen=True, slots=True, kw_only=True)
class OffByOneStep:
    """Where on the reference's way through the last steps the candidate's latents end."""

    name: str = "off_by_one_step"
    meaning: str = "denoising ends early or late"
    unit: str = "steps"
    tolerance: float = 0.2
    alarm: float | None = 0.5

    def signal(self, reference: Clip, candidate: Clip) -> float | None:
        """Steps ahead of the reference, -1 for a last step left out.

        None without latents, or where they err by more than two such steps in other directions.
        """
        a, b = reference.latents, candidate.latents
        if a is None or b is None or len(a) < 2 or a.shape[1:] != b.shape[1:]:
            return None
        way = (a[-1] - a[-2]).astype(np.float64)
        size = float(np.sum(way**2))
        off = b[-1].astype(np.float64) - a[-1]
        found = float(np.sum(off * way)) / size if size else np.nan
        aside = float(np.sum((off - found * way) ** 2))
        return found if np.isfinite(found) and aside <= 4 * size else None


WRONG_PROMPT = WrongPrompt()
OTHER_SCENE = OtherScene()
FIRST_FRAME_ONLY = FirstFrameOnly()
OFF_BY_ONE_STEP = OffByOneStep()
