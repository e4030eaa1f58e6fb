"""The manifest of an artifact: all that its runtime and its readers may rely on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Self, cast

from hbxt_compress.errors import ArtifactError, UsageError, listing
from hbxt_compress.geometry import Geometry
from hbxt_compress.sampler import SamplerSpec
from hbxt_compress.tile import Tile

__all__ = [
    "REMEDY",
    "SCHEMA",
    "Bucket",
    "FileRecord",
    "LayerFate",
    "Manifest",
    "TargetRecord",
]

SCHEMA = 3
REMEDY = "get the artifact again from where it was made, or make it again with `hbxt quantize`"


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
class Bucket:
    """One clip size that an artifact generates, and the graphs made for it.

    latent_shape: C T H W. transformer: the file in every transformer's folder. first, next: those
    in vae_decoder/ that decode a clip's first latent frame and each later one. tile: what frames
    can be decoded in instead of whole; None: they are no larger.
    """

    geometry: Geometry
    latent_shape: tuple[int, int, int, int]
    transformer: str
    first: str
    next: str
    tile: Tile | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRecord:
    """What is known of one target, such as gfx1201.

    runtime: by whose table the graphs were judged, and nodes: how many met which verdict. settings:
    runtime -> {"environment": variables to set before a graph is compiled, "options": the
    provider's}; `{cache}` in a value stands for a folder that outlives the process.
    """

    runtime: str
    nodes: Mapping[str, int]
    settings: Mapping[str, Mapping[str, Mapping[str, str]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything the runtime and a reader may rely on.

    recipe: name, digest, the resolved document; where one was needed `calibration`: what it showed
    the model, its own trajectories or noised clips, and the clips' sha256; if any were, the steps
    left_out with reasons. source: model reference, family, sha256 by file.
    components: component -> bytes of its weights at full precision (16 bit) and in this artifact.
    buckets: clip sizes, the first is what a user gets who asks for none. text_length: tokens a
    prompt is padded to. latents: per channel mean and std that turn them into what the VAE decodes
    (z * std + mean). lineage: the stages that led here, with versions and digests. session: ONNX
    Runtime session options that the numbers rely on. targets: what it was checked for.
    """

    schema: int
    recipe: Mapping[str, object]
    source: Mapping[str, object]
    components: Mapping[str, Mapping[str, int]]
    sampler: SamplerSpec
    buckets: tuple[Bucket, ...]
    text_length: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    layers: tuple[LayerFate, ...]
    lineage: tuple[Mapping[str, str], ...]
    made_with: Mapping[str, str]
    session: Mapping[str, str]
    targets: Mapping[str, TargetRecord]
    files: tuple[FileRecord, ...]

    @property
    def geometry(self) -> Geometry:
        """The clip size of a user who asks for none."""
        return self.buckets[0].geometry

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """C T H W of its latents."""
        return self.buckets[0].latent_shape

    def bucket(self, size: str | None = None) -> Bucket:
        """The clip size written as `480x832x81`, or the first.

        Raises:
            UsageError: the artifact has no such size; those that it has.
        """
        if size is None:
            return self.buckets[0]
        known = {str(one.geometry): one for one in self.buckets}
        if size not in known:
            raise UsageError(
                f"geometry {size}: not in this artifact, which has {', '.join(known)}; others are "
                "exported by `hbxt quantize --geometry`"
            )
        return known[size]

    def to_json(self) -> dict[str, object]:
        """Plain JSON values, keys in the order above; equal manifests give equal documents."""
        document: dict[str, object] = {
            "sampler": self.sampler.to_json(),
            "buckets": [_plain(bucket) for bucket in self.buckets],
            "targets": {name: _plain(self.targets[name]) for name in sorted(self.targets)},
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
            raise ArtifactError(f"the manifest is not valid:\n{listing(problems)}\n{REMEDY}")
        values = dict(document)
        values["sampler"] = SamplerSpec.from_json(cast(Mapping[str, object], values["sampler"]))
        values["buckets"] = tuple(
            Bucket(
                **{
                    **bucket,
                    "geometry": Geometry(**bucket["geometry"]),
                    "latent_shape": tuple(bucket["latent_shape"]),
                    "tile": None if bucket["tile"] is None else Tile(**bucket["tile"]),
                }
            )
            for bucket in cast(list[dict[str, Any]], values["buckets"])
        )
        values["targets"] = {
            name: TargetRecord(**record)
            for name, record in cast(dict[str, dict[str, Any]], values["targets"]).items()
        }
        values["layers"] = tuple(
            LayerFate(**{**layer, "shape": tuple(layer["shape"])})
            for layer in cast(list[dict[str, Any]], values["layers"])
        )
        values["files"] = tuple(
            FileRecord(**record) for record in cast(list[dict[str, Any]], values["files"])
        )
        for name in ("latents_mean", "latents_std", "lineage"):
            values[name] = tuple(cast(list[Any], values[name]))
        return cls(**values)  # type: ignore[arg-type]


_MOST_TOKENS, _MOST_CHANNELS = 1 << 16, 1 << 10
_MOST_PIXELS = {"height": 1 << 14, "width": 1 << 14, "n_frames": 1 << 16, "fps": 1000}

# Reading the document: every key of every record, with the types JSON may give it.
_NUMBER = (int, float)
_TYPES: Mapping[type, Mapping[str, type | tuple[type, ...]]] = {
    Geometry: {"height": int, "width": int, "n_frames": int, "fps": _NUMBER},
    Bucket: {
        **{"geometry": Mapping, "latent_shape": (list, tuple), "tile": (Mapping, type(None))},
        **dict.fromkeys(("transformer", "first", "next"), str),
    },
    Tile: {
        **dict.fromkeys(("height", "width", "overlap"), int),
        **dict.fromkeys(("first", "next"), str),
    },
    TargetRecord: {"runtime": str, "nodes": Mapping, "settings": Mapping},
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
        **dict.fromkeys(("made_with", "session", "targets"), Mapping),
        **dict.fromkeys(("latents_mean", "latents_std"), (list, tuple)),
        **dict.fromkeys(("buckets", "layers", "lineage", "files"), (list, tuple)),
    },
}


def _manifest_problems(document: object) -> Iterator[str]:
    found = list(_key_problems(document, Manifest, ""))
    yield from found
    if found or not isinstance(document, Mapping):
        return
    if document["schema"] < 1:
        yield f"schema: {document['schema']} is not a schema number"
    for name, kind in (("layers", LayerFate), ("files", FileRecord)):
        for i, one in enumerate(document[name]):
            yield from _key_problems(one, kind, f"{name}[{i}].")
    for name, value in document["session"].items():
        if not isinstance(value, str):
            yield f"session.{name}: {value!r} is not text"
    for name, record in document["targets"].items():
        yield from _target_problems(record, f"targets.{name}.")
    if not document["buckets"]:
        yield "buckets: none, needed is one clip size at least"
    for i, bucket in enumerate(document["buckets"]):
        yield from _bucket_problems(bucket, document, f"buckets[{i}].")
    if not 1 <= document["text_length"] <= _MOST_TOKENS:
        yield f"text_length: {document['text_length']} is not 1..{_MOST_TOKENS}"
    source = document["source"]
    files = source.get("files")
    if not isinstance(source.get("model"), str):
        yield "source.model: not text"
    if not isinstance(files, Mapping) or not all(isinstance(one, str) for one in files.values()):
        yield "source.files: not texts by name"
    if not isinstance(document["recipe"].get("document"), Mapping):
        yield "recipe.document: not an object"
    for i, record in enumerate(document["layers"]):
        shape = record.get("shape") if isinstance(record, Mapping) else None
        if isinstance(shape, list) and not all(type(n) is int for n in shape):
            yield f"layers[{i}].shape: not whole numbers"


def _target_problems(record: object, where: str) -> Iterator[str]:
    found = list(_key_problems(record, TargetRecord, where))
    yield from found
    if found or not isinstance(record, Mapping):
        return
    for runtime, told in record["settings"].items():
        for kind in ("environment", "options"):
            values = told.get(kind) if isinstance(told, Mapping) else None
            texts = values.items() if isinstance(values, Mapping) else [("", None)]
            if not all(isinstance(text, str) for pair in texts for text in pair):
                yield f"{where}settings.{runtime}.{kind}: not texts by name"


def _bucket_problems(bucket: object, document: Mapping[str, Any], where: str) -> Iterator[str]:
    found = list(_key_problems(bucket, Bucket, where))
    if not found and isinstance(bucket, Mapping):
        found = list(_key_problems(bucket["geometry"], Geometry, f"{where}geometry."))
        if bucket["tile"] is not None:
            found += _key_problems(bucket["tile"], Tile, f"{where}tile.")
    yield from found
    if found or not isinstance(bucket, Mapping):
        return
    shape = bucket["latent_shape"]
    if len(shape) != 4 or not all(type(n) is int and n > 0 for n in shape):
        yield f"{where}latent_shape: {list(shape)} is not four positive whole numbers C T H W"
        return
    clip = bucket["geometry"]
    if not all(1 <= clip[k] <= most for k, most in _MOST_PIXELS.items()) or clip["fps"] <= 0:
        limits = ", ".join(f"{key} 1..{most}" for key, most in _MOST_PIXELS.items())
        yield f"{where}geometry: {dict(clip)!r:.120} is not {limits}, and fps above 0"
        return
    factor = clip["height"] // shape[2]
    if (clip["height"], clip["width"]) != (factor * shape[2], factor * shape[3]):
        yield f"{where}latent_shape: {list(shape)} does not divide {clip['height']}x{clip['width']}"
        return
    if shape[1] > clip["n_frames"] or shape[0] > _MOST_CHANNELS:
        yield f"{where}latent_shape: {list(shape)} is more than {clip['n_frames']} frames hold"
    if bucket["tile"] is not None:
        frame = clip["height"], clip["width"]
        yield from (f"{where}tile.{p}" for p in Tile(**bucket["tile"]).problems(frame, factor))
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
    return json.loads(json.dumps(value, sort_keys=True, allow_nan=False, default=_unknown))


def _unknown(value: Any) -> object:
    """What JSON does not know: records and other mappings."""
    return _plain(value) if is_dataclass(value) else dict(value)
