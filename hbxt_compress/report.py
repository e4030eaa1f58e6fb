"""QualityReport: what an evaluation found, as data. Pages are drawn from it by `render`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, Union, get_args, get_origin, get_type_hints

from hbxt_compress.errors import UsageError, listing
from hbxt_compress.json_text import read_json

__all__ = [
    "SCHEMA",
    "Baseline",
    "ClipRecord",
    "Control",
    "ControlKind",
    "Finding",
    "Measurement",
    "QualityReport",
    "Verdict",
]

SCHEMA = 2
ControlKind = Literal["noise", "seed", "damage"]
FILE_NAME = "report.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One metric's value over the clips of a suite.

    interval: 95 %, made as `interval_by` says. per_clip: the values behind a metric that has one
    for each clip, in clip order; empty for a set metric. value is None where the metric could not
    be computed; note says why. reference: what the reference side scores, for a metric that scores
    each side by itself. extractor: the network behind the metric and the sha256 of its weights.
    """

    metric: str
    value: float | None
    interval: tuple[float, float] | None
    n: int
    unit: str
    direction: Literal["lower", "higher"]
    family: Literal["fidelity", "distribution", "health"] = "fidelity"
    worst: float | None = None
    reference: float | None = None
    per_clip: tuple[float, ...] = ()
    interval_by: str = ""
    extractor: str | None = None
    extractor_sha256: str | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a promise of the recipe, or what an accepted baseline had, is kept, and why.

    limit: for a promise in the metric's unit; for a baseline the dB by which it may be worse.
    n_needed: about how many clips would decide what is undecided, if that can be told.
    """

    metric: str
    limit: float
    outcome: Literal["pass", "fail", "undecided"]
    reason: str
    against: Literal["promise", "baseline", "health"] = "promise"
    n_needed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a failure detector says: see hbxt_compress/metrics/failures.

    value: the mean signal over the n clips that can tell, in `unit`, 0 for as the reference; None
    where none can. interval: 95 %, bootstrap over clips. clips: those that fail alone, by place.
    n_needed: of "undecided", how many clips would decide it if the next are like these.
    """

    failure: str
    outcome: Literal["pass", "fail", "undecided"]
    value: float | None
    interval: tuple[float, float] | None
    tolerance: float
    unit: str
    n: int
    clips: tuple[int, ...]
    n_needed: int | None
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """Figures to read the candidate's by: the reference against itself, disturbed, or known damage.

    values: metric -> one for each of the suite's first n clips. kind: noise is what no one can do
    better than (the same model, numbers that differ by rounding), seed what unrelated clips of the
    same prompt have, damage a recipe's. note: why it could not be measured, then n is 0.
    """

    name: str
    kind: ControlKind
    text: str
    n: int
    values: Mapping[str, tuple[float, ...]]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """The accepted measurement that a candidate was compared with: where it lies, and what made it.

    note: why it was not compared; then no verdict rests on it.
    """

    path: str
    accepted: str
    artifact: str
    made_with: Mapping[str, str]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipRecord:
    """How one clip of each side was made, what its frames hash to, and what is wrong with it.

    video: the file beside the report with reference, candidate and difference side by side.
    curves: as those of the report, of this clip alone.
    """

    prompt: str
    seed: int
    reference_sha256: str
    candidate_sha256: str
    video: str = ""
    problems: tuple[str, ...] = ()
    curves: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityReport:
    """One evaluation. `layers` and `components` repeat the manifest, so the report stands alone.

    components: component -> {"before": bytes at 16 bit, "after": bytes in the artifact}. curves:
    means over clips; those named .../step have a value per denoising step, .../frame per frame.
    conclusion: the verdicts in one sentence, with what they do not rest on. artifact: sha256 of the
    candidate's manifest. seconds: median time of a clip, candidate and reference, as sampled.
    """

    schema: int
    recipe: Mapping[str, object]
    source: Mapping[str, object]
    suite: Mapping[str, object]
    n_clips: int
    components: Mapping[str, Mapping[str, int]]
    bytes_before: int
    bytes_after: int
    measurements: tuple[Measurement, ...]
    curves: Mapping[str, tuple[float, ...]]
    layers: tuple[Mapping[str, object], ...]
    verdicts: tuple[Verdict, ...]
    conclusion: str
    clips: tuple[ClipRecord, ...]
    made_with: Mapping[str, str]
    artifact: str
    seconds: Mapping[str, float]
    controls: tuple[Control, ...]
    findings: tuple[Finding, ...]
    baseline: Baseline | None

    @property
    def outcome(self) -> Literal["pass", "fail", "undecided", "none"]:
        """The worst verdict or finding; none where there is no verdict and nothing was found."""
        outcomes = {verdict.outcome for verdict in self.verdicts}
        outcomes |= {one.outcome for one in self.findings if one.outcome != "pass"}
        for outcome in ("fail", "undecided", "pass"):
            if outcome in outcomes:
                return outcome
        return "none"

    def to_json(self) -> dict[str, object]:
        """The report as plain JSON values."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, document: object) -> Self:
        """A report from plain JSON values.

        Raises:
            UsageError: another schema, or any unknown, missing or wrongly typed value; all of them.
        """
        if isinstance(document, Mapping) and document.get("schema") != SCHEMA:
            raise UsageError(
                f"report schema {document.get('schema')!r}, this version reads {SCHEMA}"
            )
        problems: list[str] = []
        report = _read(cls, document, "report", problems)
        if isinstance(report, cls) and not problems:
            problems = list(_lacking(report))
        if problems:
            raise UsageError(
                f"not a quality report, {len(problems)} problems:\n{listing(problems)}"
            )
        assert isinstance(report, cls)
        return report

    def save(self, folder: Path) -> Path:
        """Writes report.json whole or not at all, and returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        path = folder / FILE_NAME
        partial = path.with_name(f".{FILE_NAME}.partial")
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, path)
        return path

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The report of a folder; UsageError if there is none or it is not valid."""
        path = folder / FILE_NAME
        try:
            document = read_json(path)
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: no readable report ({error}); evaluate again") from None
        try:
            return cls.from_json(document)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None


def _lacking(report: QualityReport) -> Iterator[str]:
    """What those who show a report look up by name, and is not there."""
    for where, named in (("recipe", report.recipe), ("suite", report.suite)):
        if "name" in named and not isinstance(named["name"], str):
            yield f"report.{where}.name: {named['name']!r:.60} is not text"
    for i, one in enumerate(report.measurements):
        if len(one.per_clip) not in (0, report.n_clips):
            yield f"report.measurements[{i}].per_clip: {len(one.per_clip)}, not {report.n_clips}"
    for name, sizes in report.components.items():
        for key in ("before", "after"):
            if key not in sizes:
                yield f"report.components.{name}.{key}: missing"


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _read(kind: object, value: object, where: str, problems: list[str]) -> object:
    """The value as the annotated type `kind`; what does not fit is added to `problems`."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is object:
        return value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        hints = get_type_hints(kind)
        odd = [f"{where}.{key}: unknown" for key in value if key not in hints]
        odd += [f"{where}.{key}: missing" for key in hints if key not in value]
        problems += odd
        fields = {
            key: _read(hint, value[key], f"{where}.{key}", problems)
            for key, hint in hints.items()
            if key in value
        }
        return None if odd else kind(**fields)
    if origin in (types.UnionType, Union):
        if value is None and type(None) in parts:
            return None
        return _read(parts[0], value, where, problems)
    if origin is Literal and value in parts:
        return value
    if origin is tuple and isinstance(value, list):
        endless = parts[-1] is Ellipsis
        if endless or len(value) == len(parts):
            kinds = [parts[0]] * len(value) if endless else list(parts)
            pairs = enumerate(zip(kinds, value, strict=True))
            return tuple(_read(k, v, f"{where}[{i}]", problems) for i, (k, v) in pairs)
    if origin is Mapping and isinstance(value, Mapping):
        return {
            key: _read(parts[1], item, f"{where}.{key}", problems) for key, item in value.items()
        }
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif isinstance(kind, type) and type(value) is kind:
        return value
    wanted = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
    problems.append(f"{where}: {value!r:.60} is not {wanted.removeprefix('typing.')}")
    return None
