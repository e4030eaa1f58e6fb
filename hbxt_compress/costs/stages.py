"""Stages: what each step of `hbxt quantize` will do, from a plan, file headers and calibration.

Every function stands for one stage's file and counts what that does, piece by piece. All that was
measured and not counted is in the table below, with how.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hbxt_compress.algorithms import SAMPLER_REFINERS
from hbxt_compress.algorithms.gptq import Gptq
from hbxt_compress.algorithms.recover import Recover
from hbxt_compress.chain import LARGE
from hbxt_compress.costs.counting import Group, Passes
from hbxt_compress.costs.rounding import (
    EAGER_UP_TO,
    PAYLOAD_BYTES,
    blind_bytes,
    blind_work,
    gptq_bytes,
    gptq_work,
    group_of,
    mixing_work,
    numbers,
    statistics_bytes,
    statistics_work,
    transform_work,
)
from hbxt_compress.costs.shown import Batches, ShownModel, alive_bytes, memo_bytes, whole
from hbxt_compress.costs.work import Work
from hbxt_compress.formats import FORMATS
from hbxt_compress.models import Family
from hbxt_compress.plan import LayerPlan, Plan
from hbxt_compress.recipe import Recipe
from hbxt_compress.source import Source
from hbxt_compress.stages.prepare import THIN

__all__ = [
    "BASE_BYTES",
    "StageCost",
    "compiling_s",
    "export_cost",
    "noise_cost",
    "publish_cost",
    "quantize_cost",
    "read_cost",
    "refine_cost",
    "trajectory_cost",
]

# Measured on one thread of an Intel Xeon (AVX-512) at 6.1e5 calls of torch a second, in processor
# time and resident bytes, with Python 3.11, torch 2.13 and diffusers 0.42:
REFERENCE_CALLS = 6.1e5
"""calls a second where the seconds below were measured; they scale with a machine's own"""
_START_S = 6.1  # `hbxt plan fp16`: imports of torch, diffusers and transformers
_EXPORT_FIRST_S = 1.0  # `export` of the reference text encoder, less 6.5 ms a call
_EXPORT_CALL_S = 6.5e-3  # of a traced operation: reference transformer 1139 calls, 7.9 s
# scales.search_scales of int4: before the first one, and each
_COMPILED_COLD_S, _COMPILED_CACHED_S = (10.0, 7.0), (3.3, 1.0)
_GRAPH_BYTES = 165  # of model*.onnx, an operation: the reference model's 2374, 0.39 MB
BASE_BYTES = 500_000_000  # after those imports
_EXPORTER_BYTES = 90_000_000  # more after a first export
_CALL_BYTES = 35_000  # of a graph, an operation
_COMPILER_BYTES = 200_000_000  # more after a first compiled search
# Of the largest tensor while it is exported: float32, and what it is stored as
_EXPORTED_BYTES = 6.0
_DECODE_PASSES = 6  # over a weight: walk.set_weights, and decoding to measure a loss
_STUDENT_PASSES = 12  # over a weight in a step of recovery: decoding there and back
_ADAM_PASSES = 10  # over a number that is tuned
_BACKWARD = 3.0  # a forward and its gradients, in forwards


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """What a stage takes. kept_bytes: of its result; scratch_bytes: beside it until it is done.

    searches: the kinds of scale search that are compiled in it, see `compiling_s`.
    """

    stage: str
    work: Work
    peak_bytes: float
    kept_bytes: float = 0.0
    scratch_bytes: float = 0.0
    searches: frozenset[tuple[object, ...]] = frozenset()


def compiling_s(n_searches: int, *, cached: bool) -> float:
    """Seconds on the reference machine until so many searches are compiled."""
    first_s, each_s = _COMPILED_CACHED_S if cached else _COMPILED_COLD_S
    return first_s + n_searches * each_s if n_searches else 0.0


def read_cost(source: Source, n_cores: int, known_bytes: float) -> StageCost:
    """Imports, and source.locate: every file is read and hashed, as many at once as cores.

    known_bytes: of files whose hashes are remembered.
    """
    sizes = sorted(size for size, _ in source.stamps.values())
    total = max(0.0, sum(sizes) - known_bytes)
    share = max(1 / max(1, min(n_cores, len(sizes))), max(sizes, default=0) / max(1, sum(sizes)))
    work = Work.of(read=total, hash=total * share)
    return StageCost(stage="read", work=work + _fixed(_START_S), peak_bytes=BASE_BYTES)


def trajectory_cost(model: ShownModel, n: int, n_states: int) -> StageCost:
    """stages/calibrate: prompts denoised in full precision, all chained components in memory."""
    parameters = model.family.parameters(model.source)
    held = sum(parameters[one] for one in model.chained)
    work = numbers(held, 2, 4) + model.work("text_encoder", 1) * 2 * n
    peak = float(model.passes("text_encoder").block.peak_bytes)
    for expert, sizes in model.denoised().items():
        for size in set(sizes):
            work += model.work(expert, size) * (n * sizes.count(size))
            peak = max(peak, alive_bytes(model.passes(expert, size)))
    kept = n * n_states * math.prod(model.latent) * 4
    work += _stored(kept)
    peak_bytes = BASE_BYTES + 4 * held + peak
    return StageCost(stage="calibrate", work=work, peak_bytes=peak_bytes, kept_bytes=kept)


def noise_cost(model: ShownModel, n: int, n_states: int, vae_parameters: int) -> StageCost:
    """stages/noise_clips: one pass of the VAE's encoder a clip."""
    encoded = model.encoded()
    kept = n * n_states * math.prod(model.latent) * 4
    work = encoded.work() * n + numbers(vae_parameters, 2, 4) + _stored(kept)
    peak = BASE_BYTES + 4 * vae_parameters + encoded.peak_bytes
    return StageCost(stage="noise_clips", work=work, peak_bytes=peak, kept_bytes=kept)


def quantize_cost(
    recipe: Recipe, plan: Plan, model: ShownModel | None, learnt: tuple[int, int],
    family: Family, source: Source,
) -> StageCost:  # fmt: skip
    """stages/quantize. learnt: prompts that statistics are of, and held-out ones."""
    layers = plan.quantized
    walked = [
        one for one in layers
        if model is not None and plan.calibrated and one.spec.component in family.chained
        and one.spec.kind != "embedding"
    ]  # fmt: skip
    named = {one.spec.name for one in walked}
    blind = [one for one in layers if one.spec.name not in named]
    work, searches = Work(), {_searched(one) for one in layers if one.how is not None}
    kept = float(sum(one.bytes_after for one in layers))
    pieces: dict[tuple[str, int | None], list[LayerPlan]] = {}
    for one in blind:
        work += blind_work(one) + Work.of(move=8 * one.spec.n_weights)
        pieces.setdefault((one.spec.component, one.spec.block), []).append(one)
    peak = max((blind_bytes(piece) for piece in pieces.values()), default=0.0)
    if model is not None and walked:
        for component in model.chained:
            own = [one for one in walked if one.spec.component == component]
            done, alive = _walked(recipe, own, model, component, learnt)
            work, peak = work + done, max(peak, alive)
    work += _stored(kept)
    compiled = frozenset(one for one in searches if one)
    peak += BASE_BYTES + (_COMPILER_BYTES if compiled else 0.0)
    return StageCost(
        stage="quantize", work=work, peak_bytes=peak, kept_bytes=kept, searches=compiled
    )


def refine_cost(
    plan: Plan, model: ShownModel, learnt: tuple[int, int], quantized_bytes: float
) -> StageCost:
    """stages/refine: a component and its quantized copy in memory, tuned by gradients."""
    parameters = model.family.parameters(model.source)
    work, peak = model.work("text_encoder", 1) * (2 * (sum(learnt) + 1)), 0.0
    for component in model.chained:
        if component == "text_encoder":
            continue
        batches = model.batches(component, *learnt)
        n, n_all = parameters[component], sum(one.n for one in batches)
        held_out = sum(one.n_held_out for one in batches)
        forward = model.work(component, batches[0].states) if batches else Work()
        decoded = numbers(n, _STUDENT_PASSES / 2, 4)
        work += numbers(n, 6, 4) + forward * n_all
        alive = 8.0 * n + 4.0 * n
        for one in plan.refine:
            if isinstance(one, Recover):
                tuned = n if one.code_rate > 0 else n // 32
                step = forward * _BACKWARD + numbers(n, _STUDENT_PASSES, 4)
                step += numbers(tuned, _ADAM_PASSES, 4)
                work += step * one.n_steps + (forward + decoded) * 2 * held_out
                written = batches[0].passes.block.written if batches else 0.0
                alive += written * _n_blocks(model, component) + 16.0 * tuned
            elif isinstance(one, tuple(SAMPLER_REFINERS.values())):
                work += (forward + decoded) * n_all
        peak = max(peak, alive)
    kept = quantized_bytes * 1.02  # and biases, norms and tables that were tuned
    return StageCost(
        stage="refine",
        work=work + _stored(kept),
        peak_bytes=BASE_BYTES + peak,
        kept_bytes=kept,
    )


def export_cost(
    plan: Plan, family: Family, source: Source, calls: dict[str, int], traced: dict[str, int]
) -> StageCost:
    """stages/export: graphs traced without values, then every tensor read, packed and written.

    calls: component -> operations of its graphs. traced: those of the blocks that are traced.
    """
    sizes = plan.components()
    after = float(sum(one["after"] for one in sizes.values()))
    after += _GRAPH_BYTES * sum(calls.values())
    seconds = _EXPORT_FIRST_S + _EXPORT_CALL_S * sum(traced.values())
    # what is not quantized is read as float32, checked and stored in its format
    kept = float(sum(one.bytes_before for one in plan.layers if not one.quantized))
    work = _fixed(seconds) + Work.of(move=8 * kept) + _stored(after)
    largest = max((one.spec.n_weights for one in plan.layers if one.spec.kind != "embedding"),
                  default=0)  # fmt: skip
    peak = BASE_BYTES + _EXPORTER_BYTES + _CALL_BYTES * max(calls.values(), default=0)
    return StageCost(
        stage="export",
        work=work,
        peak_bytes=peak + _EXPORTED_BYTES * largest,
        kept_bytes=after,
    )


def publish_cost(artifact_bytes: float) -> StageCost:
    """store.publish: the copy in --out."""
    work = Work.of(write=artifact_bytes, move=2 * artifact_bytes)
    return StageCost(stage="copy", work=work, peak_bytes=BASE_BYTES, kept_bytes=artifact_bytes)


def _walked(
    recipe: Recipe,
    layers: Sequence[LayerPlan],
    model: ShownModel,
    component: str,
    learnt: tuple[int, int],
) -> tuple[Work, float]:
    """stages/walk of one component, both models side by side; and the bytes alive at its peak."""
    batches = model.batches(component, *learnt)
    if not batches:
        return Work(), 0.0
    parameters = model.family.parameters(model.source)[component]
    products = "coarse" if parameters > LARGE else "float32"
    n_blocks, bits = _n_blocks(model, component), _block_parameters(model, component)
    work, stats_peak, rounding_peak = Work(), 0.0, 0.0
    for batch in batches:
        for piece, times in whole(batch.passes, n_blocks):
            work += piece.work(products) * (2 * batch.n * times)
    # both models read a block's weights, what is rounded is decoded, and all is checked before
    work += numbers(bits * n_blocks, 4, 4)
    named = {one.spec.module: one for one in layers}
    firsts = {one.spec.block for one in layers if one.spec.block is not None}
    large = products == "coarse"
    for block in sorted(firsts):
        own = [one for one in layers if one.spec.block == block]
        work += batches[0].passes.block.work(products)
        for i, group in _groups(batches[0].passes, block):
            members = [named[module] for module in group if module in named]
            needs = {one.need for one in members} - {None}
            if needs:
                covariance = "covariance" in needs
                for batch in batches:
                    seen: Group = batch.passes.groups[i]
                    before = replace(seen.before, flops=0.0) if large else seen.before  # a Memo's
                    work += before.work(products) * (2 * batch.n)
                    rows = batch.n * seen.n_rows * (batch.share if seen.n_rows else 1.0)
                    work += statistics_work(
                        rows, seen.n_in, products=products, covariance=covariance
                    )
                n_in = batches[0].passes.groups[i].n_in
                stats_peak = max(stats_peak, statistics_bytes(n_in, covariance=covariance))
                if covariance and learnt[1]:
                    work += transform_work(recipe.prepare, members)
            for one in members:
                n_out, n_in = one.spec.shape[0], one.spec.n_weights // one.spec.shape[0]
                if isinstance(one.how, Gptq):
                    judged = learnt[1] > 0
                    work += gptq_work(one.how, n_out, n_in, group_of(one), judged=judged)
                    rounding_peak = max(rounding_peak, gptq_bytes(n_out, n_in))
                elif one.how is not None:
                    work += blind_work(one)
                work += numbers(one.spec.n_weights, _DECODE_PASSES, 4)
        mixed = _mixed(recipe, own, model, component, block, batches, products)
        if large and mixed.amounts:  # what the full model ran is run again without the mixing
            for batch in batches:
                work += batch.passes.groups[-1].before.work(products) * batch.n
        work += mixed
    states = sum(4 * one.n * one.passes.hidden_bytes for one in batches)
    # Steps and prompts recur, and each is held once: as many at most as one of the branches has
    shared = sum(one.n * one.passes.shared_bytes for one in batches)
    memo = sum(2 * one.n * memo_bytes(one.passes) for one in batches) if large else 0.0
    passing = max(alive_bytes(one.passes) for one in batches)
    loose = max(0.0, parameters - bits * n_blocks)
    tables = _table_parameters(model, component)
    each = 4.0 if products == "coarse" else 8.0  # bytes of a weight in both models
    held = each * bits + 8.0 * max(0.0, loose - tables) + states + shared + memo
    block_payload = PAYLOAD_BYTES * bits
    return work, held + block_payload + max(passing, rounding_peak, stats_peak)


def _mixed(
    recipe: Recipe, own: Sequence[LayerPlan], model: ShownModel, component: str, block: int,
    batches: Sequence[Batches], products: str,
) -> Work:  # fmt: skip
    """prepare.mix of a block: one thinned run with statistics of all pairs' ends, and choosing."""
    named = {one.spec.module: one for one in own if one.prepared}
    work, ends = Work(), dict[str, LayerPlan]()
    for pair in model.family.pairs(model.source, component, block):
        if pair.first in named and pair.second in named:
            first, second = named[pair.first], named[pair.second]
            found = mixing_work(recipe.prepare, first, second, pair.joint)
            if found.amounts:
                work += found
                ends |= {pair.first: first, pair.second: second}
    for batch in batches if ends else ():
        learnt = batch.n - batch.n_held_out
        n = -(-learnt // THIN) + batch.n_held_out
        work += batch.passes.block.work(products) * (2 * n)
        for i, group in _groups(batch.passes, block):
            for module in group:
                if module in ends:
                    seen = batch.passes.groups[i]
                    rows = n * seen.n_rows * batch.share
                    work += statistics_work(
                        rows, seen.n_in, products=products, covariance=True, cross=False
                    )
    return work


def _groups(passes: Passes, block: int) -> Iterator[tuple[int, list[str]]]:
    """The index of each group of linears, and their module paths in a block."""
    for i, group in enumerate(passes.groups):
        yield i, [_in_block(module, block) for module in group.modules]


def _in_block(module: str, block: int) -> str:
    """The path of block 0's module in another block: the first path part that is 0."""
    parts = module.split(".")
    parts[parts.index("0")] = str(block)
    return ".".join(parts)


def _n_blocks(model: ShownModel, component: str) -> int:
    specs = model.family.layers(model.source)
    return len({s.block for s in specs if s.component == component and s.block is not None})


def _block_parameters(model: ShownModel, component: str) -> float:
    specs = model.family.layers(model.source)
    return float(
        sum(one.n_weights for one in specs if one.component == component and one.block == 0)
    )


def _table_parameters(model: ShownModel, component: str) -> float:
    specs = model.family.layers(model.source)
    return float(
        sum(
            one.n_weights
            for one in specs
            if one.component == component and one.kind == "embedding" and one.block is None
        )
    )


def _searched(layer: LayerPlan) -> tuple[object, ...]:
    """What code its scale search compiles; () if it has too few inputs to be compiled."""
    n_in = layer.spec.n_weights // layer.spec.shape[0]
    if n_in <= EAGER_UP_TO or getattr(layer.how, "search", "") == "none":
        return ()
    fmt, weighted = FORMATS[layer.weights], layer.how is not None and layer.how.need is not None
    return (*fmt.n_levels, fmt.asymmetric, getattr(layer.how, "norm", 2.0), weighted)


def _stored(n_bytes: float) -> Work:
    """store.Work.piece: written, flushed, read again and hashed."""
    return Work.of(write=n_bytes, hash=n_bytes, move=2 * n_bytes)


def _fixed(seconds: float) -> Work:
    """Seconds of the reference machine, as calls."""
    return Work.of(call=seconds * REFERENCE_CALLS)
