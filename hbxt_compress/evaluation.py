"""Evaluation: which results a quality report needs, in order. The store finds or makes each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from hbxt_compress.artifact import MANIFEST, Artifact
from hbxt_compress.baseline import Accepted
from hbxt_compress.errors import ArtifactError, SourceError, UsageError, listing
from hbxt_compress.machine import Machine
from hbxt_compress.pipeline import artifact_of, located, published, student_of
from hbxt_compress.recipe import distillers, load_recipe
from hbxt_compress.report import QualityReport
from hbxt_compress.source import Source
from hbxt_compress.stages.control import DISTURBANCES, kind_of, other_provider, other_threads
from hbxt_compress.stages.disturb import FOLDER, disturb
from hbxt_compress.stages.report import report, weights_at_hand
from hbxt_compress.stages.sample import sample
from hbxt_compress.store import Store
from hbxt_compress.suite import Suite

__all__ = ["REFERENCE", "evaluate", "sources_of", "steps_of"]

REFERENCE = "fp32"  # the recipe whose clips every artifact's are compared with


def evaluate(
    artifact: Path,
    suite: Suite,
    store: Store,
    *,
    machine: Machine,
    model: str | None = None,
    out: Path | None = None,
    baseline: tuple[str, Accepted] | None = None,
) -> QualityReport:
    """The quality of an artifact against its model in full precision, both in the same runtime.

    A student's sets of clips are also measured against those of the model it was distilled from.
    baseline: where it lies and what it says; clips must not be worse than those were.

    Raises:
        UsageError: the artifact is the full-precision one under another name.
    """
    candidate = Artifact.open(artifact)
    sources = sources_of(candidate, model, store, machine)
    size, precise = candidate.manifest.geometry, load_recipe(REFERENCE)
    made = [artifact_of(precise, source, store, machine, (size,)) for source in sources]
    exact = Artifact.open(made[-1].folder)
    _refuse_itself(candidate, exact)
    clips = [
        store.result(
            sample, artifact=one, items=suite.items(), n_steps=steps_of(one, suite), on=machine
        )
        for one in (candidate, *(Artifact.open(entry.folder) for entry in made))
    ]
    entry = store.result(
        report,
        reference=clips[-1],
        candidate=clips[0],
        artifact=candidate,
        suite=suite,
        weights=weights_at_hand(suite.metrics),
        controls=_controls(suite, sources[-1], exact, store, machine),
        baseline=baseline,
        seconds={"candidate": store.seconds(clips[0]), "reference": store.seconds(clips[-1])},
        **({"original": clips[1]} if len(made) > 1 else {}),
    )
    return QualityReport.load(published(store, entry, out, mark="report.json"))


def _refuse_itself(candidate: Artifact, exact: Artifact) -> None:
    """Full precision measured against itself must be meant: then its recipe is called so."""
    sides = [
        {(r.path, r.sha256) for r in one.manifest.files if r.path.count("/") == 1}
        for one in (candidate, exact)
    ]
    if sides[0] == sides[1] and candidate.manifest.recipe.get("name") != REFERENCE:
        raise UsageError(
            f"{candidate.folder}: every graph and weight is byte for byte the full-precision "
            "export's, so there is nothing to measure; was the right folder given?"
        )


def _controls(
    suite: Suite, source: Source, exact: Artifact, store: Store, machine: Machine
) -> list[dict[str, object]]:
    """Clips of each control of a suite; once made they serve every recipe."""
    found = list[dict[str, object]]()
    for name in suite.controls:
        one, asked = exact, dict[str, Any]()
        recipe = None if name in DISTURBANCES else load_recipe(name)
        if recipe is not None:
            size = exact.manifest.geometry
            one = Artifact.open(artifact_of(recipe, source, store, machine, (size,)).folder)
        elif name == "ulp":
            one = Artifact.open(
                store.result(disturb, artifact=exact, seed=suite.seed).folder / FOLDER
            )
        elif name == "threads":
            asked = {"n_threads": other_threads(machine.n_threads)}
        elif name == "provider":
            asked = {"provider": other_provider()}
        kind, text = kind_of(name, recipe.summary if recipe else "")
        told: dict[str, object] = {"name": name, "kind": kind, "text": text, "note": ""}
        if name == "provider" and asked["provider"] is None:
            told["note"] = "only the CPU provider is installed here"
        else:
            told["clips"] = store.result(
                sample, artifact=one, items=suite.control_items(other_seeds=name == "seed"),
                n_steps=steps_of(one, suite), on=machine, **asked,
            )  # fmt: skip
        found.append(told)
    return found


def steps_of(artifact: Artifact, suite: Suite) -> int | None:
    """Denoising steps of a suite's clips: what it says, or what a student was distilled for."""
    return None if artifact.manifest.sampler.levels else suite.n_steps


def sources_of(
    artifact: Artifact, model: str | None, store: Store, machine: Machine
) -> tuple[Source, ...]:
    """The full-precision model an artifact was made from, checked to be the very same bytes.

    If that is a student, it comes last, after the model that it was distilled from.
    """
    made_from = artifact.manifest.source
    original = located(model or str(made_from["model"]), store)
    try:
        how, decoder = distillers(cast(Mapping[str, Any], artifact.manifest.recipe["document"]))
    except ArtifactError as error:
        raise ArtifactError(f"{artifact.folder / MANIFEST}: {error}") from None
    source = student_of(how, decoder, original, store, machine)
    wanted = cast(Mapping[str, str], made_from["files"])
    differing = sorted(
        n for n in wanted.keys() | source.files.keys() if wanted.get(n) != source.files.get(n)
    )
    if differing:
        raise SourceError(
            f"{source.folder}: not the model that {artifact.folder} was made from; "
            f"{len(differing)} files differ:\n"
            f"{listing(differing)}\ngive the right one with --model"
        )
    return (original, source) if how or decoder else (source,)
