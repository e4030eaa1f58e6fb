"""A training loop that can be killed at any step and goes on from its last checkpoint.

Everything random in step k is drawn from a generator seeded with k, so a resumed run sees the same
batches and noise as an undisturbed one.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

__all__ = ["compiled", "cosine", "run", "trapezoid"]

log = logging.getLogger(__name__)
_SAVE_EVERY_S = 120.0
_REPORT_EVERY_S = 20.0


def cosine(
    step: int, n_steps: int, peak: float, *, warmup: int = 100, floor: float = 0.02
) -> float:
    """Learning rate of a step: linear warm-up to `peak`, then a half cosine to `floor * peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, n_steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def trapezoid(
    step: int, n_steps: int, peak: float, *, warmup: int = 100, decay: int = 1000
) -> float:
    """Learning rate of a step: linear warm-up, constant, linear to zero over the last `decay`.

    Until the decay it does not depend on n_steps, so a longer training extends a shorter one.
    """
    return peak * min(1.0, (step + 1) / warmup, (n_steps - step) / decay)


def compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function through torch.compile where a C++ compiler is at hand, else itself."""
    if shutil.which("g++") is None and not torch.cuda.is_available():
        log.warning("no g++ found: training runs uncompiled, about 1.5 times slower")
        return function
    return torch.compile(function)


def run(
    name: str,
    folder: Path,
    n_steps: int,
    parts: Mapping[str, torch.nn.Module | torch.optim.Optimizer],
    step: Callable[[int], float],
) -> None:
    """Runs step(0) .. step(n_steps - 1) on `parts`; returns when all steps are done, now or before.

    `step` must be a function of its index and of `parts` alone. The checkpoint is
    `<folder>/<name>.pt` (tensors only, written atomically).
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pt"
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        first = saved["step"]
        for key, part in parts.items():
            part.load_state_dict(saved[key])
        log.info("%s: resumed at step %d of %d", name, first, n_steps)

    def save(done: int) -> None:
        state = {key: part.state_dict() for key, part in parts.items()}
        torch.save({"step": done, **state}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    began = saved_at = told_at = time.monotonic()
    mean = 0.0
    for k in range(first, n_steps):
        loss = step(k)
        if not math.isfinite(loss):
            raise FloatingPointError(f"{name}: loss is {loss} at step {k}; last checkpoint: {path}")
        mean = loss if k == first else 0.98 * mean + 0.02 * loss
        now = time.monotonic()
        if now - saved_at > _SAVE_EVERY_S or k + 1 == n_steps:
            save(k + 1)
            saved_at = now
        if now - told_at > _REPORT_EVERY_S or k + 1 == n_steps:
            left_s = (now - began) / (k + 1 - first) * (n_steps - k - 1)
            log.info(
                "%s: step %d/%d, loss %.5f, %.0f min left", name, k + 1, n_steps, mean, left_s / 60
            )
            told_at = now
