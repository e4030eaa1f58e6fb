"""Release: an artifact, its report and its licences as one folder that explains and proves itself.

The artifact's files stay as they are, byte for byte; released.py says what is added to them.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final, Literal

from hbxt_compress import disk, licences, signing
from hbxt_compress.artifact import MANIFEST, Artifact
from hbxt_compress.errors import (
    CheckFailed,
    QualityGateFailed,
    QualityUndecided,
    UsageError,
    listing,
)
from hbxt_compress.file_records import paths_under, record
from hbxt_compress.graph.check import check_targets
from hbxt_compress.released import (
    RELEASE,
    SCHEMA,
    SIGNATURE,
    SIGNATURE_SHA256,
    Release,
    sha256_line,
)
from hbxt_compress.render.card import Terms, card
from hbxt_compress.report import QualityReport
from hbxt_compress.verify import UNSIGNED, require_artifact

__all__ = ["Allowed", "release"]

Allowed = Literal["pass", "undecided", "fail"]
log = logging.getLogger(__name__)
_REPORT: Final = ("report.json", "report.md", "report.html")
_QUALITY, _CARD, _ATTRIBUTES = "quality", "README.md", ".gitattributes"
_MUCH: Final = 5_000_000  # bytes: git should not hold such a file itself
_LFS: Final = "filter=lfs diff=lfs merge=lfs -text"


def release(
    artifact: Path, report: Path, out: Path, *, key: Path | None = None, sigstore: bool = False,
    licence: str | None = None, base: str | None = None, allow: Allowed = "pass",
    link: bool = False,
) -> Release:  # fmt: skip
    """Writes the folder `out`, whole or not at all, and returns its record.

    key: private key to sign with; sigstore: sign with an identity instead. licence: the Hub's name
    or another, needed where the source had no licence file. base: Hub id of the source. allow: the
    worst outcome of the report that may be released. link: hard links in place of copies.

    Raises:
        UsageError: `out` exists, no licence, or the report is another artifact's.
        ArtifactError: the artifact is not whole.
        QualityGateFailed: the report's outcome is worse than allowed.
        CheckFailed: a graph will not do on one of the artifact's targets.
    """
    if key is not None and sigstore:
        raise UsageError("--key and --sigstore: sign with one of them")
    if out.exists():
        raise UsageError(f"{out}: exists and is not overwritten; give another --out or remove it")
    found, measured = Artifact.open(artifact), QualityReport.load(report)
    if missing := [name for name in _REPORT if not (report / name).is_file()]:
        raise UsageError(f"{report}: lacks {', '.join(missing)}; evaluate again")
    _require_free_names(found)
    _require_same(found, measured, report)
    _require_outcome(measured, allow)
    _require_targets(found)
    terms = _terms(found, licence)
    model = str(found.manifest.source["model"])
    if Path(model).is_absolute():
        log.warning("%s is told in manifest.json and report.json, which go along", model)
    made = Release(
        schema=SCHEMA,
        name=str(found.manifest.recipe["name"]),
        recipe=str(found.manifest.recipe["digest"]),
        model=model,
        licence=terms.name,
        outcome=measured.outcome,
        signed=sigstore or key is not None,
        made_with=found.manifest.made_with.get("hbxt-compress", ""),
        files=(),
    )
    fresh = out.with_name(f".{out.name}.new")
    disk.remove(fresh)
    out.parent.mkdir(parents=True, exist_ok=True)
    needs = 0 if link else sum(one.size_bytes for one in found.manifest.files)
    try:
        with disk.writing(out, needs_bytes=needs, remedy="make room, or give an --out elsewhere"):
            _gather(found, report, fresh, link=link)
            text = card(found.manifest, measured, terms, base=base)
            (fresh / _CARD).write_text(text, encoding="utf-8")
            _write_attributes(fresh)
            files = tuple(record(fresh, path) for path in paths_under(fresh))
            made = replace(made, files=files)
            (fresh / RELEASE).write_text(made.text(), encoding="utf-8")
            if made.signed:
                signing.sign(fresh, fresh / SIGNATURE, key=key, unsigned=UNSIGNED)
                line = sha256_line(fresh / SIGNATURE)
                (fresh / SIGNATURE_SHA256).write_text(line, encoding="utf-8")
            require_artifact(fresh, made)
            disk.put(fresh, out)
    except BaseException:
        disk.remove(fresh)
        raise
    return made


def _require_free_names(found: Artifact) -> None:
    """No file of an artifact lies where a release puts its own: a hard link would be written to."""
    own = (_CARD, _ATTRIBUTES, RELEASE, SIGNATURE, SIGNATURE_SHA256)
    paths = [one.path for one in found.manifest.files]
    if taken := [p for p in paths if p in own or p.startswith(f"{_QUALITY}/")]:
        raise UsageError(
            f"{found.folder}: has files where a release has its own:\n{listing(taken)}\n"
            "give the folder that `hbxt quantize` made"
        )


def _require_same(artifact: Artifact, report: QualityReport, folder: Path) -> None:
    """A report names the manifest and repeats it; if it differs, something else was measured."""
    manifest = artifact.manifest
    own = {
        "artifact": artifact.manifest_sha256,
        "recipe": manifest.recipe,
        "source": manifest.source,
        "components": manifest.components,
        "layers": [asdict(layer) for layer in manifest.layers],
        "made_with": manifest.made_with,
    }
    differing = [name for name, value in own.items() if _json(value) != report.to_json()[name]]
    if differing:
        raise UsageError(
            f"{folder}: the report of another artifact: {', '.join(differing)} differ (recipe "
            f"{report.recipe.get('name')} {str(report.recipe.get('digest'))[:12]}, the artifact's "
            f"{manifest.recipe['name']} {str(manifest.recipe['digest'])[:12]}); "
            "run `hbxt evaluate` on this one"
        )


def _json(value: object) -> object:
    return json.loads(json.dumps(value, default=dict))


def _require_outcome(report: QualityReport, allow: Allowed) -> None:
    outcome = "undecided" if report.outcome == "none" else report.outcome
    order = ("pass", "undecided", "fail")
    if order.index(outcome) > order.index(allow):
        kind = QualityGateFailed if outcome == "fail" else QualityUndecided
        raise kind(
            f"not released: {report.conclusion} --allow {outcome} releases it all the same, with "
            "these words in its card"
        )


def _require_targets(found: Artifact) -> None:
    targets = tuple(found.manifest.targets)
    checks = check_targets(found.folder, targets) if targets else ()
    if refused := [one.target for one in checks if not one.passes]:
        raise CheckFailed(
            f"not released: {found.folder} will not do on {', '.join(refused)}; "
            "`hbxt check` names the nodes"
        )


def _terms(found: Artifact, licence: str | None) -> Terms:
    prefix = f"{licences.FOLDER}/"
    files = [one.path for one in found.manifest.files if one.path.startswith(prefix)]
    texts = {
        path.removeprefix(prefix): (found.folder / path).read_text(
            encoding="utf-8", errors="replace"
        )
        for path in files
    }
    name = licence or licences.licence_of(texts)
    if name is None and not files:
        raise UsageError(
            f"{found.folder}: its source model had no licence file; say with --licence what it is "
            "under, by the Hub's name (apache-2.0, openrail, ...) or in words"
        )
    known = name in licences.KNOWN
    return Terms(name=name or "other", known=known, files=files, by_hand=not files)


def _gather(found: Artifact, report: Path, fresh: Path, *, link: bool) -> None:
    sources = {name: found.folder / name for name in [r.path for r in found.manifest.files]}
    sources[MANIFEST] = found.folder / MANIFEST
    for name, path in sources.items():
        (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        with disk.reading(path):
            if link:
                os.link(path, fresh / name)
            else:
                shutil.copyfile(path, fresh / name)
    (fresh / _QUALITY).mkdir()
    for name in _REPORT:
        shutil.copyfile(report / name, fresh / _QUALITY / name)


def _write_attributes(folder: Path) -> None:
    """What git leaves to LFS, as the Hub asks of large files."""
    large = [p for p in paths_under(folder) if (folder / p).stat().st_size > _MUCH]
    others = [p for p in large if not p.endswith((".onnx", ".data"))]
    lines = [f"{pattern} {_LFS}\n" for pattern in ("*.onnx", "*.data", *others)]
    (folder / _ATTRIBUTES).write_text("".join(lines), encoding="utf-8")
