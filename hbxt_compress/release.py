"""Release: an artifact, its report and its licences as one folder that explains and proves itself.

The artifact's files stay as they are, byte for byte; released.py says what is added to them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final, Literal

from hbxt_compress import disk, licences, signing
from hbxt_compress.artifact import MANIFEST, Artifact
from hbxt_compress.errors import (
    ArtifactError,
    CheckFailed,
    QualityGateFailed,
    QualityUndecided,
    UsageError,
    listing,
)
from hbxt_compress.file_records import paths_under, record, sha256_of
from hbxt_compress.graph.check import check_targets
from hbxt_compress.manifest import Manifest
from hbxt_compress.released import (
    NOTES,
    RELEASE,
    SCHEMA,
    SIGNATURE,
    SIGNATURE_SHA256,
    Release,
    sha256_line,
)
from hbxt_compress.render.card import Terms, card
from hbxt_compress.report import QualityReport
from hbxt_compress.signing import Identity

__all__ = ["Allowed", "open_release", "release"]

Allowed = Literal["pass", "undecided", "fail"]
_REPORT: Final = ("report.json", "report.md", "report.html")
_QUALITY: Final = "quality"
_UNSIGNED: Final = (SIGNATURE, SIGNATURE_SHA256, NOTES.rstrip("/"))
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
    _require_same(found.manifest, measured, report)
    _require_outcome(measured, allow)
    _require_targets(found)
    terms = _terms(found, licence)
    made = Release(
        schema=SCHEMA,
        name=str(found.manifest.recipe["name"]),
        recipe=str(found.manifest.recipe["digest"]),
        model=str(found.manifest.source["model"]),
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
            (fresh / "README.md").write_text(text, encoding="utf-8")
            _write_attributes(fresh)
            files = tuple(record(fresh, path) for path in paths_under(fresh))
            made = replace(made, files=files)
            (fresh / RELEASE).write_text(made.text(), encoding="utf-8")
            if made.signed:
                signing.sign(fresh, fresh / SIGNATURE, key=key, unsigned=_UNSIGNED)
                line = sha256_line(fresh / SIGNATURE)
                (fresh / SIGNATURE_SHA256).write_text(line, encoding="utf-8")
            _require_artifact(fresh, made)
            disk.put(fresh, out)
    except BaseException:
        disk.remove(fresh)
        raise
    return made


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
    _require_artifact(folder, found)
    if by is not None:
        if not found.signed:
            raise ArtifactError(
                f"{folder}: not signed, so nobody's key or identity can be checked; "
                "ask for a signed release, or compare its digest (--digest)"
            )
        signing.verify(folder, folder / SIGNATURE, by, unsigned=_UNSIGNED)
    return found


def _require_same(manifest: Manifest, report: QualityReport, folder: Path) -> None:
    """A report repeats what the manifest says; if it differs, something else was measured."""
    own = {
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
    checks = check_targets(found.folder, tuple(found.manifest.targets))
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
    (folder / ".gitattributes").write_text("".join(lines), encoding="utf-8")


def _require_artifact(folder: Path, made: Release) -> None:
    """The artifact in a release is whole, by its own manifest and by the same digests."""
    manifest = Artifact.open(folder, verify=False).manifest
    recorded: Mapping[str, object] = {one.path: one for one in made.files}
    differing = [one.path for one in manifest.files if recorded.get(one.path) != one]
    if differing:
        raise ArtifactError(
            f"{folder}: {MANIFEST} and {RELEASE} differ in {len(differing)} files:\n"
            f"{listing(differing)}\nit was not made by `hbxt release`"
        )
