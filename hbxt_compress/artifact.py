"""The artifact folder and its manifest: the only contract between compressor and runtime.

    model_index.json  manifest.json  scheduler/  tokenizer/
    text_encoder/     config.json  model.onnx  model.onnx.data
    transformer/      the same (and transformer_2/ for a two-expert model)
    vae_decoder/      config.json  model_first.onnx  model.onnx  model.onnx.data

vae_decoder/model_first.onnx decodes the first latent frame, model.onnx every later one; they share
one data file and hand the causal convolutions' caches on as inputs and outputs. Graphs for further
clip sizes (transformer/model_480x832x81.onnx, vae_decoder/model_first_480x832.onnx) share it, too,
and so do those for tiles of a frame (model_tile_first_256x256.onnx, model_tile_256x256.onnx).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

from hbxt_compress.errors import ArtifactError, listing
from hbxt_compress.external_data import external_data_problems
from hbxt_compress.file_records import (
    SEAL,
    is_inside,
    is_sealed,
    paths_under,
    record,
    record_problems,
    sealed,
    sha256_of,
)
from hbxt_compress.json_text import parse_json
from hbxt_compress.manifest import REMEDY, FileRecord, Manifest
from hbxt_compress.released import is_note, released_beside

__all__ = ["MANIFEST", "Artifact", "record_files", "write_manifest"]

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A verified artifact on disk."""

    folder: Path
    manifest: Manifest

    @property
    def manifest_sha256(self) -> str:
        """Digest of the manifest's bytes, which name those of every other file."""
        return sha256_of(self.folder / MANIFEST)

    def key(self) -> dict[str, object]:
        """What stands for this artifact in a result's key: its manifest, which hashes its files."""
        return self.manifest.to_json()

    @classmethod
    def open(cls, folder: Path, *, verify: bool = True) -> Self:
        """The artifact in a folder; verify=False leaves out only the hashing of every byte.

        Raises:
            ArtifactError: what is missing, changed, unlisted or outside the folder (all named).
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        problems = [
            *_needed_problems(manifest),
            *record_problems(folder, manifest.files, by="the manifest", verify=verify),
            *_extra_problems(folder, manifest.files),
        ]
        inside = {record.path for record in manifest.files if is_inside(folder, record.path)}
        for path in sorted(inside):
            if path.endswith(".onnx") and (folder / path).is_file():
                parent = PurePosixPath(path).parent
                problems += [f"{parent}/{found}" for found in external_data_problems(folder / path)]
        if problems:
            raise ArtifactError(
                f"the artifact {folder} is not whole:\n{listing(problems)}\n{REMEDY}"
            )
        return cls(folder=folder, manifest=manifest)


def record_files(folder: Path) -> tuple[FileRecord, ...]:
    """Every file under the folder but the manifest, by path, with sha256 and size."""
    own = (MANIFEST, f".{MANIFEST}.partial")
    return tuple(record(folder, path) for path in paths_under(folder) if path not in own)


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Writes manifest.json, whole or not at all, and returns its path. Do it last."""
    path = folder / MANIFEST
    temporary = folder / f".{MANIFEST}.partial"
    temporary.write_text(sealed(manifest.to_json()), encoding="utf-8")
    temporary.replace(path)
    return path


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder}: no such folder; an artifact is the folder `hbxt quantize` made"
        )
    if not path.is_file():
        raise ArtifactError(f"{folder}: not an artifact, it has no {MANIFEST}; {REMEDY}")
    try:
        content = path.read_bytes()
        document = parse_json(content)
    except ValueError as error:
        raise ArtifactError(f"{path}: not JSON ({error}); {REMEDY}") from error
    sealed_too = (
        isinstance(document, dict) and SEAL in document
    )  # those of earlier versions are not
    told = {k: v for k, v in document.items() if k != SEAL} if sealed_too else document
    try:
        manifest = Manifest.from_json(told)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    if sealed_too and not is_sealed(content, document):
        raise ArtifactError(f"{path}: changed: it and its own digest differ; {REMEDY}")
    return manifest


def _needed_problems(manifest: Manifest) -> list[str]:
    experts = ["transformer"] + ["transformer_2"] * (manifest.sampler.boundary is not None)
    needed = ["text_encoder/model.onnx", "tokenizer/tokenizer.json"]
    for bucket in manifest.buckets:
        needed += [f"{expert}/{bucket.transformer}" for expert in experts]
        needed += [f"vae_decoder/{bucket.first}", f"vae_decoder/{bucket.next}"]
        if bucket.tile is not None:
            needed += [f"vae_decoder/{bucket.tile.first}", f"vae_decoder/{bucket.tile.next}"]
    listed = {record.path for record in manifest.files}
    return [
        f"{path}: the runtime needs it, the manifest lacks it"
        for path in dict.fromkeys(needed)
        if path not in listed
    ]


def _extra_problems(folder: Path, files: Sequence[FileRecord]) -> list[str]:
    known = {MANIFEST, f".{MANIFEST}.partial", *(record.path for record in files)}
    beside = released_beside(folder)
    return [
        f"{path}: not in the manifest"
        for path in paths_under(folder)
        if path not in known and path not in beside and not is_note(path, beside)
    ]
