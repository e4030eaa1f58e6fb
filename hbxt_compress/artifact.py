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

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

from hbxt_compress.errors import ArtifactError, listing
from hbxt_compress.external_data import external_data_problems
from hbxt_compress.manifest import REMEDY, FileRecord, Manifest

__all__ = ["MANIFEST", "Artifact", "record_files", "write_manifest"]

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A verified artifact on disk."""

    folder: Path
    manifest: Manifest

    @property
    def manifest_sha256(self) -> str:
        """Digest of the manifest's bytes, which name those of every other file."""
        return _sha256(self.folder / MANIFEST)

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
            *_record_problems(folder, manifest.files, verify=verify),
            *_extra_problems(folder, manifest.files),
        ]
        inside = {record.path for record in manifest.files if _is_inside(folder, record.path)}
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
    return tuple(
        FileRecord(
            path=path, sha256=_sha256(folder / path), size_bytes=(folder / path).stat().st_size
        )
        for path in _paths(folder)
    )


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Writes manifest.json, whole or not at all, and returns its path. Do it last."""
    path = folder / MANIFEST
    temporary = folder / f".{MANIFEST}.partial"
    text = json.dumps(manifest.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    temporary.write_text(text + "\n", encoding="utf-8")
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
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path}: not JSON ({error}); {REMEDY}") from error
    try:
        return Manifest.from_json(document)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


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


def _record_problems(folder: Path, files: Sequence[FileRecord], *, verify: bool) -> Iterator[str]:
    for record in files:
        path = folder / record.path
        if not _is_inside(folder, record.path):
            yield f"{record.path}: leaves the artifact's folder (a link, '..' or an absolute path)"
        elif not path.is_file():
            yield f"{record.path}: missing"
        elif (size := path.stat().st_size) != record.size_bytes:
            yield f"{record.path}: {size} bytes, the manifest says {record.size_bytes}"
        elif verify and (found := _sha256(path)) != record.sha256:
            yield f"{record.path}: sha256 {found[:12]}, the manifest says {record.sha256[:12]}"


def _extra_problems(folder: Path, files: Sequence[FileRecord]) -> list[str]:
    listed = {record.path for record in files}
    return [f"{path}: not in the manifest" for path in _paths(folder) if path not in listed]


def _is_inside(folder: Path, path: str) -> bool:
    pure = PurePosixPath(path)
    if not path or "\\" in path or pure.is_absolute() or ".." in pure.parts:
        return False
    return (folder / path).resolve().is_relative_to(folder.resolve())


def _paths(folder: Path) -> list[str]:
    """Files and linked folders under the folder, sorted; links are not walked into."""
    found = []
    for where, folders, files in os.walk(folder):
        linked = [name for name in folders if Path(where, name).is_symlink()]
        found += [Path(where, name).relative_to(folder).as_posix() for name in [*files, *linked]]
    return sorted(path for path in found if path not in (MANIFEST, f".{MANIFEST}.partial"))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
