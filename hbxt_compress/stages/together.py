"""Together: statistics of one input, whose rows lie in several processes, as if one had seen all.

All subtract the same shift from their rows, so that nothing but the order of summation differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hbxt_compress.ranks import Ranks
from hbxt_compress.stats import LayerStats

__all__ = ["agreed_shifts", "sum_up"]


def agreed_shifts(
    ranks: Ranks, source: int, first: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """By module the mean of the first rows that rank `source` has of its input, float64 I.

    first: a rank's own first rows, ... I, or None.
    """
    means: dict[str, Tensor] = {}
    if ranks.rank == source and first is not None:
        means = {
            module: rows.detach().reshape(-1, rows.shape[-1]).float().double().mean(0).cpu()
            for module, rows in first.items()
        }
    return ranks.broadcast(means, source)


def sum_up(ranks: Ranks, stats: LayerStats, places: Sequence[tuple[bool, int]]) -> None:
    """Makes the statistics of one rank, in place, those of all; their shifts are equal.

    places: where each of the tensors that were added stands among those of all ranks.
    """
    if ranks.world == 1:
        return
    counts = ranks.sum(torch.tensor([stats.n, stats.weight], dtype=torch.float64))
    stats.n, stats.weight = int(counts[0]), float(counts[1])
    for sums in (
        stats.total_x_I,
        stats.total_y_I,
        stats.squares_y_I,
        stats.products_yy_II,
        stats.products_xy_II,
    ):
        if sums is not None:
            ranks.sum(sums)
    ranks.largest(stats.absmax_I)
    device = stats.shift_I.device
    own = [(place, rows.cpu()) for place, rows in zip(places, stats.examples, strict=True)]
    every = [one for part in ranks.gathered(own) for one in part]
    stats.examples = [rows.to(device) for _, rows in sorted(every, key=lambda one: one[0])]
