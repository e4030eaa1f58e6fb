"""Report: judges an artifact's clips by a suite, and the promise of a recipe if it is on that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from hbxt_compress.artifact import Artifact
from hbxt_compress.baseline import Accepted, experiment_of
from hbxt_compress.clips import ClipSet, contact_sheet
from hbxt_compress.metrics import METRICS, Unavailable, WeightFiles
from hbxt_compress.report import ControlKind
from hbxt_compress.stages.measure import About, ControlClips, measure
from hbxt_compress.store import Entry, Work
from hbxt_compress.suite import Suite

__all__ = ["FACTS", "VERSION", "report", "weights_at_hand"]

VERSION = 6
FACTS = ("numpy", "torch", "lpips")
_IN_PICTURE = 6


def report(
    work: Work,
    reference: Entry,
    candidate: Entry,
    artifact: Artifact,
    suite: Suite,
    weights: Mapping[str, str],
    original: Entry | None = None,
    controls: Sequence[Mapping[str, object]] = (),
    baseline: tuple[str, Accepted] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> None:
    """Writes report.json, .md, .html, clips and clips.png (a reference row, then its candidate's).

    weights: what `weights_at_hand` said, so that a metric is measured again once its weights are.
    original: of a student, the clips of the model that it was distilled from. controls: name, kind,
    text, note and, where there are any, clips (an Entry) of each. Rank 0 does it alone.
    """
    if not work.ranks.leads:
        return
    accept = cast(Mapping[str, Any], artifact.manifest.recipe["document"])["accept"]
    own = artifact.manifest.sampler.n_steps if artifact.manifest.sampler.levels else None
    n_steps = suite.n_steps if own is None else own
    sides = ClipSet.load(reference.folder), ClipSet.load(candidate.folder)
    pairs = zip(*(side.clips[:_IN_PICTURE] for side in sides), strict=True)
    contact_sheet(work.folder / "clips.png", [clip.frames for pair in pairs for clip in pair])
    measure(
        work.folder,
        *sides,
        about=About(
            manifest=artifact.manifest, artifact=artifact.manifest_sha256, seconds=seconds or {}
        ),
        suite={
            "name": suite.name,
            "digest": suite.digest,
            "n_steps": n_steps,
            "seed": suite.seed,
            "experiment": experiment_of(suite.items(), n_steps or 0),
        },
        metrics=suite.metrics,
        limits=accept["limits"] if accept["suite"] == suite.name else {},
        original=None if original is None else ClipSet.load(original.folder),
        controls=[_control(one) for one in controls],
        baseline=baseline,
    )


def weights_at_hand(metrics: Sequence[str]) -> dict[str, str]:
    """Per metric the sha256 of the network behind it, "" if there is none, or why it is missing."""
    files = WeightFiles.from_environment()
    found = {}
    for name in metrics:
        try:
            found[name] = METRICS[name].load(files).extractor_sha256 or ""
        except Unavailable as reason:
            found[name] = str(reason)
    return found


def _control(told: Mapping[str, object]) -> ControlClips:
    made = told.get("clips")
    return ControlClips(
        name=str(told["name"]), kind=cast(ControlKind, told["kind"]), text=str(told["text"]),
        note=str(told["note"]),
        clips=ClipSet.load(made.folder) if isinstance(made, Entry) else None,
    )  # fmt: skip
