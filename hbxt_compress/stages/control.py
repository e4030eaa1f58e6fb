"""Control: what is measured beside a candidate, so that a reader knows what its figures mean.

Full precision against itself, disturbed by rounding alone, is noise: nobody can be asked for less.
With another seed it is what unrelated clips of one prompt have. Recipes are known damage.
"""

from __future__ import annotations

import os

from hbxt_compress.runtime.session import Provider, installed_providers

__all__ = ["DISTURBANCES", "kind_of", "other_provider", "other_threads"]

DISTURBANCES = {
    "ulp": ("noise", "full precision again, every weight moved by one float32 ulp"),
    "threads": ("noise", "full precision again, computed by another number of threads"),
    "provider": ("noise", "full precision again, computed by another execution provider"),
    "seed": ("seed", "full precision again, from other noise: what unrelated clips have"),
}


def kind_of(name: str, summary: str = "") -> tuple[str, str]:
    """(kind, text) of a control; of a recipe its summary."""
    return DISTURBANCES.get(name, ("damage", summary))


def other_threads(n_threads: int | None) -> int:
    """A number of threads that is not the one that clips were made with."""
    used = n_threads or os.cpu_count() or 1
    return 1 if used > 1 else 2


def other_provider() -> Provider | None:
    """A provider that is installed beside the CPU's; None if there is none."""
    others: list[Provider] = [
        name for name in ("migraphx", "rocm", "amdgpu") if name in installed_providers()
    ]
    return others[0] if others else None
