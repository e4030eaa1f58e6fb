"""How far the candidate's latents are from the reference's, step by step of the denoising.

The metric's value is the last step's; the whole curve shows where a model goes wrong.
"""

from __future__ import annotations

import numpy as np

from hbxt_compress.clips import Clip
from hbxt_compress.metrics.pixels import PlainMetric
from hbxt_compress.metrics.scales import AMPLITUDE
from hbxt_compress.metrics.weights import Unavailable

__all__ = ["LATENT_ERROR", "latent_curve"]


def latent_curve(reference: Clip, candidate: Clip) -> np.ndarray:
    """Relative L2 error of the latents after each denoising step, float64 (S,).

    Raises Unavailable if a clip was generated without keeping its latents.
    """
    a, b = reference.latents, candidate.latents
    if a is None or b is None:
        raise Unavailable("clips carry no latents: sample both sides again with latents kept")
    if a.shape != b.shape:
        raise Unavailable(f"latents have shapes {a.shape} and {b.shape}: sample both sides alike")
    axes = tuple(range(1, a.ndim))
    size = np.sqrt(np.sum(a.astype(np.float64) ** 2, axis=axes))
    error = np.sqrt(np.sum((b.astype(np.float64) - a) ** 2, axis=axes))
    return np.asarray(error / np.maximum(size, np.finfo(np.float64).tiny))


LATENT_ERROR = PlainMetric(
    name="latent_error",
    unit="",
    direction="lower",
    compare=lambda reference, candidate: float(latent_curve(reference, candidate)[-1]),
    scale=AMPLITUDE,
)
