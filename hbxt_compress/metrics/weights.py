"""Where metrics find network weights that the wheel does not carry, and how they are trusted.

A weight file is executable or picklable: its sha256 is checked before it is opened. A file that is
missing or unknown makes a metric Unavailable with a one-line remedy; no metric ever falls back to
random weights.
"""

from __future__ import annotations

import hashlib
import os
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
    i3d_sha256 what it must hash to (None: the published file's).
    """

    lpips_trunk: Path | None = None
    i3d: Path | None = None
    i3d_sha256: str | None = None

    @classmethod
    def from_environment(cls) -> Self:
        """The files named by HBXT_LPIPS_TRUNK, HBXT_I3D and HBXT_I3D_SHA256."""
        trunk, i3d = os.environ.get("HBXT_LPIPS_TRUNK"), os.environ.get("HBXT_I3D")
        return cls(
            lpips_trunk=Path(trunk) if trunk else None,
            i3d=Path(i3d) if i3d else None,
            i3d_sha256=os.environ.get("HBXT_I3D_SHA256") or None,
        )


def sha256_of(path: Path) -> str:
    """The file's sha256, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
