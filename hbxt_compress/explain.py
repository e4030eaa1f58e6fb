"""Explain: how an artifact, or one of its layers, came about, told from its manifest alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, cast

from hbxt_compress.errors import UsageError
from hbxt_compress.layers import matches
from hbxt_compress.manifest import LayerFate, Manifest
from hbxt_compress.render.table import decibel, power_db
from hbxt_compress.strict import did_you_mean

__all__ = ["artifact_story", "difference", "errors_in_words", "layer_story"]

_EXACT = 1e-12  # a relative error below it is rounding of the measurement


def artifact_story(manifest: Manifest) -> dict[str, Any]:
    """Plain JSON values: source, recipe, rules with the layers each decided, stages, versions."""
    document = _document(manifest)
    rules = [{"rule": i, **_rule(rule), "layers": 0, "formats": {}, "bytes_before": 0,
              "bytes_after": 0} for i, rule in enumerate(_rules(document))]  # fmt: skip
    for layer in manifest.layers:
        if (index := _deciding(document, layer.name)) is None:
            continue
        told = rules[index]
        told["layers"] += 1
        told["formats"][layer.format] = told["formats"].get(layer.format, 0) + 1
        told["bytes_before"] += layer.bytes_before
        told["bytes_after"] += layer.bytes_after
    files = cast(Mapping[str, str], manifest.source.get("files", {}))
    return {
        "source": {
            "model": manifest.source.get("model"),
            "family": manifest.source.get("family"),
            "files": dict(files),
        },
        "recipe": {
            "name": manifest.recipe["name"],
            "digest": manifest.recipe["digest"],
            **{
                k: document[k]
                for k in ("summary", "budget", "distill", "decoder")
                if document.get(k)
            },
        },
        "rules": rules,
        "prepare": document.get("prepare", []),
        "round": document.get("round"),
        "refine": document.get("refine", []),
        "calibration": manifest.recipe.get("calibration"),
        "left_out": manifest.recipe.get("left_out", []),
        "stages": [dict(step) for step in manifest.lineage],
        "made_with": dict(manifest.made_with),
        "components": {name: dict(sizes) for name, sizes in manifest.components.items()},
        "targets": {name: dict(one.nodes) for name, one in manifest.targets.items()},
        "files": len(manifest.files),
    }


def layer_story(manifest: Manifest, name: str) -> dict[str, Any]:
    """Plain JSON values: the fate of a layer, the rule that decided, and the layers beside it.

    Raises:
        UsageError: there is no such layer; the nearest name.
    """
    names = [layer.name for layer in manifest.layers]
    if name not in names:
        meant = did_you_mean(name, names)
        raise UsageError(
            f"layer {name!r}: the artifact has none of that name{meant}; it has {len(names)}, "
            "`hbxt explain ARTIFACT --layers` lists them"
        )
    i = names.index(name)
    layer, document = manifest.layers[i], _document(manifest)
    index, n_weights = _deciding(document, name), math.prod(layer.shape)
    own = [one for one in manifest.layers if _component(one) == _component(layer)]
    place = own.index(layer)
    beside = {
        "before": own[place - 1 : place] if place else [],
        "after": own[place + 1 : place + 2],
    }
    return {
        **asdict(layer),
        "shape": list(layer.shape),
        "component": _component(layer),
        "place": [place + 1, len(own)],
        "rule": None if index is None else {"rule": index, **_rule(_rules(document)[index])},
        "n_weights": n_weights,
        "bits": 8 * layer.bytes_after / max(1, n_weights),
        "errors": list(errors_in_words(layer)),
        "beside": {
            side: {"name": one.name, "format": one.format, "error": one.error}
            for side, found in beside.items()
            for one in found
        },
    }


def errors_in_words(layer: LayerFate) -> Iterator[str]:
    """A sentence for each figure that was measured of a layer."""
    if layer.error is None:
        yield "nothing was measured: " + (
            "it was not rounded" if not layer.how else "its algorithms needed no statistics"
        )
        return
    yield f"its output's error is {_power(layer.error)} of its power on the calibration rows"
    if layer.held_out is not None:
        yield f"on prompts that it was not rounded on it is {_power(layer.held_out)}"
        if layer.error > _EXACT and layer.held_out > _EXACT:
            gap = 10 * math.log10(layer.held_out / layer.error)
            if abs(gap) >= 0.05:
                more = "more" if gap > 0 else "less"
                yield f"so it errs {decibel(abs(gap))} {more} on what it has not seen"
    if layer.g1_db is not None:
        yield f"error feedback can gain {decibel(layer.g1_db)} on these inputs (G1)"
    if layer.g2_db is not None:
        yield f"what it leaves on the table is {decibel(layer.g2_db)} (G2)"
    if layer.limit_db is not None:
        yield f"it is {decibel(layer.limit_db)} above the rate-distortion limit at the bits stored"


def difference(one: Manifest, other: Manifest) -> dict[str, Any]:
    """Plain JSON values: files and layers that differ between two artifacts, and why they may.

    reasons: what their manifests say; if they say nothing, but weights differ, that is said.
    """
    first, second = ({f.path: f.sha256 for f in m.files} for m in (one, other))
    layers, others = ({x.name: x for x in m.layers} for m in (one, other))
    both = [name for name in layers if name in others]
    changed = {
        what: [n for n in both if getattr(layers[n], what) != getattr(others[n], what)]
        for what in ("format", "activations", "how", "error", "held_out", "bytes_after")
    }
    differing = sorted(p for p in first.keys() & second.keys() if first[p] != second[p])
    reasons = list(_reasons(one, other))
    weights = [path for path in differing if path.endswith((".onnx", ".onnx.data"))]
    if weights and not reasons:
        reasons.append(
            "source, recipe, versions and stages are the same: sums were made in another order, "
            "by another processor, number of threads, ranks or device"
        )
    return {
        "same": not differing and first.keys() == second.keys() and not reasons,
        "reasons": reasons,
        "files": {
            "same": sum(first[p] == second[p] for p in first.keys() & second.keys()),
            "differing": differing,
            "only_first": sorted(first.keys() - second.keys()),
            "only_second": sorted(second.keys() - first.keys()),
        },
        "layers": {
            "both": len(both),
            "same": sum(layers[name] == others[name] for name in both),
            "only_first": sorted(layers.keys() - others.keys()),
            "only_second": sorted(others.keys() - layers.keys()),
            "differing": {what: names for what, names in changed.items() if names},
        },
    }


def _reasons(one: Manifest, other: Manifest) -> Iterator[str]:
    sources = [cast(Mapping[str, str], m.source.get("files", {})) for m in (one, other)]
    names = sorted(
        n for n in sources[0].keys() | sources[1].keys() if sources[0].get(n) != sources[1].get(n)
    )
    if names:
        yield f"other source files: {_some(names)}"
    documents = [_document(m) for m in (one, other)]
    keys = [
        key
        for key in sorted(documents[0].keys() | documents[1].keys())
        if key not in ("name", "summary") and documents[0].get(key) != documents[1].get(key)
    ]
    if keys:
        yield f"recipes that differ in {', '.join(keys)} ({_recipe(one)}, {_recipe(other)})"
    if one.recipe.get("calibration") != other.recipe.get("calibration"):
        yield "calibration was shown other things"
    versions = sorted(
        f"{name} {one.made_with.get(name, '-')} and {other.made_with.get(name, '-')}"
        for name in one.made_with.keys() | other.made_with.keys()
        if one.made_with.get(name) != other.made_with.get(name)
    )
    if versions:
        yield f"other versions: {_some(versions)}"
    stages = [{s["stage"]: s.get("version") for s in m.lineage} for m in (one, other)]
    moved = [
        f"{name} {stages[0].get(name, '-')} and {stages[1].get(name, '-')}"
        for name in dict.fromkeys((*stages[0], *stages[1]))
        if stages[0].get(name) != stages[1].get(name)
    ]
    if moved:
        yield f"other versions of stages: {_some(moved)}"
    for what in ("sampler", "buckets", "session"):
        if getattr(one, what) != getattr(other, what):
            yield f"another {what.removesuffix('s')}"


def _recipe(manifest: Manifest) -> str:
    return f"{manifest.recipe['name']} {str(manifest.recipe['digest'])[:12]}"


def _some(names: list[str]) -> str:
    more = len(names) - 5
    return ", ".join(names[:5]) + (f" and {more} more" if more > 0 else "")


def _power(ratio: float) -> str:
    return f"{power_db(ratio)} ({ratio:.3%})" if ratio > 0 else "nothing"


def _component(layer: LayerFate) -> str:
    return layer.name.split("/", 1)[0]


def _document(manifest: Manifest) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(json.dumps(manifest.recipe.get("document", {}))))


def _rules(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(document.get("rules", []))


def _rule(rule: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: rule[key]
        for key in ("match", "weights", "activations", "why", "round")
        if rule.get(key)
    }


def _deciding(document: Mapping[str, Any], name: str) -> int | None:
    """The first rule that matches, as when the plan was made; None if the recipe is unknown."""
    return next((i for i, r in enumerate(_rules(document)) if matches(r["match"], name)), None)
