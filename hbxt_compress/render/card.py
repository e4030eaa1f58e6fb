"""README.md of a release: a model card for the Hub that repeats what was measured, no more."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from hbxt_compress import yaml_text
from hbxt_compress.manifest import LayerFate, Manifest
from hbxt_compress.render.markdown import controls, escaped, markdown_table
from hbxt_compress.render.table import (
    BYTES_HEAD,
    METRICS_HEAD,
    byte_rows,
    calibration,
    metric_rows,
    notes,
    power_db,
)
from hbxt_compress.report import Measurement, QualityReport

__all__ = ["Terms", "card"]

_HUB_ID: Final = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@[\w.-]+")
_LEAST_TOLD: Final = 3  # of the layers that lost most
_NOT_KEPT: Final = {
    "fail": "Its promise is broken.",
    "undecided": "Whether its promise is kept is undecided.",
    "none": "Nothing that it promises was measured.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Under what licence a release is.

    name: the Hub's, or a name of its own. known: whether the Hub has it in its list. files: in
    the release. by_hand: the source had no licence file, whoever released it gave the name.
    """

    name: str
    known: bool
    files: Sequence[str]
    by_hand: bool


def card(
    manifest: Manifest, report: QualityReport, terms: Terms, *, base: str | None = None
) -> str:
    """The card as Markdown with YAML front matter.

    base: the Hub id of the model that it was made from, if the manifest does not have one.
    """
    parts = [
        f"---\n{yaml_text.dump(_front(manifest, report, terms, base))}---",
        *_what(manifest, report, base),
        *_use(manifest),
        *_quality(report),
        *_sizes(manifest, report),
        *_how(manifest, report),
        *_limits(manifest, report),
        *_licence(terms),
    ]
    return "\n\n".join(parts) + "\n"


def _front(
    manifest: Manifest, report: QualityReport, terms: Terms, base: str | None
) -> dict[str, object]:
    name = str(manifest.recipe["name"])
    base = base or _hub_id(manifest)
    licence: dict[str, object] = {"license": terms.name}
    if not terms.known:
        slug = re.sub(r"[^a-z0-9.+-]+", "-", terms.name.lower()).strip("-")
        licence = {"license": "other", "license_name": slug or "other"}
        if terms.files:
            licence["license_link"] = terms.files[0]
    return {
        **licence,
        "library_name": "onnx",
        "pipeline_tag": "text-to-video",
        **({"base_model": base, "base_model_relation": "quantized"} if base else {}),
        "tags": ["hbxt_compress", "onnx", "quantized", "text-to-video", name],
        "quantized_by": f"hbxt_compress {manifest.made_with.get('hbxt-compress', '?')}",
        "model-index": [
            {
                "name": _title(manifest, base),
                "results": [
                    {
                        "task": {"type": "text-to-video", "name": "text to video"},
                        "dataset": {
                            "type": f"hbxt_compress/{report.suite.get('name', '?')}",
                            "name": f"suite {report.suite.get('name', '?')} of hbxt_compress, "
                            f"{report.n_clips} clips against full precision",
                        },
                        "metrics": [
                            _metric(one) for one in report.measurements if one.value is not None
                        ],
                    }
                ],
            }
        ],
    }


def _metric(one: Measurement) -> dict[str, object]:
    unit = f" ({one.unit})" if one.unit else ""
    span = ""
    if one.interval is not None:
        span = f", 95 % interval {one.interval[0]:.4g} .. {one.interval[1]:.4g}"
    assert one.value is not None
    value = float(f"{one.value:.6g}")
    return {"type": one.metric, "value": value, "name": f"{one.metric}{unit}, n {one.n}{span}"}


def _what(manifest: Manifest, report: QualityReport, base: str | None) -> list[str]:
    summary = str(_document(manifest).get("summary", ""))
    return [
        f"# {escaped(_title(manifest, base))}",
        f"{escaped(_model(manifest, base))}, compressed by hbxt\\_compress with recipe "
        f"`{manifest.recipe['name']}`{': ' + escaped(summary) if summary else ''}. ONNX graphs "
        "that run without torch.",
        f"**{escaped(report.conclusion)}**",
    ]


def _use(manifest: Manifest) -> list[str]:
    sampler, sizes = manifest.sampler, ", ".join(str(one.geometry) for one in manifest.buckets)
    return [
        "## Use",
        "```bash\n"
        "hf download ORG/NAME --local-dir model\n"
        "hbxt verify model          # every byte; with --key PUBLIC.pem the signature, too\n"
        'hbxt generate model --prompt "..." --out clip.mp4\n'
        "```",
        f"Clip sizes (height x width x frames): {sizes}. Sampler {sampler.solver}, "
        f"{sampler.n_steps} steps, guidance {sampler.guidance:g} unless asked otherwise. "
        f"Prompts up to {manifest.text_length} tokens.",
    ]


def _quality(report: QualityReport) -> list[str]:
    steps, seed = report.suite.get("n_steps", "?"), report.suite.get("seed", "?")
    told = [f"- {escaped(name)}: {escaped(note)}" for name, note in notes(report)]
    by = sorted({one.interval_by for one in report.measurements if one.interval_by})
    floor = controls(report)
    if floor:
        floor = [
            "The same means beside the full-precision model's own (noise: numbers that differ by "
            "rounding; seed: other noise for the same prompts) and those of known damage:",
            *floor,
        ]
    return [
        "## Measured quality",
        f"{report.n_clips} clips of suite `{report.suite.get('name', '?')}` ({steps} steps, seed "
        f"{seed}) against the same clips of the full-precision model: same prompts, seeds and "
        "noise, both through the same runtime. Pictures and videos: `quality/report.html`.",
        markdown_table(METRICS_HEAD, metric_rows(report)),
        *([f"Intervals: {escaped('; '.join(by))}."] if by else []),
        *(["\n".join(told)] if told else []),
        *floor,
    ]


def _sizes(manifest: Manifest, report: QualityReport) -> list[str]:
    counts = Counter(layer.format for layer in manifest.layers)
    formats = ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
    told = [f"Weights by format: {escaped(formats)}."] if formats else []
    worst = sorted(
        (one for one in manifest.layers if one.error is not None), key=lambda one: -_error(one)
    )
    if worst:
        least = ", ".join(
            f"{one.name} ({one.format}) {power_db(one.error)}" for one in worst[:_LEAST_TOLD]
        )
        told.append(f"Largest error of a layer's output against its power: {escaped(least)}.")
    return ["## Sizes", markdown_table(BYTES_HEAD, byte_rows(report)), *told]


def _error(layer: LayerFate) -> float:
    return layer.error or 0.0


def _how(manifest: Manifest, report: QualityReport) -> list[str]:
    versions = ", ".join(f"{name} {n}" for name, n in manifest.made_with.items())
    steps = [" ".join(one[key] for key in ("stage", "version") if key in one)
             for one in manifest.lineage]  # fmt: skip
    sources = cast(Mapping[str, str], manifest.source.get("files", {}))
    told = [
        f"- Recipe digest: `{manifest.recipe['digest']}`",
        f"- Versions: {escaped(versions)}",
        f"- Stages (name, version): {escaped(', '.join(steps)) or '-'}",
        f"- Source: {len(sources)} files, their sha256 in `manifest.json`",
    ]
    if shown := calibration(report):
        told.append(f"- {escaped(shown)}")
    return [
        "## How it was made",
        "\n".join(told),
        "The recipe, all seeds and defaults in it; the same recipe on the same files gives the "
        "same bytes with the same versions on the same kind of processor "
        "(`hbxt explain A --against B` tells what differs):",
        f"```yaml\n{yaml_text.dump(_document(manifest))}```",
    ]


def _limits(manifest: Manifest, report: QualityReport) -> list[str]:
    targets = ", ".join(sorted(manifest.targets)) or "none"
    told = [
        f"- **Not verified on AMD GPUs.** Its graphs were judged for {escaped(targets)} by tables "
        "of what each runtime takes (`hbxt check`); quality was measured on ONNX Runtime's CPU "
        "provider.",
    ]
    if report.outcome != "pass":
        told.append(f"- **{_NOT_KEPT[report.outcome]}** {escaped(report.conclusion)}")
    broken = [one for one in report.verdicts if one.outcome != "pass"]
    told += [f"- {escaped(f'{v.metric}: {v.outcome}, {v.reason}')}" for v in broken]
    unmeasured = sorted({m.metric.split("[")[0] for m in report.measurements if m.value is None})
    if unmeasured:
        told.append(f"- Not measured: {escaped(', '.join(unmeasured))}.")
    told.append("- What the source model cannot do, or must not be used for, holds here, too.")
    return ["## Known limits", "\n".join(told)]


def _licence(terms: Terms) -> list[str]:
    if terms.by_hand:
        return [
            "## Licence",
            f"`{escaped(terms.name)}`, as whoever released this says: **the source model came "
            "without a licence file.** Check its terms where it was published.",
        ]
    files = ", ".join(f"[{name}]({name})" for name in terms.files)
    name = "see these files" if terms.name == "other" else f"`{escaped(terms.name)}`"
    return [
        "## Licence",
        f"That of the source model, whose files came along: {files} ({name}). Restrictions of use "
        "in them hold for this release, too.",
    ]


def _document(manifest: Manifest) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(json.dumps(manifest.recipe.get("document", {}))))


def _hub_id(manifest: Manifest) -> str | None:
    found = _HUB_ID.fullmatch(str(manifest.source.get("model", "")))
    return found["repo"] if found else None


def _model(manifest: Manifest, base: str | None) -> str:
    """What the source is called, without the folders of whoever made this."""
    model = str(manifest.source.get("model", "?"))
    if base or _HUB_ID.fullmatch(model) or model.startswith("builtin/"):
        return base or model
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1]


def _title(manifest: Manifest, base: str | None) -> str:
    name = _model(manifest, base).partition("@")[0].rpartition("/")[2]
    return f"{name} {manifest.recipe['name']}"
