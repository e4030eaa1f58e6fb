"""Probing: what measuring a budget's damages will take, see stages/probe.py.

Every component is passed there and back with one block in memory; hidden states of all blocks lie
on the disk meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hbxt_compress.chain import LARGE
from hbxt_compress.costs.rounding import (
    numbers,
    precision_of,
    price_work,
    search_work,
    statistics_work,
)
from hbxt_compress.costs.shown import Batches, ShownModel, whole
from hbxt_compress.costs.stages import BASE_BYTES, StageCost
from hbxt_compress.costs.work import Work
from hbxt_compress.plan import FULL_PRECISION, Choice
from hbxt_compress.stages.probe import (
    LEAST_SAMPLES,
    N_HELD_OUT,
    N_PROMPTS,
    N_PROMPTS_OF_LARGE,
)
from hbxt_compress.stages.sensitivity import SLICE, WEIGHTS, WHOLE

__all__ = ["probe_cost"]

_BACKWARD = 2.0  # gradients of a block's output, in forwards of its products
_MATRICES = 12  # I I alive in choose._Price.of, statistics of both sides (4) among them


def probe_cost(model: ShownModel, choices: Sequence[Choice], n_prompts: int) -> StageCost:
    """The stage, for weights whose formats a budget decides about."""
    parameters = model.family.parameters(model.source)
    large = any(n > LARGE for n in parameters.values())
    n = min(N_PROMPTS_OF_LARGE if large else N_PROMPTS, n_prompts)
    held_out = min(N_HELD_OUT, n - 1)
    work, peak, scratch = Work(), 0.0, 0.0
    for component in model.chained:
        own = [one for one in choices if one.spec.component == component]
        batches = model.batches(component, n - held_out, held_out)
        n_blocks = len(
            {s.block for s in model.family.layers(model.source)
             if s.component == component and s.block is not None}
        )  # fmt: skip
        states = sum(one.n * one.states for one in batches)
        if not states:
            continue
        n_samples = (
            1
            if component == "text_encoder"
            else math.ceil((1 if large else LEAST_SAMPLES) / states)
        )
        n_samples = 4 if component == "text_encoder" else n_samples  # shares of all samples
        coarse = parameters[component] > LARGE
        done, alive = _toured(batches, own, n_blocks, n_samples, "coarse" if coarse else "float32")
        bits = sum(one.spec.n_weights for one in own if one.spec.block == 0)
        hidden = float(sum(one.n * one.passes.hidden_bytes for one in batches))
        shared = float(sum(one.n * one.passes.shared_bytes for one in batches))
        work += done + numbers(2 * bits * n_blocks, 2, 4)
        work += Work.of(write=hidden * (n_blocks + 2), move=4 * hidden * (n_blocks + 2))
        # back.checkpoint after each block: gradients of the hidden states and of what is shared
        work += Work.of(write=n_samples * (hidden + shared) * n_blocks)
        held = (2.0 if coarse else 4.0) * bits
        peak = max(peak, held + alive + hidden + shared + n_samples * (hidden + shared))
        scratch += hidden * (n_blocks + 2) + n_samples * (hidden + shared)
    return StageCost(stage="probe", work=work, peak_bytes=BASE_BYTES + peak, scratch_bytes=scratch)


def _toured(
    batches: Sequence[Batches],
    choices: Sequence[Choice],
    n_blocks: int,
    n_samples: int,
    products: str,
) -> tuple[Work, float]:
    """Work there and back, and the bytes alive beside weights and states."""
    work, alive = Work(), 0.0
    for batch in batches:
        for piece, times in whole(batch.passes, n_blocks):
            back = 1 + _BACKWARD * n_samples
            work += piece.work(products) * (batch.n * times * (1 + back))
        # a block's results are kept for its gradients, which are as large
        alive = max(alive, 2.0 * batch.passes.block.written)
    named = {one.spec.module: one for one in choices if one.spec.block == 0}
    for i, group in enumerate(batches[0].passes.groups):
        members = [named[module] for module in group.modules if module in named]
        if not members:
            continue
        size = group.n_in if group.n_in <= WHOLE else SLICE
        n_slices = -(-group.n_in // size)
        block = Work()
        for batch in batches:
            rows = batch.n * batch.passes.groups[i].n_rows * batch.share
            seen = statistics_work(rows, size, products=products, covariance=True, cross=False)
            block += seen * n_slices
            for one in members:
                gradients = 2.0 * rows * n_samples * one.spec.n_weights
                block += Work.of(float32=gradients)
                n_states = batch.n * batch.states * n_samples
                block += numbers(one.spec.n_weights, 2, 4) * n_states
        block += price_work(size) * n_slices
        for one in members:
            some = min(one.spec.n_weights, WEIGHTS // group.n_in * group.n_in)
            n_formats = len([name for name in one.formats if name not in FULL_PRECISION])
            block += search_work(some, group.n_in) * n_formats
        work += block * n_blocks
        matrices = _MATRICES * float(size) ** 2 * precision_of(size).n_bytes
        alive = max(alive, matrices)
    return work, alive
