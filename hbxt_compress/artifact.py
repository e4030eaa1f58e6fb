"""The artifact folder and its manifest: the only contract between compressor and runtime.

    model_index.json  manifest.json  scheduler/  tokenizer/
    text_encoder/     config.json  model.onnx  model.onnx.data
    transformer/      the same (and transformer_2/ for a two-expert model)
    vae_decoder/      config.json  model_first.onnx  model.onnx  model.onnx.data

vae_decoder/model_first.onnx decodes the first latent frame, model.onnx every later one; they share
one data file and hand the causal convolutions' caches on as inputs and outputs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self, cast

from hbxt_compress.errors import ArtifactError, listing
from hbxt_compress.external_data import external_data_problems
from hbxt_compress.sampler import SamplerSpec

__all__ = [
    "MANIFEST",
    "SCHEMA",
    "Artifact",
    "FileRecord",
    "Geometry",
    "LayerFate",
    "Manifest",
    "record_files",
    "write_manifest",
]

SCHEMA = 2
MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 20
_REMEDY = "get the artifact again from where it was made, or make it again with `hbxt quantize`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The one clip size an artifact generates: pixels, frames (1 mod 4) and frames a second."""

    height: int
    width: int
    n_frames: int
    fps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One file of the artifact, path relative to its folder with forward slashes."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFate:
    """What became of one weight: its format, why, bytes before and after, and what it cost.

    activations: what the layer's input is stored as, or keep. how: the algorithm and what it chose.
    Errors are of the layer's output, relative, in power; see hbxt_compress.quantized.Loss.
    None where nothing was rounded, or where calibration gathered less than a figure needs.
    """

    name: str
    format: str
    activations: str
    how: str
    reason: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    error: float | None
    held_out: float | None
    g1_db: float | None
    g2_db: float | None
    limit_db: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything the runtime and a reader may rely on.

    recipe: name, digest, the resolved document; where one was needed `calibration`: what it showed
    the model, its own trajectories or noised clips, and the clips' sha256; if any were, the steps
    left_out with reasons. source: model reference, family, sha256 by file.
    components: component -> bytes of its weights at full precision (16 bit) and in this artifact.
    text_length: tokens a prompt is padded to. latent: shape C T H W of the latents, and per channel
    mean and std that turn them into what the VAE decodes (z * std + mean). lineage: the stages that
    led here with their digests. session: ONNX Runtime session options that the numbers rely on.
    """

    schema: int
    recipe: Mapping[str, object]
    source: Mapping[str, object]
    components: Mapping[str, Mapping[str, int]]
    sampler: SamplerSpec
    geometry: Geometry
    text_length: int
    latent_shape: tuple[int, int, int, int]
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    layers: tuple[LayerFate, ...]
    lineage: tuple[Mapping[str, str], ...]
    made_with: Mapping[str, str]
    session: Mapping[str, str]
    files: tuple[FileRecord, ...]

    def to_json(self) -> dict[str, object]:
        """Plain JSON values, keys in the order above; equal manifests give equal documents."""
        document: dict[str, object] = {
            "sampler": self.sampler.to_json(),
            "geometry": _plain(self.geometry),
            "layers": [_plain(layer) for layer in self.layers],
            "files": [_plain(record) for record in self.files],
        }
        for field in fields(self):
            if field.name not in document:
                document[field.name] = _sorted(getattr(self, field.name))
        return {field.name: document[field.name] for field in fields(self)}

    @classmethod
    def from_json(cls, document: Mapping[str, object]) -> Self:
        """The manifest in a document.

        Raises:
            ArtifactError: written by a newer version; unknown, missing, mistyped keys (all named).
        """
        schema = document.get("schema") if isinstance(document, Mapping) else None
        if isinstance(schema, int) and schema > SCHEMA:
            raise ArtifactError(
                f"the manifest has schema {schema}, this hbxt_compress reads up to {SCHEMA}: it "
                "was written by a newer hbxt_compress; upgrade (pip install -U hbxt_compress)"
            )
        if isinstance(schema, int) and schema is not True and 1 <= schema < SCHEMA:
            raise ArtifactError(
                f"the manifest has schema {schema}, this hbxt_compress reads {SCHEMA}: make the "
                "artifact again with `hbxt quantize`"
            )
        problems = list(_manifest_problems(document))
        if problems:
            raise ArtifactError(f"the manifest is not valid:\n{listing(problems)}\n{_REMEDY}")
        values = dict(document)
        values["sampler"] = SamplerSpec.from_json(cast(Mapping[str, object], values["sampler"]))
        values["geometry"] = Geometry(**cast(dict[str, Any], values["geometry"]))
        values["layers"] = tuple(
            LayerFate(**{**layer, "shape": tuple(layer["shape"])})
            for layer in cast(list[dict[str, Any]], values["layers"])
        )
        values["files"] = tuple(
            FileRecord(**record) for record in cast(list[dict[str, Any]], values["files"])
        )
        for name in ("latent_shape", "latents_mean", "latents_std", "lineage"):
            values[name] = tuple(cast(list[Any], values[name]))
        return cls(**values)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A verified artifact on disk."""

    folder: Path
    manifest: Manifest

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
                f"the artifact {folder} is not whole:\n{listing(problems)}\n{_REMEDY}"
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
        raise ArtifactError(f"{folder}: not an artifact, it has no {MANIFEST}; {_REMEDY}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path}: not JSON ({error}); {_REMEDY}") from error
    try:
        return Manifest.from_json(document)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def _needed_problems(manifest: Manifest) -> list[str]:
    components = ["text_encoder", "transformer", "vae_decoder"]
    if manifest.sampler.boundary is not None:
        components.append("transformer_2")
    needed = [f"{component}/model.onnx" for component in components]
    needed += ["vae_decoder/model_first.onnx", "tokenizer/tokenizer.json"]
    listed = {record.path for record in manifest.files}
    return [
        f"{path}: the runtime needs it, the manifest lacks it"
        for path in needed
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


# Reading the document: every key of every record, with the types JSON may give it.
_NUMBER = (int, float)
_TYPES: Mapping[type, Mapping[str, type | tuple[type, ...]]] = {
    Geometry: {"height": int, "width": int, "n_frames": int, "fps": _NUMBER},
    FileRecord: {"path": str, "sha256": str, "size_bytes": int},
    LayerFate: {
        **dict.fromkeys(("name", "format", "activations", "how", "reason"), str),
        **{"shape": (list, tuple), "bytes_before": int, "bytes_after": int},
        **dict.fromkeys(
            ("error", "held_out", "g1_db", "g2_db", "limit_db"), (*_NUMBER, type(None))
        ),
    },
    Manifest: {
        **{"schema": int, "text_length": int},
        **dict.fromkeys(("recipe", "source", "components", "sampler"), Mapping),
        **dict.fromkeys(("geometry", "made_with", "session"), Mapping),
        **dict.fromkeys(("latent_shape", "latents_mean", "latents_std"), (list, tuple)),
        **dict.fromkeys(("layers", "lineage", "files"), (list, tuple)),
    },
}


def _manifest_problems(document: object) -> Iterator[str]:
    found = list(_key_problems(document, Manifest, ""))
    yield from found
    if found or not isinstance(document, Mapping):
        return
    if document["schema"] < 1:
        yield f"schema: {document['schema']} is not a schema number"
    yield from _key_problems(document["geometry"], Geometry, "geometry.")
    for name, kind in (("layers", LayerFate), ("files", FileRecord)):
        for i, one in enumerate(document[name]):
            yield from _key_problems(one, kind, f"{name}[{i}].")
    for name, value in document["session"].items():
        if not isinstance(value, str):
            yield f"session.{name}: {value!r} is not text"
    shape = document["latent_shape"]
    if len(shape) != 4 or not all(type(n) is int and n > 0 for n in shape):
        yield f"latent_shape: {list(shape)} is not four positive whole numbers C T H W"
        return
    for name in ("latents_mean", "latents_std"):
        numbers = document[name]
        if len(numbers) != shape[0] or not all(type(x) in _NUMBER for x in numbers):
            yield f"{name}: {len(numbers)} entries, needed are {shape[0]} numbers, one a channel"


def _key_problems(document: object, kind: type, where: str) -> Iterator[str]:
    if not isinstance(document, Mapping):
        yield f"{where or 'document'}: {type(document).__name__}, not an object"
        return
    types = _TYPES[kind]
    yield from (f"{where}{key}: unknown key" for key in document if key not in types)
    for key, wanted in types.items():
        if key not in document:
            yield f"{where}{key}: missing"
        elif not isinstance(document[key], wanted) or isinstance(document[key], bool):
            yield f"{where}{key}: {type(document[key]).__name__} is of the wrong type"


def _plain(record: object) -> dict[str, object]:
    assert is_dataclass(record)
    return {field.name: _sorted(getattr(record, field.name)) for field in fields(record)}


def _sorted(value: object) -> object:
    """The value as JSON reads it back, mappings in key order."""
    return json.loads(json.dumps(value, sort_keys=True, allow_nan=False, default=dict))
