"""Ranging: what it takes to find how large a text encoder's numbers get, see stages/ranges.py."""

from __future__ import annotations

from hbxt_compress.costs.rounding import numbers
from hbxt_compress.costs.shown import Forwards, whole
from hbxt_compress.costs.stages import BASE_BYTES, StageCost
from hbxt_compress.models import Family
from hbxt_compress.source import Source
from hbxt_compress.stages.ranges import N_PROMPTS

__all__ = ["ranges_cost"]


def ranges_cost(family: Family, source: Source, component: str, n_prompts: int) -> StageCost:
    """The stage: each block's weights are read once, then every prompt passes it."""
    n = min(N_PROMPTS, n_prompts) + 1
    passes = Forwards(family, source, family.latent_shape(source)).passes(component)
    own = [one for one in family.layers(source) if one.component == component]
    blocks = [one for one in own if one.block is not None]
    work = numbers(sum(one.n_weights for one in blocks), 2, 4)
    for piece, times in whole(passes, len({one.block for one in blocks})):
        work += piece.work() * (n * times)
    block = 4 * sum(one.n_weights for one in blocks if one.block == 0)
    states = n * (passes.hidden_bytes + passes.shared_bytes)
    peak = BASE_BYTES + block + states + passes.block.peak_bytes
    return StageCost(stage="ranges", work=work, peak_bytes=peak)
