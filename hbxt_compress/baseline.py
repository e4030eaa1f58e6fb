"""Accepted: what a recipe measured on a suite when someone said that it is good, in a JSON file.

`hbxt accept` writes it from a report, `hbxt evaluate` compares with it, clip for clip. It is text
of one line a metric, so that a change of it can be reviewed like code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from hbxt_compress import library
from hbxt_compress.errors import UsageError, listing
from hbxt_compress.json_text import read_json
from hbxt_compress.report import QualityReport

__all__ = [
    "SCHEMA",
    "Accepted",
    "accept_report",
    "experiment_of",
    "find_baseline",
    "model_digest",
]

SCHEMA = 1
_DIGITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A measurement to hold later ones against, and where it came from.

    experiment: digest of prompts, seeds and steps; model: of the source's files. per_clip: metric
    -> its value for each clip. values: metric -> [value, low, high]. accepted: a date.
    """

    schema: int
    recipe: str
    suite: str
    n_clips: int
    experiment: str
    model: str
    artifact: str
    accepted: str
    why: str
    bytes_after: int
    made_with: Mapping[str, str]
    values: Mapping[str, tuple[float, ...]]
    per_clip: Mapping[str, tuple[float, ...]]

    @classmethod
    def of(cls, report: QualityReport, accepted: str, why: str) -> Self:
        """What is kept of a report.

        Raises:
            UsageError: it measured nothing, or clips are unhealthy.
        """
        sick = sum(1 for clip in report.clips if clip.problems)
        measured = [one for one in report.measurements if one.value is not None]
        if sick or not measured:
            what = f"{sick} of {report.n_clips} clips are unhealthy" if sick else "nothing measured"
            raise UsageError(f"this report is no baseline: {what}")
        told = {
            "recipe.name": report.recipe.get("name"), "suite.name": report.suite.get("name"),
            "suite.experiment": report.suite.get("experiment"),
        }  # fmt: skip
        if lacking := [key for key, value in told.items() if not isinstance(value, str)]:
            raise UsageError(
                f"this report is no baseline: it lacks {', '.join(lacking)}; evaluate again"
            )
        values = {
            one.metric: tuple(
                _short(x) for x in (one.value, *(one.interval or ())) if x is not None
            )
            for one in measured
        }
        return cls(
            schema=SCHEMA, recipe=str(report.recipe["name"]), suite=str(report.suite["name"]),
            n_clips=report.n_clips, experiment=str(report.suite["experiment"]),
            model=model_digest(report.source), artifact=report.artifact, accepted=accepted, why=why,
            bytes_after=report.bytes_after, made_with=dict(report.made_with), values=values,
            per_clip={m.metric: tuple(map(_short, m.per_clip)) for m in measured if m.per_clip},
        )  # fmt: skip

    @property
    def file_name(self) -> str:
        return f"{self.recipe}@{self.suite}.json"

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all, a metric a line."""
        document = asdict(self)
        lines = []
        for key, value in document.items():
            if isinstance(value, dict):
                rows = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(value.items())]
                lines.append(f" {json.dumps(key)}: {{\n" + ",\n".join(rows) + "\n }")
            else:
                lines.append(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The measurement in a file; UsageError if there is none or it is not valid."""
        try:
            document = read_json(path)
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: no readable baseline ({error})") from None
        if problems := _problems(document):
            raise UsageError(
                f"{path}: not a baseline:\n{listing(problems)}\nwrite it with `hbxt accept`"
            )
        tuples = {
            key: {name: tuple(map(float, row)) for name, row in document[key].items()}
            for key in ("values", "per_clip")
        }
        return cls(**document | tuples)


def find_baseline(asked: str | None, recipe: str, suite: str) -> tuple[str, Accepted] | None:
    """Where the baseline of a recipe on a suite lies, and what it says; None if there is none.

    asked: a path, or none for no comparison; None: eval/baselines/<recipe>@<suite>.json, if any.

    Raises:
        UsageError: the file asked for is missing, or what was found is not valid.
    """
    if asked == "none":
        return None
    if asked is not None:
        return asked, Accepted.load(Path(asked))
    name = f"{recipe}@{suite}.json"
    path = library.folder("eval/baselines") / name
    return (f"eval/baselines/{name}", Accepted.load(path)) if path.is_file() else None


def accept_report(report: QualityReport, *, why: str, out: Path | None, force: bool) -> Path:
    """Writes a report as baseline and returns the file.

    Raises:
        UsageError: it measured nothing, its clips are unhealthy, or it fails and force is not said.
    """
    if report.outcome == "fail" and not force:
        raise UsageError(
            f"this report fails ({report.conclusion}); mend that, or say --force and why"
        )
    accepted = Accepted.of(report, datetime.now(UTC).date().isoformat(), why)
    path = out or library.folder("eval/baselines") / accepted.file_name
    accepted.save(path)
    return path


def model_digest(source: Mapping[str, object]) -> str:
    """What stands for a model in a baseline: its files' digests, not where they lie."""
    return _digest(source.get("files", source))


def experiment_of(items: object, n_steps: int) -> str:
    """What stands for prompts, seeds and steps: sides that differ in it cannot be compared."""
    return _digest([items, n_steps])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _problems(document: Any) -> list[str]:
    if not isinstance(document, dict):
        return ["expected a JSON object"]
    if document.get("schema") != SCHEMA:
        return [f"schema {document.get('schema')!r}, this version reads {SCHEMA}"]
    names = {field.name for field in fields(Accepted)}
    found = [f"{name}: missing" for name in sorted(names - document.keys())]
    found += [f"{name}: unknown" for name in sorted(document.keys() - names)]
    if found:
        return found
    whole = ("n_clips", "bytes_after")
    texts = ("recipe", "suite", "experiment", "model", "artifact", "accepted", "why")
    found = [f"{name}: not a text" for name in texts if not isinstance(document[name], str)]
    found += [f"{name}: not a count" for name in whole if type(document[name]) is not int]
    made_with = document["made_with"]
    if not isinstance(made_with, dict) or not all(isinstance(v, str) for v in made_with.values()):
        found.append("made_with: not versions by name")
    for key in ("values", "per_clip"):
        rows = document[key]
        if not isinstance(rows, dict):
            found.append(f"{key}: not lists by metric")
            continue
        n = document["n_clips"] if key == "per_clip" else None
        found += [
            f"{key}.{name}: not numbers" for name, row in rows.items() if not _numbers(row, n)
        ]
    return found


def _numbers(row: object, n: object) -> bool:
    return (
        isinstance(row, list)
        and (n is None or len(row) == n)
        and all(type(x) in (int, float) and math.isfinite(x) for x in row)
    )
