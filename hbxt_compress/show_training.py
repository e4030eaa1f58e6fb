"""What a person sees of `hbxt plan --distill`: memory of a rank and device hours, by distiller."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hbxt_compress import show
from hbxt_compress.costs.training import TrainingCost

__all__ = ["costs"]

_COLUMNS = (
    ">ranks", ">weights", ">gradients", ">optimizer", ">average", ">gathered", ">kept", ">in all",
    ">kept *", ">in all *",
)  # fmt: skip
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def costs(found: Sequence[TrainingCost], tflops: float | None, json_wanted: bool) -> None:
    """Prints a table for each distiller, a row for each number of ranks, and the device hours."""
    if json_wanted:
        return show.as_json([one.to_json(tflops) for one in found])
    for i, name in enumerate(names := list(dict.fromkeys(one.distiller for one in found))):
        own = [one for one in found if one.distiller == name]
        largest = max(one.bytes(checkpoint=False) for one in own)
        unit, called = next((one for one in _UNITS if largest >= one[0]), _UNITS[-1])
        rows = [_row(one, unit) for one in own]
        title = f"distill {i + 1} of {len(names)}: {name}, {called} of one rank"
        show.rows(title, _COLUMNS, rows, _lines(own, tflops))
    return None


def _row(one: TrainingCost, unit: float) -> tuple[str, ...]:
    parts = ("weights", "gradients", "optimizer", "average")
    held = [sum(getattr(net, part) for net in one.networks) for part in parts]
    plain = (one.gathered, one.activations, one.bytes(checkpoint=False))
    again = (one.activations_checkpointed, one.bytes(checkpoint=True))
    return str(one.n_ranks), *(f"{n / unit:.1f}" for n in (*held, *plain, *again))


def _lines(own: Sequence[TrainingCost], tflops: float | None) -> Iterator[str]:
    first = own[0]
    nets = ", ".join(net.name + (" (trained)" if net.optimizer else "") for net in first.networks)
    yield f"networks: {nets}, each of {first.n_parameters / 1e9:.2f} B parameters"
    yield "kept: activations for the way back; *: with `checkpoint: true` in its `train`"
    yield "a rank also needs its libraries, and what a kernel holds while it runs"
    if tflops is not None:
        plain, again = (first.device_hours(tflops, checkpoint=on) for on in (False, True))
        yield (
            f"device hours at {tflops:g} TFLOP/s each, the teacher's clips included: {plain:.3g}, "
            f"checkpointed {again:.3g}"
        )
    yield from dict.fromkeys(one.problem for one in own if one.problem is not None)
