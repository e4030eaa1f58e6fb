"""The noise of a seed, the same on every machine."""

from __future__ import annotations

import numpy as np

from hbxt_compress.errors import UsageError

__all__ = ["noise"]


def noise(seed: int, shape: tuple[int, ...], step: int = 0) -> np.ndarray:
    """Float32 standard normal: the initial latents, or what is fresh at a later step.

    Raises:
        UsageError: a negative seed.
    """
    if seed < 0:
        raise UsageError(f"seed {seed}: must be 0 or more")
    source = np.random.PCG64([seed, step] if step else seed)
    return np.random.Generator(source).standard_normal(shape, dtype=np.float32)
