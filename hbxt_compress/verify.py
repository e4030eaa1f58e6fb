"""Verify: a release in which every byte is as it was released, by whom it says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from hbxt_compress import signing
from hbxt_compress.artifact import MANIFEST, Artifact
from hbxt_compress.errors import ArtifactError, listing
from hbxt_compress.file_records import sha256_of
from hbxt_compress.released import NOTES, RELEASE, SIGNATURE, SIGNATURE_SHA256, Release
from hbxt_compress.signing import Identity

__all__ = ["UNSIGNED", "open_release", "require_artifact"]

UNSIGNED: Final = (SIGNATURE, SIGNATURE_SHA256, NOTES.rstrip("/"))
"""paths that a signature leaves out"""


def open_release(
    folder: Path, *, by: Path | Identity | None = None, digest: str | None = None
) -> Release:
    """The record of a release in which every byte is as it was released.

    by: a public key or an identity that must have signed it. digest: the sha256 that release.json
    must have.

    Raises:
        ArtifactError: what differs (all named), or the signature is none or somebody else's.
    """
    found = Release.read(folder)
    if digest is not None and (own := sha256_of(folder / RELEASE)) != digest.lower():
        raise ArtifactError(f"{folder}: another release: its digest is {own}, not {digest}")
    found.require_whole(folder)
    require_artifact(folder, found)
    if by is not None:
        if not found.signed:
            raise ArtifactError(
                f"{folder}: not signed, so nobody's key or identity can be checked; "
                "ask for a signed release, or compare its digest (--digest)"
            )
        signing.verify(folder, folder / SIGNATURE, by, unsigned=UNSIGNED)
    return found


def require_artifact(folder: Path, made: Release) -> None:
    """The artifact in a release is whole, by its own manifest and by the same digests.

    Raises:
        ArtifactError: what is missing or differs.
    """
    manifest = Artifact.open(folder, verify=False).manifest
    recorded: Mapping[str, object] = {one.path: one for one in made.files}
    differing = [one.path for one in manifest.files if recorded.get(one.path) != one]
    if differing:
        raise ArtifactError(
            f"{folder}: {MANIFEST} and {RELEASE} differ in {len(differing)} files:\n"
            f"{listing(differing)}\nit was not made by `hbxt release`"
        )
