"""Export: the ONNX artifact of a model, component by component, and its manifest.

A component is written whole or not at all; a killed run goes on with the first that is not there,
so it loses one component at most: for the transformer of a 5B model 2.6 GB, written in seconds. A
graph is traced without weights, which are then read, packed and written one by one.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from hbxt_compress import artifact as contract
from hbxt_compress.artifact import record_files, write_manifest
from hbxt_compress.errors import ExportError, SourceError, listing
from hbxt_compress.formats import FORMATS
from hbxt_compress.geometry import Geometry
from hbxt_compress.graph.export import export_component
from hbxt_compress.graph.external import component_bytes
from hbxt_compress.graph.parity import SESSION_OPTIONS, require_parity
from hbxt_compress.graph.records import target_records
from hbxt_compress.journal import file_sha256
from hbxt_compress.licences import FOLDER
from hbxt_compress.manifest import SCHEMA, FileRecord, LayerFate, Manifest
from hbxt_compress.models import Family, family_of
from hbxt_compress.plan import LayerPlan, Plan
from hbxt_compress.quantized import Loss, QuantizedModel
from hbxt_compress.recipe import Recipe
from hbxt_compress.source import Source
from hbxt_compress.stages.ranges import read_ranges
from hbxt_compress.store import Entry, Work

__all__ = ["FACTS", "VERSION", "export", "write_component"]

VERSION = 6
FACTS = ("torch", "onnx", "onnxscript", "onnx_ir", "diffusers", "transformers")
log = logging.getLogger(__name__)
_KEPT_IN_INDEX = ("boundary_ratio", "expand_timesteps", "scheduler", "tokenizer")
_PARITY = 1e-3  # of the largest output: float32 in another order of summation
_LARGEST_FOR_PARITY = 1_000_000_000  # bytes of float32 weights
_NO_RANGES: Mapping[str, Entry] = MappingProxyType({})
_NO_LICENCES: Mapping[str, str] = MappingProxyType({})
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def export(
    work: Work, source: Source, model: str, plan: Plan, rounded: Entry | None, recipe: Recipe,
    clips: Sequence[Geometry] = (), ranges: Mapping[str, Entry] = _NO_RANGES,
    licences: Mapping[str, str] = _NO_LICENCES,
) -> None:  # fmt: skip
    """Writes an artifact folder as hbxt_compress.artifact describes it. Ranks share components.

    model: what the user called the source; the manifest says so to `evaluate`. clips: sizes that it
    is to generate; none: the model's own. ranges: by component what stages/ranges.py found, where
    float16 needs to know. licences: sha256 of the source's licence files by name; they come along.

    Raises:
        ExportError: a graph breaks a rule of the export, or will not do on one of its targets.
        SourceError: a licence file changed meanwhile.
    """
    family = family_of(source)
    quantized = QuantizedModel.open(rounded.folder) if rounded else QuantizedModel(weights={})
    planned = plan.components()
    work.expect(len(planned))
    for i, component in enumerate(planned):
        if not work.ranks.owns(i):
            continue
        log.info("export: %s", component, extra={"progress": (i, len(planned), "export")})
        make = partial(
            write_component, family, source, component, plan, quantized, clips=clips, ranges=ranges
        )
        work.piece(component, make, needs_bytes=planned[component]["after"])
    work.ranks.barrier()
    if not work.ranks.leads:
        return
    _copy_texts(source, work.folder, tuple(planned))
    _copy_licences(source, work.folder / FOLDER, licences)
    sizes = {
        c: {"before": planned[c]["before"], "after": component_bytes(work.folder / c)}
        for c in planned
    }
    write_manifest(
        work.folder,
        _manifest(work, family, source, model, plan, quantized, recipe, rounded, sizes, clips),
    )
    log.info("export: done", extra={"progress": (len(planned), len(planned), "export")})


def write_component(
    family: Family,
    source: Source,
    component: str,
    plan: Plan,
    quantized: QuantizedModel,
    folder: Path,
    *,
    clips: Sequence[Geometry] = (),
    ranges: Mapping[str, Entry] = _NO_RANGES,
) -> None:
    """Writes one component's graphs and weights into its folder.

    Raises:
        ExportError: parameters that were tuned are not in the model, or a graph breaks a rule.
    """
    stored, tuned = family.weights(source, component), _tuned(component, quantized)
    if lost := sorted(tuned.keys() - set(stored.names)):
        raise ExportError(
            f"{component}: {len(lost)} tuned parameters are not in the model:\n{listing(lost)}"
        )
    graphs = family.graphs(source, component, family.skeleton(source, component), clips)
    weights = {
        layer.spec.name: (
            FORMATS[layer.weights],
            quantized.weights[layer.spec.name].payload if layer.quantized else {},
        )
        for layer in plan.layers
        if layer.spec.component == component
    }
    activations = {
        layer.spec.name: layer.activations for layer in plan.layers if layer.activations != "keep"
    }
    export_component(
        folder,
        graphs,
        weights,
        precision=plan.precision,
        half=component in plan.half,
        ranges=read_ranges(ranges[component].folder) if component in ranges else None,
        activations=activations,
        read=lambda name: tuned[name] if name in tuned else stored.tensor(name),
        read_rows=stored.rows,
    )
    if plan.precision == 32 and component not in plan.half:
        _require_parity(folder, family, source, component, tuned, clips)


def _require_parity(
    folder: Path, family: Family, source: Source, component: str, tuned: Mapping[str, Tensor],
    clips: Sequence[Geometry],
) -> None:  # fmt: skip
    """Runs the component in torch and compares; one too large for that is said to be unchecked."""
    if (size := 4 * family.parameters(source)[component]) > _LARGEST_FOR_PARITY:
        log.warning(
            "export: %s: not compared with torch, which would need %.1f GB for its weights",
            component,
            size / 1e9,
        )
        return
    module = family.load(source, component)
    for name, value in tuned.items():
        module.get_parameter(name).data = value
    require_parity(folder, family.graphs(source, component, module, clips), tolerance=_PARITY)


def _how(layer: LayerPlan, quantized: QuantizedModel) -> str:
    """The algorithm with what it chose: `gptq (damping 0.01, correct 1)`."""
    if layer.how is None:
        return ""
    name = layer.how.model_dump(mode="json").get("use") or type(layer.how).__name__.lower()
    notes = quantized.weights[layer.spec.name].notes
    told = ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in notes.items()
    )
    return f"{name} ({told})" if told else str(name)


def _corrections(rounded: Entry | None) -> tuple[tuple[float, float, float], ...]:
    """What a solver refit found for the experts, by rising timestep; () without one."""
    files = sorted(rounded.folder.glob("*.sampler.json")) if rounded else []
    found = [one for f in files for one in json.loads(f.read_text(encoding="utf-8"))["corrections"]]
    return tuple(sorted((float(t), float(a), float(b)) for t, a, b in found))


def _loss(layer: LayerPlan, quantized: QuantizedModel) -> dict[str, float | None]:
    if layer.quantized:
        return asdict(quantized.weights[layer.spec.name].loss)
    return {field.name: None for field in fields(Loss)}


def _tuned(component: str, quantized: QuantizedModel) -> dict[str, Tensor]:
    """Biases that belong to rounded weights, and other parameters that were tuned, float32."""
    changed: dict[str, Tensor] = dict(quantized.floats)
    for name, weight in quantized.weights.items():
        if weight.bias_O is not None:
            changed[f"{name}.bias"] = weight.bias_O
    prefix = f"{component}/"
    return {
        path.removeprefix(prefix): value.float()
        for path, value in changed.items()
        if path.startswith(prefix)
    }


def _copy_texts(source: Source, folder: Path, components: tuple[str, ...]) -> None:
    """tokenizer/, scheduler/ and model_index.json, in the layout of diffusers and Optimum."""
    (folder / "tokenizer").mkdir(exist_ok=True)
    for name in _TOKENIZER:
        if f"tokenizer/{name}" in source.files:
            shutil.copyfile(source.folder / "tokenizer" / name, folder / "tokenizer" / name)
    if not (folder / "tokenizer" / "tokenizer.json").exists():
        raise ExportError(
            f"{source.folder / 'tokenizer'}: no tokenizer.json; save it once with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    kept = {
        key: value
        for key, value in source.config("model_index.json").items()
        if key in _KEPT_IN_INDEX
    }
    document = {
        "_class_name": "ORTWanPipeline",
        **kept,
        **{component: ["onnxruntime", "InferenceSession"] for component in components},
    }
    _write_json(folder / "model_index.json", document)
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        source.config("scheduler/scheduler_config.json"),
    )


def _copy_licences(source: Source, folder: Path, licences: Mapping[str, str]) -> None:
    for name, sha256 in licences.items():
        folder.mkdir(exist_ok=True)
        shutil.copyfile(source.licences[name], folder / name)
        if file_sha256(folder / name) != sha256:
            raise SourceError(f"{source.licences[name]}: changed meanwhile; run the command again")


def _records(work: Work) -> tuple[FileRecord, ...]:
    """What the manifest says of every file; those of a component were hashed when written."""
    if work.journal is None:
        return record_files(work.folder)
    found = sorted(work.journal.files().items())
    return tuple(
        FileRecord(path=path, sha256=note.sha256, size_bytes=note.size)
        for path, note in found
        if path != contract.MANIFEST
    )


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _recipe_record(recipe: Recipe, plan: Plan) -> dict[str, object]:
    """The recipe with what it came to: what calibration showed, and what was left out."""
    return {
        "name": recipe.name,
        "digest": recipe.digest,
        "document": recipe.model_dump(mode="json"),
        **({} if plan.shown is None else {"calibration": plan.shown.to_json()}),
        **({"left_out": plan.to_json()["left_out"]} if plan.left_out else {}),
    }


def _lineage(rounded: Entry | None) -> tuple[dict[str, str], ...]:
    """The stages that led here, first to last; an export's own files stand in the manifest."""
    steps = rounded.steps() if rounded else ()
    told = [{"stage": s.stage, "version": str(s.version), "digest": s.digest} for s in steps]
    return (*told, {"stage": "export", "version": str(VERSION)})


def _manifest(
    work: Work, family: Family, source: Source, model: str, plan: Plan,
    quantized: QuantizedModel, recipe: Recipe, rounded: Entry | None,
    sizes: Mapping[str, Mapping[str, int]], clips: Sequence[Geometry],
) -> Manifest:  # fmt: skip
    normal = family.latent_statistics(source)
    return Manifest(
        schema=SCHEMA,
        recipe=_recipe_record(recipe, plan),
        source={"model": model, "family": family.name, "files": dict(source.files)},
        components=sizes,
        sampler=replace(family.sampler(source), corrections=_corrections(rounded)),
        buckets=family.buckets(source, clips),
        text_length=family.text_length(source),
        latents_mean=normal[0],
        latents_std=normal[1],
        layers=tuple(
            LayerFate(
                name=layer.spec.name,
                format=layer.weights,
                activations=layer.activations,
                how=_how(layer, quantized),
                reason=layer.reason,
                shape=layer.spec.shape,
                bytes_before=layer.bytes_before,
                bytes_after=layer.bytes_after,
                **_loss(layer, quantized),
            )
            for layer in plan.layers
        ),
        lineage=_lineage(rounded),
        made_with={name: version(name) for name in ("hbxt-compress", *FACTS)},
        session=SESSION_OPTIONS,
        targets=target_records(work.folder, recipe.export.targets),
        files=_records(work),
    )
