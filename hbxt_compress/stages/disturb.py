"""Disturb: the reference again, each weight moved by one ulp; what its clips change by is noise.

Two builds of one model in full precision differ by about that in every layer.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from hbxt_compress.artifact import MANIFEST, Artifact, record_files, write_manifest
from hbxt_compress.errors import ExportError
from hbxt_compress.graph.disturb import by_an_ulp
from hbxt_compress.store import Work

__all__ = ["FACTS", "FOLDER", "VERSION", "disturb"]

VERSION = 1
FACTS = ("numpy",)
FOLDER = "artifact"


def disturb(work: Work, artifact: Artifact, seed: int) -> None:
    """Writes an artifact in `artifact/`.

    Raises:
        ExportError: it keeps no float32 weights outside of its graphs.
    """

    def make(path: Path) -> None:
        ignored = shutil.ignore_patterns(MANIFEST)
        shutil.copytree(artifact.folder, path, ignore=ignored, copy_function=shutil.copyfile)
        if not by_an_ulp(path, seed):
            raise ExportError(f"{artifact.folder}: no float32 weights to disturb")
        write_manifest(path, replace(artifact.manifest, files=record_files(path)))

    if work.ranks.leads:
        work.piece(FOLDER, make)
    work.ranks.barrier()
