"""Where metrics find network weights that the wheel does not carry, and how they are trusted.

A weight file is executable or picklable: its sha256 is checked before it is opened. A file that is
missing or unknown makes a metric Unavailable with a one-line remedy; no metric ever falls back to
random weights.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from hbxt_compress.errors import HbxtError

__all__ = ["Unavailable", "WeightFiles", "sha256_of"]


class Unavailable(HbxtError):
    """A metric cannot be computed here; the message is one line and ends with the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """Files a user gives to metrics; None where the default place is searched.

    lpips_trunk: torchvision's classifier file or its features alone. i3d: the TorchScript of FVD,
    i3d_sha256 what it must hash to (None: the published file's). vbench: a Python that has VBench,
    vbench_cache the folder of its weights.
    """

    lpips_trunk: Path | None = None
    i3d: Path | None = None
    i3d_sha256: str | None = None
    vbench: Path | None = None
    vbench_cache: Path | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """The files named by HBXT_LPIPS_TRUNK, HBXT_I3D, HBXT_VBENCH and VBENCH_CACHE_DIR.

        HBXT_I3D_SHA256 is what the second must hash to.
        """

        def named(variable: str) -> Path | None:
            value = environment.get(variable)
            return Path(value) if value else None

        return cls(
            lpips_trunk=named("HBXT_LPIPS_TRUNK"),
            i3d=named("HBXT_I3D"),
            i3d_sha256=environment.get("HBXT_I3D_SHA256") or None,
            vbench=named("HBXT_VBENCH"),
            vbench_cache=named("VBENCH_CACHE_DIR"),
        )


def sha256_of(path: Path) -> str:
    """The file's sha256, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
