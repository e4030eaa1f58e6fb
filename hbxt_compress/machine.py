"""Machine: where work runs. It never changes what is computed, so it is in no result's key."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Machine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """device: a torch device name. n_threads: threads of ONNX Runtime, None for all cores."""

    device: str = "cpu"
    n_threads: int | None = None
