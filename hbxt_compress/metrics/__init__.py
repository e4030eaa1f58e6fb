"""Metrics: pairs of clips, single clips against their prompts, or a set of clips against a set.

To add one: write a file here and a line in METRICS. A metric in the table is cheap; `load` gives
the one to use, and raises Unavailable with a one-line remedy where a network it needs is missing.
Families are never mixed into one score: fidelity is paired, distribution looks at sets or
prompts, health is the two-sided difference of a property.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, runtime_checkable

import numpy as np

from hbxt_compress.clips import Clip
from hbxt_compress.metrics.cvvdp import CVVDP
from hbxt_compress.metrics.latents import LATENT_ERROR
from hbxt_compress.metrics.pixels import FLICKER, MOTION_RATIO, PSNR, SSIM, TEMPORAL_ERROR
from hbxt_compress.metrics.prompt import PROMPT_FOLLOWING
from hbxt_compress.metrics.scales import POWER, Scale
from hbxt_compress.metrics.sets import FD_CONTENT, FD_TEMPORAL, FVD_I3D, KID_CONTENT, KID_TEMPORAL
from hbxt_compress.metrics.vbench import VBENCH
from hbxt_compress.metrics.vmaf import CAMBI, VMAF
from hbxt_compress.metrics.weights import Unavailable, WeightFiles

__all__ = [
    "METRICS",
    "ClipMetric",
    "Family",
    "Lpips",
    "Metric",
    "NoReferenceMetric",
    "PairMetric",
    "SetMetric",
    "Unavailable",
    "WeightFiles",
]

Family = Literal["fidelity", "distribution", "health"]


class Metric(Protocol):
    """What every metric states; from least_n clips on its value decides alone."""

    @property
    def name(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def direction(self) -> Literal["lower", "higher"]: ...
    @property
    def family(self) -> Family: ...
    @property
    def least_n(self) -> int: ...
    @property
    def scale(self) -> Scale | None:
        """How its values of single clips compare; None: they do not."""

    @property
    def extractor(self) -> str | None: ...
    @property
    def extractor_sha256(self) -> str | None: ...
    def load(self, files: WeightFiles) -> Metric:
        """The metric ready for use, its extractor and sha256 stated; may raise Unavailable."""


@runtime_checkable
class PairMetric(Metric, Protocol):
    """Compares a candidate clip with the reference clip of the same prompt, seed and shape."""

    @property
    def compare(self) -> _Compare: ...


@runtime_checkable
class ClipMetric(Metric, Protocol):
    """Scores one clip by its prompt; measured on both sides."""

    def score(self, clip: Clip) -> dict[str, float] | None:
        """Scores by name, the metric's own first; None where the prompt cannot be judged."""


@runtime_checkable
class NoReferenceMetric(Metric, Protocol):
    """Scores clips by themselves; what counts is how far both sides' scores are apart."""

    def scores(self, clips: Sequence[Clip]) -> list[float]:
        """One score a clip, in order."""


@runtime_checkable
class SetMetric(Metric, Protocol):
    """A distance between two sets of clips, through features of each clip."""

    @property
    def eye(self) -> str:
        """Which features; metrics of one extractor and one eye share them."""

    def features(self, clips: Sequence[Clip]) -> np.ndarray:
        """One row per clip, float64 (N, D)."""

    @property
    def distance(self) -> _Distance: ...
    def measure(self, reference: Sequence[Clip], candidate: Sequence[Clip]) -> float:
        """The distance between the features of both sides."""


class _Compare(Protocol):
    def __call__(self, reference: Clip, candidate: Clip, /) -> float: ...


class _Distance(Protocol):
    def __call__(self, reference: np.ndarray, candidate: np.ndarray, /) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Lpips:
    """LPIPS before its trunk is found; only load() imports torch and the lpips package."""

    net: Literal["squeeze", "alex", "vgg"]
    unit: str = ""
    direction: Literal["lower", "higher"] = "lower"
    family: Family = "fidelity"
    least_n: int = 8
    scale: Scale | None = POWER
    extractor: str | None = None
    extractor_sha256: str | None = None

    @property
    def name(self) -> str:
        return f"lpips_{self.net}"

    def load(self, files: WeightFiles) -> PairMetric:
        """LPIPS with its trunk checked and loaded; Unavailable if that cannot be had."""
        from hbxt_compress.metrics.lpips import open_lpips

        return open_lpips(self.net, files)


METRICS: Final[Mapping[str, Metric]] = {
    "psnr": PSNR,
    "ssim": SSIM,
    "lpips_squeeze": Lpips(net="squeeze"),
    "lpips_alex": Lpips(net="alex"),
    "lpips_vgg": Lpips(net="vgg"),
    "temporal_error": TEMPORAL_ERROR,
    "latent_error": LATENT_ERROR,
    "prompt_following": PROMPT_FOLLOWING,
    "fd_content": FD_CONTENT,
    "fd_temporal": FD_TEMPORAL,
    "kid_content": KID_CONTENT,
    "kid_temporal": KID_TEMPORAL,
    "fvd_i3d": FVD_I3D,
    "motion_ratio": MOTION_RATIO,
    "flicker": FLICKER,
    "vmaf": VMAF,
    "cambi": CAMBI,
    "cvvdp": CVVDP,
    **{metric.name: metric for metric in VBENCH},
}
