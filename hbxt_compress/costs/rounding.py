"""Rounding: the work and the memory of gathering a layer's statistics and of rounding it by them.

Formulas count what algorithms/ and stats.py do with a weight O I, by the function that does it; I I
is a matrix of its inputs. Lower orders are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hbxt_compress.algorithms import AnyPreparer
from hbxt_compress.algorithms.gptq import Gptq
from hbxt_compress.algorithms.hadamard import Hadamard
from hbxt_compress.algorithms.permute import Permute
from hbxt_compress.algorithms.rotate import Rotate
from hbxt_compress.algorithms.scale import Scale
from hbxt_compress.algorithms.smooth_quant import SmoothQuant
from hbxt_compress.costs.counting import REUSED_BYTES
from hbxt_compress.costs.work import Kind, Work
from hbxt_compress.formats import FORMATS
from hbxt_compress.plan import LayerPlan
from hbxt_compress.stats import WIDEST

__all__ = [
    "EAGER_UP_TO",
    "PAYLOAD_BYTES",
    "Precision",
    "blind_bytes",
    "blind_work",
    "gptq_bytes",
    "gptq_work",
    "group_of",
    "mixing_work",
    "numbers",
    "precision_of",
    "price_work",
    "search_work",
    "statistics_bytes",
    "statistics_work",
    "transform_work",
]

_FLOAT64_TO = 2048  # inputs, as in stats.py
EAGER_UP_TO = 1024  # inputs, as in algorithms/scales.py
_COLUMNS_AT_ONCE = 1024  # of symmetric matrices, as in stats.py
_JUDGED_ROWS, _ROWS_AT_ONCE = 128, 2048  # as in algorithms/gptq.py
_SAMPLED, _LEAST_ROWS = 1 << 16, 16  # weights and rows, as in algorithms/choose.py
_SIZE_PASSES = 4  # over a weight in scale.input_scale: finite, sizes, float64, squares
# Beside the search, rounding to nearest takes 12 ns a weight (levels, payload, decoding, losses)
# where 27 GB/s are moved: Rtn of 680 x 3072, int4-g128, one thread.
_NEAREST_BYTES = 330
# Rounding a block blindly leaves a byte a weight, and half of one packed; see quantized.save_block
PAYLOAD_BYTES = 1.5
# Of the largest tensor while it is packed: codes and two temporaries of int16
_PACKING_BYTES = 3.0
# Passes of stats.LayerStats.add over the rows of a side: float64 copies, shifts, squares, sums.
_STATISTICS_BYTES = 100
# I I matrices alive at the peak of gptq.Gptq.round, counted in its code: statistics of both sides
# (4), moments (2), the judge's (2), three problems of 3, the last one's copy; without E[x y^T] and
# held-out rows: statistics, the objective, its factor, and a quarter gathered in a descent.
_MATRICES, _MATRICES_BLIND = 18, 3.25
# A run of compiled columns (algorithms/runs.py) takes 90 us where single steps take 500, of which
# what lies around it is about half: 16 of 2048 rows, two threads.
_COMPILED_RUNS = 0.5
_ROW_ARRAYS = 10  # of 2048 rows, in feedback.feed_back and polish.descend


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """What statistics of so many inputs are summed and solved in."""

    product: Kind
    factor: Kind
    n_bytes: int


def precision_of(n_in: int) -> Precision:
    """Float64 to 2048 inputs, float32 beyond."""
    if n_in <= _FLOAT64_TO:
        return Precision(product="float64", factor="factor64", n_bytes=8)
    return Precision(product="float32", factor="factor32", n_bytes=4)


def numbers(n: float, passes: float, n_bytes: int) -> Work:
    """Some passes over an array of n numbers, each with a result of that size."""
    moved = n * passes * n_bytes
    return Work.of(move=2 * moved, fresh=moved if n * n_bytes > REUSED_BYTES else 0.0)


def search_work(n_weights: float, n_in: int) -> Work:
    """scales.search_scales of one weight."""
    if n_in <= EAGER_UP_TO:
        return Work.of(search_eager=n_weights)
    return Work.of(search=n_weights)


def blind_bytes(piece: Sequence[LayerPlan]) -> float:
    """Alive while a piece's weights are rounded blindly and packed; a table's rows come packed."""
    tables = sum(one.bytes_after for one in piece if one.spec.kind == "embedding")
    others = [one.spec.n_weights for one in piece if one.spec.kind != "embedding"]
    return tables + sum(others) * PAYLOAD_BYTES + max(others, default=0) * _PACKING_BYTES


def blind_work(layer: LayerPlan) -> Work:
    """by_rows: rounding to nearest, without inputs."""
    how, n = layer.how, layer.spec.n_weights
    work = Work.of(move=_NEAREST_BYTES * n, call=200)
    if getattr(how, "search", "mse") == "none":
        return work
    return work + search_work(n, n // layer.spec.shape[0])


def statistics_work(
    n_rows: float, n_in: int, *, products: str, covariance: bool, cross: bool = True
) -> Work:
    """stats.LayerStats.add of rows of both models; products: the kind its float32 ones are.

    cross: E[x y^T] is wanted, too.
    """
    work = numbers(n_rows * n_in, _STATISTICS_BYTES / 8, 4)
    if covariance:
        work += Work.of(**{products: 2.0 * n_rows * _triangle(n_in)})
        if cross and n_in <= WIDEST:
            work += Work.of(**{products: 2.0 * n_rows * n_in**2})
    return work


def statistics_bytes(n_in: int, *, covariance: bool) -> float:
    """Of one layer's statistics on both sides; held-out rows are not kept of wide layers."""
    n_products = 0 if not covariance else 4 if n_in <= WIDEST else 1
    return n_products * float(n_in) ** 2 * precision_of(n_in).n_bytes


def gptq_work(how: Gptq, n_out: int, n_in: int, group: int | None, *, judged: bool) -> Work:
    """gptq.Gptq.round and diagnose.measure of one weight. judged: there are held-out rows."""
    kind, blind = precision_of(n_in), n_in > WIDEST
    judged = judged and not blind
    n_dampings, n_shares = len(how.damping), 1 if blind else len(how.correct)
    chosen = judged and n_dampings * n_shares > 1
    square, whole = float(n_in) ** 2, float(n_out) * n_in**2
    # _choose: a problem a damping, an evaluation of some rows for each damping, share, and again;
    # one of them, or the only one of wide layers, is measure's
    n_factors = 1 + (n_dampings if judged else 0 if blind else 1)
    work = Work.of(**{kind.factor: n_factors * n_in**3 / 3})
    work += numbers(square, 6 * n_factors + 14, kind.n_bytes)
    if chosen:
        rows = min(n_out, _JUDGED_ROWS)
        once = Work.of(**{kind.product: 8.0 * rows * square, kind.factor: 2.0 * rows * square})
        work += (once + _feedback(rows, n_in, kind)) * (n_dampings + n_shares)
    # target: two triangular systems of I I, and W times their solution
    if not blind and how.correct != (0.0,):
        work += Work.of(**{kind.product: 2 * whole, kind.factor: 2 * square * n_in})
    work += search_work(n_out * n_in, n_in)
    form = Work.of(**{kind.product: 2.0 * n_out * _triangle(n_in)})  # e H e^T of all rows
    # Of many inputs a second round of polishing is rare: gptq._LEAST_GAIN
    n_rounds = how.polish if kind.n_bytes == 8 else min(1, how.polish)
    work += form
    work += _feedback(n_out, n_in, kind) * (1 + (min(1, n_rounds) if how.refit else 0))
    n_groups = n_in // (group or n_in)
    # refit_scales: a product (in the first round of what feedback left, half as much), another
    # half, and for each group an array of O I; O systems of G scales
    refit = Work.of(**{kind.product: 3 * whole, "factor64": n_out * n_groups**3 * 2 / 3})
    refit += numbers(min(n_out, _ROWS_AT_ONCE) * n_in, 2, kind.n_bytes) * (
        n_groups * max(1.0, n_out / _ROWS_AT_ONCE)
    )
    work += ((refit if how.refit else Work()) + _descent(n_out, n_in, kind)) * n_rounds
    # measure: what was lost and what there was, on both sides, and of a corrected target
    return work + form * (5 if judged else 2)


def gptq_bytes(n_out: int, n_in: int) -> float:
    """Alive at the peak of rounding one weight."""
    n = _MATRICES if n_in <= WIDEST else _MATRICES_BLIND
    n_bytes = precision_of(n_in).n_bytes
    rows = min(n_out, _ROWS_AT_ONCE)
    return n_bytes * (n * float(n_in) ** 2 + _ROW_ARRAYS * rows * n_in + 2.0 * n_out * n_in)


def price_work(n_in: int) -> Work:
    """choose._Price.of: a factor and two triangular systems of I I."""
    kind = precision_of(n_in)
    return Work.of(**{kind.factor: n_in**3 * (1 / 3 + 2)}) + numbers(n_in**2, 15, kind.n_bytes)


def mixing_work(
    preparers: Sequence[AnyPreparer], first: LayerPlan, second: LayerPlan, joint: str
) -> Work:
    """choose.choose_mixing of a pair: its candidates' estimates, each some thousand weights.

    A turn has a price of its own for each candidate, an order that of the features themselves.
    """
    work = Work()
    for one in preparers:
        if not isinstance(one, (Rotate, Permute)) or joint not in one.JOINTS:
            continue
        width = second.spec.shape[1]
        if width > one.widest:
            continue
        n_tried = 3 if isinstance(one, Permute) else len(one.kinds) + 1
        if not work.amounts:
            work += price_work(first.spec.shape[1]) + price_work(width)
        if isinstance(one, Rotate):
            turned = Work.of(**{precision_of(width).product: 4.0 * width**3})
            work += (price_work(width) + turned) * n_tried
        work += Work.of(search_eager=2 * _SAMPLED) * n_tried
    return work


def transform_work(preparers: Sequence[AnyPreparer], members: Sequence[LayerPlan]) -> Work:
    """choose.choose_transform for the layers of one input: an estimate for each candidate.

    A scaling also looks at all weights for its largest columns; a rotation has a price of its own.
    """
    n_in = members[0].spec.n_weights // members[0].spec.shape[0]
    looked_at, work = Work(), Work()
    for one in members:
        looked_at += numbers(one.spec.n_weights, _SIZE_PASSES, 8)
    n_tried = 0
    for preparer in preparers:
        if isinstance(preparer, Scale):
            n_scales = len(preparer.alphas) * len(preparer.betas)
            n_tried += n_scales
            work += looked_at * n_scales
        elif isinstance(preparer, SmoothQuant):
            n_tried += len(preparer.alphas)
            work += looked_at * len(preparer.alphas)
        elif isinstance(preparer, Hadamard):
            n_blocks = len([block for block in preparer.blocks if n_in % block == 0])
            n_turns = n_blocks * (1 + len(preparer.scales))
            n_tried += n_turns
            work += looked_at * len(preparer.scales) + price_work(n_in) * n_turns
    if not n_tried:
        return Work()
    sampled = sum(min(one.spec.n_weights, max(_SAMPLED, _LEAST_ROWS * n_in)) for one in members)
    estimate = Work.of(search_eager=sampled, call=200 * len(members))
    return work + price_work(n_in) + estimate * (1 + n_tried)


def _feedback(n_out: int, n_in: int, kind: Precision) -> Work:
    """feedback.feed_back: products above the diagonal, and a loop over the columns."""
    return Work.of(**{kind.product: float(n_out) * n_in**2}, **_loop("feed", n_out, n_in, kind))


def _descent(n_out: int, n_in: int, kind: Precision) -> Work:
    """polish.descend: the gradient, products below the diagonal, and a loop over the columns."""
    products = {kind.product: 3.0 * n_out * n_in**2}
    work = Work.of(**products, **_loop("descend", n_out, n_in, kind))
    return work + numbers(n_in**2, 2, kind.n_bytes)


def _loop(what: str, n_out: int, n_in: int, kind: Precision) -> Mapping[str, float]:
    """Columns, and numbers of columns, that are taken one by one."""
    wide = kind.n_bytes / 4 if n_in <= _FLOAT64_TO else _COMPILED_RUNS
    passes = -(-n_out // _ROWS_AT_ONCE)
    columns = n_in * passes * (1.0 if n_in <= _FLOAT64_TO else _COMPILED_RUNS)
    return {f"{what}_column": columns, f"{what}_number": wide * n_in * n_out}


def _triangle(n: int) -> float:
    """Numbers of the upper triangle of n n, as products of some columns at a time make it."""
    n_whole, rest = divmod(n, _COLUMNS_AT_ONCE)
    return _COLUMNS_AT_ONCE * (n * n_whole - _COLUMNS_AT_ONCE * n_whole * (n_whole - 1) / 2) + (
        float(rest) ** 2
    )


def group_of(layer: LayerPlan) -> int | None:
    """Weights that share a scale along the inputs; None: a whole row."""
    return FORMATS[layer.weights].group
