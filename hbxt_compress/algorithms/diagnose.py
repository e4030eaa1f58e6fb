"""How much a rounded weight lost, how much was to be gained, and how far the limit is.

Losses here are those of one layer alone: its quantized input y stands for its input x too. A weight
that was corrected for an upstream error (gptq's `correct`) is charged for the correction.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hbxt_compress.algorithms.objective import fitted_spectrum
from hbxt_compress.quantized import Loss
from hbxt_compress.stats import LayerInputs, LayerStats

__all__ = ["measure"]

# Of the mean variance. Directions weaker than about 2^(-2 R), 3e-3 at 4.25 bits, get no bits where
# bits are spent best (reverse water-filling), so their exact size must not move the limit.
_DAMPING = 1e-3
_FLOOR = 1e-30  # keeps a perfect rounding's logarithm finite


def measure(
    weight_OI: Tensor,
    decoded_OI: Tensor,
    shift_O: Tensor | None,
    inputs: LayerInputs | None,
    bits_per_weight: float,
    target_OI: Tensor | None = None,
) -> Loss:
    """The loss of rounding weight_OI to decoded_OI with shift_O added to the bias.

    target_OI: what was really rounded, a weight corrected for upstream errors; the distance to the
    limit is its, for a correction is no rounding error.

    Relative to W E[y y^T] W^T. With covariances the error is (W - Q) Cov(y) (W - Q)^T plus the
    square of its mean, which is W E[x] - Q E[y] - shift, or (W - Q) E[y] where there is no shift.
    With moments only, E[y y^T] is taken as diagonal; without inputs, as the identity. In dB, with d
    the pivots of the covariance (columns by falling variance) damped by 1e-3 of its mean diagonal,
    or as the rounder damped it where it is too large to be factored twice:
    G1 = mean h / mean d, G2 = mean d / geomean d, and the limit is that of Gaussian weights,
    O I var(W) geomean(d) 2^(-2 bits). Inputs that never vary are left out.

    Raises:
        ValueError: shapes do not match.
    """
    if weight_OI.shape != decoded_OI.shape:
        shapes = f"{tuple(weight_OI.shape)} and {tuple(decoded_OI.shape)}"
        raise ValueError(f"weights of shapes {shapes} cannot be compared")
    products_II = None if inputs is None else inputs.fit.products_yy_II
    dtype = torch.float64 if products_II is None else products_II.dtype
    weight_OI, decoded_OI = weight_OI.to(dtype), decoded_OI.to(dtype)
    lost_OI = weight_OI - decoded_OI
    if inputs is None:
        lost, kept = float(lost_OI.square().sum()), float(weight_OI.square().sum())
        return Loss(error=_ratio(lost, kept))
    shift_O = None if shift_O is None else shift_O.double()
    held = inputs.held_out if inputs.held_out and inputs.held_out.weight > 0 else None
    scattered, shifted, kept = _energies(weight_OI, decoded_OI, shift_O, inputs.fit)
    error, held_out = _ratio(scattered + shifted, kept), None
    if held is not None:
        *lost_there, kept = _energies(weight_OI, decoded_OI, shift_O, held)
        held_out = _ratio(sum(lost_there), kept)
    if inputs.fit.products_yy_II is None:
        return Loss(error=error, held_out=held_out)
    centred = shift_O is not None
    loss = scattered if centred else scattered + shifted
    if target_OI is not None:
        rounded_OI = target_OI.to(dtype) - decoded_OI
        loss = float(inputs.fit.energy(rounded_OI, centred=centred).sum())
    spectrum = fitted_spectrum(inputs, _DAMPING, centred=centred)
    alive_I = ~spectrum.dead_I
    if not bool(alive_I.any()):
        return Loss(error=error, held_out=held_out)
    pivots_I, variance_I = spectrum.pivots_I[alive_I], spectrum.variance_I[alive_I]
    log_geomean = float(pivots_I.log().mean())
    mean_pivot = float(pivots_I.mean())
    spread = float(weight_OI[:, alive_I].square().mean())
    n_weights = weight_OI.shape[0] * int(alive_I.sum())
    geomean_db = log_geomean * _db(math.e)
    limit_db = _db(n_weights * spread) + geomean_db - 2 * bits_per_weight * _db(2)
    return Loss(
        error=error,
        held_out=held_out,
        g1_db=_db(float(variance_I.mean())) - _db(mean_pivot),
        g2_db=_db(mean_pivot) - geomean_db,
        limit_db=_db(loss) - limit_db,
    )


def _energies(
    weight_OI: Tensor, decoded_OI: Tensor, shift_O: Tensor | None, stats: LayerStats
) -> tuple[float, float, float]:
    """On one set of rows: what is lost around its mean, the mean's square, and what there was."""
    lost_OI = weight_OI - decoded_OI
    mean_x_I, mean_y_I = stats.mean_x_I.to(lost_OI), stats.mean_y_I.to(lost_OI)
    if shift_O is None:
        mean_O = lost_OI @ mean_y_I
    else:
        mean_O = weight_OI @ mean_x_I - decoded_OI @ mean_y_I - shift_O.to(lost_OI)
    mean = float(mean_O.double().square().sum())
    if stats.products_yy_II is not None:
        scattered = float(stats.energy(lost_OI, centred=True).sum())
        return scattered, mean, float(stats.energy(weight_OI, centred=False).sum())
    square_I = stats.mean_square_I
    kept = float(weight_OI.square().sum(0) @ square_I)
    if shift_O is None:
        return float(lost_OI.square().sum(0) @ square_I), 0.0, kept
    variance_I = (square_I - stats.mean_y_I.square()).clamp_min(0)
    return float(lost_OI.square().sum(0) @ variance_I), mean, kept


def _ratio(lost: float, kept: float) -> float:
    """lost / kept; zero where nothing was there to lose, infinite where only the loss is there."""
    lost, kept = max(lost, 0.0), max(kept, 0.0)
    if kept == 0:
        return 0.0 if lost == 0 else math.inf
    return lost / kept


def _db(ratio: float) -> float:
    return 10 * math.log10(max(ratio, _FLOOR))
