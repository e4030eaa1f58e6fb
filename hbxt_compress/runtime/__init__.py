"""The other house: generates clips from an artifact on the target machine, without torch."""

from __future__ import annotations

from hbxt_compress.runtime.generate import Runtime

__all__ = ["Runtime"]
