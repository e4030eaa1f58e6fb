"""What `hbxt` has for quality: evaluate, accept, compare, results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import click

from hbxt_compress.errors import QualityGateFailed, QualityUndecided, UsageError
from hbxt_compress.ranks import Ranks

__all__ = ["accept", "bisect_", "compare", "evaluate", "results"]

_SMALL: Final = 1_000_000_000  # bytes of an artifact whose parts are looked at without being asked
_path = click.Path(path_type=Path)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


@click.command()
@click.argument("artifact", type=_path)
@click.option("--suite", "suite_name", help="Name or file; default: what the recipe promises on.")
@click.option("--model", help="Full-precision model, if it has moved.")
@click.option("--out", type=_path, help="Folder for the report; default: in the store.")
@click.option(
    "--baseline",
    "baseline_name",
    help="File that `hbxt accept` wrote, or none; default: eval/baselines/<recipe>@<suite>.json.",
)
@click.option(
    "--bisect/--no-bisect",
    "wants_parts",
    default=None,
    help="If it fails, find where the error enters; default: of artifacts below 1 GB.",
)
@click.option(
    "--store", type=_path, default=Path(".hbxt"), envvar="HBXT_STORE", help="Folder of results."
)
@click.option("--device", default="cpu", help="torch device that computes: cpu, or cuda (ROCm).")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: all cores.")
@_json
@click.pass_obj
def evaluate(
    ranks: Ranks, artifact: Path, suite_name: str | None, model: str | None, out: Path | None,
    baseline_name: str | None, wants_parts: bool | None, store: Path, device: str,
    threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure what ARTIFACT lost.

    Against the full-precision model, with the same prompts and noise, beside what noise alone does,
    and against the baseline that was accepted for its recipe, if there is one. Exit 3: a promise is
    broken, it is worse than the baseline, or clips fail as no good ones do; 4: it could not be
    decided. The report folder also holds junit.xml and summary.md for CI.
    """
    from hbxt_compress import bisection, evaluation, show_quality
    from hbxt_compress.artifact import Artifact
    from hbxt_compress.baseline import find_baseline
    from hbxt_compress.machine import Machine
    from hbxt_compress.render.github import tell_github
    from hbxt_compress.store import Store
    from hbxt_compress.suite import load_suite

    recipe = Artifact.open(artifact, verify=True).manifest.recipe
    suite = load_suite(suite_name or _promised_suite(recipe))
    baseline = find_baseline(baseline_name, str(recipe.get("name")), suite.name)
    machine = Machine(device=ranks.device(device), n_threads=threads)
    report = evaluation.evaluate(
        artifact, suite, Store(store, ranks), model=model, out=out, machine=machine,
        baseline=baseline,
    )  # fmt: skip
    show_quality.report(report, out, as_json)
    if wants_parts is None:
        wants_parts = report.bytes_after < _SMALL
    where = ""
    if report.outcome == "fail" and wants_parts and not any(c.problems for c in report.clips):
        parts = bisection.bisect(artifact, suite, Store(store, ranks), machine=machine, model=model)
        where = f" {parts.text}"
        if not as_json:
            show_quality.bisection(parts, as_json)
        if out is not None and ranks.leads:
            (out / "bisection.json").write_text(json.dumps(parts.to_json(), indent=1) + "\n")
    if ranks.leads:
        tell_github(report, where)
    if report.outcome == "fail":
        raise QualityGateFailed(f"quality: {report.conclusion}{where}")
    if report.outcome == "undecided":
        raise QualityUndecided(f"quality: {report.conclusion}")


@click.command("bisect")
@click.argument("artifact", type=_path)
@click.option("--suite", "suite_name", help="Name or file; default: what the recipe promises on.")
@click.option("--model", help="Full-precision model, if it has moved.")
@click.option("--clips", "n_clips", type=click.IntRange(min=1), default=4, help="How many tell.")
@click.option(
    "--store", type=_path, default=Path(".hbxt"), envvar="HBXT_STORE", help="Folder of results."
)
@_json
def bisect_(
    artifact: Path, suite_name: str | None, model: str | None, n_clips: int, store: Path,
    as_json: bool,
) -> None:  # fmt: skip
    """Find where the error of ARTIFACT's clips enters.

    Each component and each transformer block is put back into full precision alone, and what that
    gains on some clips is measured. Blocks need the store that the artifact was made in.
    """
    from hbxt_compress import bisection, show_quality
    from hbxt_compress.artifact import Artifact
    from hbxt_compress.machine import Machine
    from hbxt_compress.store import Store
    from hbxt_compress.suite import load_suite

    recipe = Artifact.open(artifact, verify=True).manifest.recipe
    suite = load_suite(suite_name or _promised_suite(recipe))
    found = bisection.bisect(
        artifact, suite, Store(store), machine=Machine(), model=model, n_clips=n_clips
    )
    show_quality.bisection(found, as_json)


@click.command()
@click.argument("report", type=_path, metavar="REPORT")
@click.option("--why", required=True, help="Why these figures are good, for whoever reads later.")
@click.option("--out", type=_path, help="File to write; default: in the checkout's eval/baselines.")
@click.option("--force", is_flag=True, help="Accept a report that fails its own verdicts.")
def accept(report: Path, why: str, out: Path | None, force: bool) -> None:
    """Make REPORT (a folder) the baseline that later ones must not be worse than."""
    from hbxt_compress.baseline import accept_report
    from hbxt_compress.report import QualityReport

    loaded = QualityReport.load(report)
    try:
        path = accept_report(loaded, why=why, out=out, force=force)
    except UsageError as error:
        raise UsageError(f"{report / 'report.json'}: {error}") from None
    click.echo(f"{path}: written; review and commit it like code")


@click.command()
@click.argument("reports", type=_path, nargs=-1, required=True)
@click.option("--out", type=_path, help="Also write an HTML page of it.")
@_json
def compare(reports: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Put REPORTS (folders) of one suite beside each other.

    Each against the first, clip for clip, with significance; and which of them nobody beats in
    bytes, time and quality at once.
    """
    if len(reports) < 2:
        raise UsageError("compare: give two reports or more, of one suite")
    from hbxt_compress import show_quality
    from hbxt_compress.comparing import compare_reports
    from hbxt_compress.report import QualityReport

    loaded = [QualityReport.load(folder) for folder in reports]
    try:
        found = compare_reports(loaded)
    except UsageError as error:
        raise UsageError(f"{', '.join(map(str, reports))}: {error}") from None
    show_quality.comparison(found, out, as_json)


@click.command()
@click.argument("reports", type=_path, nargs=-1, required=True)
def results(reports: tuple[Path, ...]) -> None:
    """Print REPORTS (folders) as one Markdown table."""
    from hbxt_compress.render.results import results_table
    from hbxt_compress.report import QualityReport

    click.echo(results_table([QualityReport.load(folder) for folder in reports]), nl=False)


def _promised_suite(recipe: Any) -> str:
    document = recipe.get("document", recipe) if isinstance(recipe, dict) else {}
    accept = document.get("accept")
    return str(accept.get("suite", "standard")) if isinstance(accept, dict) else "standard"
