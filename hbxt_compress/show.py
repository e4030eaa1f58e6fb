"""What a person sees on stdout: tables, or JSON where it was asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hbxt_compress.render.table import size

if TYPE_CHECKING:  # `generate` and `verify` must work where torch is not installed
    from hbxt_compress.artifact import Artifact
    from hbxt_compress.costs.prediction import Prediction
    from hbxt_compress.doctor import Finding
    from hbxt_compress.geometry import Geometry
    from hbxt_compress.graph.check import Check
    from hbxt_compress.graph.judge import Judgement
    from hbxt_compress.plan import LayerPlan, Plan
    from hbxt_compress.recipe import Recipe

__all__ = [
    "COLOURS",
    "artifact",
    "as_json",
    "checked",
    "clip",
    "console",
    "findings",
    "lines",
    "plan",
    "prediction",
    "recipes",
    "rows",
    "status",
    "table_of",
    "verified",
]

_LEAST_WIDTH = 110  # of a table that is not on a terminal
COLOURS = {
    "pass": "green",
    "fail": "red",
    "undecided": "yellow",
    "done": "green",
    "partial": "yellow",
    "ok": "green",
    "note": "yellow",
    "fails": "red",
}


def console() -> Console:
    """Where tables go: as wide as the terminal, and wide enough where there is none."""
    found = Console(highlight=False)
    if found.is_terminal:
        return found
    return Console(highlight=False, width=max(_LEAST_WIDTH, found.width))


def as_json(document: object) -> None:
    """Prints a JSON value."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def recipes(found: Sequence[Recipe], json_wanted: bool) -> None:
    """Prints names, summaries and promises."""
    if json_wanted:
        return as_json([{"name": r.name, "summary": r.summary, "digest": r.digest} for r in found])
    table = table_of("recipe", "what it does", "promise")
    for recipe in found:
        limits = ", ".join(f"{metric} {limit:g}" for metric, limit in recipe.accept.limits.items())
        table.add_row(recipe.name, escape(recipe.summary), limits or "-")
    return console().print(table)


def prediction(recipe: Recipe, told: Prediction) -> None:
    """Prints a row per stage: seconds, peak memory, bytes that stay on the disk; and the totals."""
    columns = ("stage", ">time", ">peak memory", ">disk")
    table = table_of(*columns, title=f"prediction: {recipe.name}, from an empty store")
    for one in told.stages:
        row = (one.stage, _time(one.seconds), size(one.peak_rss_bytes), size(one.disk_bytes))
        table.add_row(*row)
    table.add_section()
    whole = (_time(told.seconds), size(told.peak_rss_bytes), size(told.disk_bytes))
    table.add_row("all", *whole, style="bold")
    out = console()
    out.print(table)
    if told.most_disk_bytes > told.disk_bytes:
        out.print(f"disk meanwhile: {size(told.most_disk_bytes)}")
    if told.machine is not None:
        out.print(escape(f"machine: {told.machine}"), soft_wrap=True)


def plan(
    recipe: Recipe, found: Plan, json_wanted: bool, *,
    every_layer: bool = False, told: Prediction | None = None,
) -> None:  # fmt: skip
    """Prints one row per fate: which layers, their format, the rule and why; then the sizes.

    every_layer: a row for each layer instead, by size. told: a prediction, for JSON.
    """
    document = recipe.model_dump(mode="json")
    distilled, decoder = document["distill"], document["decoder"]
    if json_wanted:
        named = {
            "name": recipe.name,
            "digest": recipe.digest,
            "distill": distilled,
            "decoder": decoder,
        }
        predicted = {} if told is None else {"predicted": told.to_json()}
        return as_json({"recipe": named, **predicted, **found.to_json()})
    head = "layer" if every_layer else "component"
    columns = (head, ">layers", "format", ">rule", ">before", ">after", "why")
    table = table_of(*columns, title=f"plan: {recipe.name}")

    def fate(layer: LayerPlan) -> tuple[str, int, str, str]:
        if every_layer:
            return layer.spec.name, layer.rule, layer.stored, layer.reason
        why = "" if layer.reason.startswith("budget:") else layer.reason
        return layer.spec.component, layer.rule, layer.stored, why

    ordered = sorted(found.layers, key=fate)
    for (name, rule, stored, why), group in groupby(ordered, key=fate):
        layers = list(group)
        table.add_row(
            escape(name),
            str(len(layers)),
            stored,
            str(rule),
            size(sum(layer.bytes_before for layer in layers)),
            size(sum(layer.bytes_after for layer in layers)),
            escape(why) or "decided by the budget; --layers tells why",
            style="bold" if layers[0].quantized else "dim",
        )
    out = console()
    out.print(table)
    out.print(_sizes(found.components(), sum(found.parameters.values())))
    for how in distilled:
        told_of = ", ".join(f"{key} {value}" for key, value in how.items() if key != "use")
        out.print(escape(f"distill first: {how['use']}, {told_of}"), soft_wrap=True)
    if decoder is not None:
        told_of = ", ".join(f"{key} {value}" for key, value in decoder.items() if key != "use")
        out.print(escape(f"decoder: {decoder['use']}, {told_of}"), soft_wrap=True)
    given = "none is needed" if found.shown is None else f"{found.shown.name}, {found.shown.text}"
    out.print(escape(f"calibration: {given}"), soft_wrap=True)
    for one in found.left_out:
        out.print(escape(f"{one.step}: left out: {one.reason}"), soft_wrap=True)
    return None


def artifact(found: Artifact, json_wanted: bool) -> None:
    """Prints where the artifact is, its sizes, and the layers that lost most."""
    manifest = found.manifest
    if json_wanted:
        return as_json({"artifact": str(found.folder), "components": _plain(manifest.components)})
    out = console()
    n_weights = sum(sizes["before"] for sizes in manifest.components.values()) // 2
    out.print(_sizes(manifest.components, n_weights))
    counts = sorted(
        (fmt, len(list(g))) for fmt, g in groupby(sorted(layer.format for layer in manifest.layers))
    )
    out.print("layers: " + ", ".join(f"{count} {fmt}" for fmt, count in counts))
    measured = [layer for layer in manifest.layers if layer.error is not None]
    worst = sorted(measured, key=lambda layer: -(layer.error or 0.0))[:3]
    if worst:
        out.print(
            "largest relative output error: " + ", ".join(f"{x.name} {x.error:.2%}" for x in worst)
        )
    return out.print(f"artifact: {found.folder}", soft_wrap=True)


def status(rows: Iterable[tuple[str, str, str, str]], json_wanted: bool) -> None:
    """Prints which stages are done, and how many pieces of one that was stopped."""
    head = ("stage", "key", "state", "pieces")
    if json_wanted:
        return as_json([dict(zip(head, row, strict=True)) for row in rows])
    table = table_of(*head)
    for stage, key, state, pieces in rows:
        table.add_row(stage, key, f"[{COLOURS.get(state, 'dim')}]{state}", pieces)
    return console().print(table)


def clip(path: Path, n_frames: int, size: Geometry, providers: Sequence[str]) -> None:
    """Prints what was written, and what ran it."""
    what = f"{n_frames} frames, {size.width}x{size.height}, {size.fps:g} fps"
    console().print(escape(f"{path}: {what}, on {', '.join(providers)}"), soft_wrap=True)


def checked(path: Path, found: Sequence[Check], json_wanted: bool) -> None:
    """Prints a row per target and runtime, then what does not just run on the one that counts."""
    if json_wanted:
        documents = [one.to_json() for one in found]
        return as_json(documents[0] if len(documents) == 1 else documents)
    columns = ("target", "runtime", ">runs", ">slow", ">falls back", ">misparsed", ">fails", "")
    table = table_of(*columns, title=escape(f"check: {path}"))
    for one in found:
        for name, judgement in one.runtimes.items():
            counts = [
                f"{n:,}" if n and judgement.runs_there else "" for n in judgement.counts().values()
            ]
            outcome, counted = _outcome(judgement), name == one.runtime
            style = "bold" if counted else "dim"
            table.add_row(one.target if counted else "", name, *counts, outcome, style=style)
        table.add_section()
    out = console()
    out.print(table)
    told: set[str] = set()
    for one in found:
        for line in _reasons(one):
            if line not in told:
                out.print(escape(line), soft_wrap=True)
            told.add(line)
    unproven = sorted({r.runtime.name for c in found for r in c.runtimes.values() if _unproven(r)})
    if unproven:
        out.print(f"by source code alone, not tried on a card: {', '.join(unproven)}")
    return None


def _unproven(judgement: Judgement) -> bool:
    return not judgement.runtime.verified


def _outcome(judgement: Judgement) -> str:
    if not judgement.runs_there:
        return "not for this target"
    if judgement.cliff:
        return f"[red]takes nothing of {escape(', '.join(judgement.cliff))}"
    return "[green]passes" if judgement.passes else "[red]does not pass"


def _reasons(one: Check) -> Iterator[str]:
    """By verdict, operator and reason, of the runtime that counts: how many nodes, and some."""
    counted = one.runtimes[one.runtime]
    found: dict[tuple[str, str, str], list[str]] = {}
    for node in counted.nodes:
        if node.verdict != "runs":
            place = f"{node.file}: {node.node}" if node.node != node.op else node.file
            found.setdefault((node.verdict, node.op, node.reason), []).append(place)
    for (verdict, op, reason), places in found.items():
        some = ", ".join(places[:2]) + (", ..." if len(places) > 2 else "")
        yield f"{one.runtime}: {verdict}: {len(places)} x {op}: {reason} ({some})"


def findings(found: Sequence[Finding], json_wanted: bool) -> None:
    """Prints a row per finding of `hbxt doctor`."""
    if json_wanted:
        return as_json([asdict(one) for one in found])
    table = table_of("", "", "what", "what to do")
    for one in found:
        state = f"[{COLOURS[one.state]}]{one.state}"
        table.add_row(one.about, state, escape(one.what), escape(one.remedy))
    return console().print(table)


def verified(found: Artifact) -> None:
    """Prints that every file is as the manifest says."""
    records = found.manifest.files
    total = size(sum(record.size_bytes for record in records))
    console().print(
        escape(f"{found.folder}: {len(records)} files, {total}: as the manifest says"),
        soft_wrap=True,
    )


def lines(told: Iterable[str]) -> None:
    """Prints lines of text, as wide as they are."""
    out = console()
    for line in told:
        out.print(escape(line), soft_wrap=True)


def rows(
    title: str, columns: Sequence[str], cells: Iterable[Sequence[str]], notes: Iterable[str]
) -> None:
    """Prints a table and lines below it; a column that starts with > is right-aligned."""
    table = table_of(*columns, title=title)
    for one in cells:
        table.add_row(*map(escape, one))
    out = console()
    out.print(table)
    for note in notes:
        out.print(escape(note), soft_wrap=True)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _sizes(components: Mapping[str, Mapping[str, int]], n_weights: int) -> Table:
    table = table_of("component", ">16 bit", ">compressed", ">ratio", ">bits a weight")
    for name, sizes in components.items():
        bits = 16 * sizes["after"] / max(1, sizes["before"])
        ratio = f"{sizes['before'] / max(1, sizes['after']):.2f}x"
        table.add_row(name, size(sizes["before"]), size(sizes["after"]), ratio, f"{bits:.2f}")
    before, after = (
        sum(sizes[key] for sizes in components.values()) for key in ("before", "after")
    )
    bits = 8 * after / max(1, n_weights)
    table.add_section()
    row = ("all", size(before), size(after), f"{before / max(1, after):.2f}x", f"{bits:.2f}")
    table.add_row(*row, style="bold")
    return table


def table_of(*columns: str, title: str | None = None) -> Table:
    """An empty table; a column that starts with > is right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        right = column.startswith(">")
        table.add_column(
            escape(column.lstrip(">")),
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=right,
        )
    return table


def _plain(document: Mapping[str, object]) -> dict[str, object]:
    return {
        key: _plain(value) if isinstance(value, Mapping) else value
        for key, value in document.items()
    }
