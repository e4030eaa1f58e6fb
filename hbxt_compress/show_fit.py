"""What a person sees of `hbxt plan --target`: a table for each clip size, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hbxt_compress import show
from hbxt_compress.fit.answer import Answer, assumptions
from hbxt_compress.fit.cards import GIB
from hbxt_compress.render.table import size

__all__ = ["answers", "lines", "verdict"]

_COLUMNS = ("stage", ">in the file", ">weights", ">values", ">in all", "most at")


def answers(found: Sequence[Answer], json_wanted: bool) -> None:
    """Prints all of them: rows of stages, then what fits and what an estimate says."""
    if json_wanted:
        return show.as_json([one.to_json() for one in found])
    for one in found:
        rows = [
            (stage.name, size(stage.stored_bytes), size(stage.weight_bytes),
             size(stage.value_bytes), size(one.residency.peak(stage)), stage.at)
            for stage in one.residency.stages
        ]  # fmt: skip
        setting = one.found or one.asked
        title = f"{setting.recipe} at {setting.clip}, {one.residency.loading}"
        show.rows(title, _COLUMNS, rows, lines(one))
    return None


def lines(one: Answer) -> Iterator[str]:
    """The verdict and what it rests on."""
    room = one.room
    memory = f"{room.n_bytes / GIB:.4g}"
    if room.most_bytes > room.n_bytes:
        memory += f" to {room.most_bytes / GIB:.4g}"
    yield f"{room.name} ({room.target}), {memory} GB: {verdict(one)}"
    if one.step is not None and one.seconds_per_step is not None:
        yield (
            f"estimate, not measured: {one.seconds_per_step:.3g} s a denoising step at the least "
            f"({one.passes} passes), {one.step.attention_share:.0%} of it attention"
        )
    yield from assumptions(room)


def verdict(one: Answer) -> str:
    """Fits, fits with which changes, or does not."""
    if one.found == one.asked:
        return "fits"
    if one.found is not None:
        return f"fits with {', '.join(one.changes)}"
    worst = one.residency.worst
    lacking = one.residency.peak_bytes - one.room.usable_bytes
    return f"does not fit: {worst.name} takes {size(worst.n_bytes)}, {size(lacking)} too much"
