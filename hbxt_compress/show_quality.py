"""What a person sees of `hbxt compare`: a table, what differs for sure, and who is unbeaten."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hbxt_compress import show
from hbxt_compress.comparing import Comparison
from hbxt_compress.render.table import size

__all__ = ["comparison", "lines"]


def comparison(found: Comparison, out: Path | None, json_wanted: bool) -> None:
    """Prints it, and writes the page where one was asked for."""
    if out is not None:
        from hbxt_compress.render.comparison import write_comparison

        write_comparison(out, found.to_json())
    if json_wanted:
        return show.as_json(found.to_json())
    metrics = list(found.reports[0].values)
    columns = ("recipe", ">bytes", ">s a clip", *(f">{name}" for name in metrics), "unbeaten")
    rows = [
        (one.name, size(one.bytes_after), f"{one.seconds:.3g}" if one.seconds else "-",
         *(f"{one.values[name]:.4g}" for name in metrics), "yes" if one.unbeaten else "")
        for one in found.reports
    ]  # fmt: skip
    show.rows(f"suite {found.suite}, {found.n_clips} clips", columns, rows, list(lines(found)))
    return None


def lines(found: Comparison) -> Iterator[str]:
    """A line a report: where it differs from the first for sure, then how to read the table."""
    first = found.reports[0].name
    for one in found.reports[1:]:
        told = [
            f"{d.metric} {d.word} by {abs(d.value):.3g} {d.unit}".rstrip()
            + f" ({d.interval[0]:.3g} .. {d.interval[1]:.3g})"
            for d in one.differences
            if d.word != "the same"
        ]
        same = [d.metric for d in one.differences if d.word == "the same"]
        told += [f"not told apart: {', '.join(same)}"] if same else []
        yield f"{one.name} against {first}: {'; '.join(told)}"
    yield (
        "Paired over clips, 95 % intervals, worse is above 0, errors in dB; told apart where "
        "p < 0.05 for all differences together (Holm). Unbeaten in bytes, seconds as sampled and "
        f"{found.quality}."
    )
