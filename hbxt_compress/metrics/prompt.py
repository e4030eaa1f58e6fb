"""Whether clips show what their prompts ask for, by the analytic judge. No network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from hbxt_compress.clips import Clip
from hbxt_compress.metrics.judge import agreement, expected, judge
from hbxt_compress.metrics.scales import SHARE, Scale
from hbxt_compress.metrics.weights import WeightFiles

__all__ = ["PROMPT_FOLLOWING", "PromptFollowing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFollowing:
    """The share of colour, shape and motion that is as the prompt says, in [0, 1].

    Scores both sides: how far the candidate falls below the reference is what compression did.
    """

    name: str = "prompt_following"
    unit: str = ""
    direction: Literal["lower", "higher"] = "higher"
    family: Literal["fidelity", "distribution", "health"] = "distribution"
    least_n: int = 64
    scale: Scale | None = SHARE
    extractor: str | None = None
    extractor_sha256: str | None = None

    def load(self, files: WeightFiles) -> Self:
        """Itself: there is nothing to load."""
        return self

    def score(self, clip: Clip) -> dict[str, float] | None:
        """prompt_following and its parts (.colour .shape .motion), each in [0, 1].

        None if the prompt is not about one object in the judge's words.
        """
        wanted = expected(clip.prompt)
        if wanted is None:
            return None
        parts = agreement(judge(clip.frames), wanted)
        whole = sum(parts.values()) / len(parts)
        return {self.name: whole} | {f"{self.name}.{part}": value for part, value in parts.items()}


PROMPT_FOLLOWING = PromptFollowing()
