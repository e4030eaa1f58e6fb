"""What a rounder minimises: the error of a layer's output on the inputs the quantized net sees.

With x the input in full precision and y the one in the partly quantized net, over all Q
E||W x - Q y - b||^2 = tr((Q - T) H (Q - T)^T) + const, where C = Cov(x, y), H = Cov(y),
T = W C H^-1 and b = W E[x] - Q E[y]; without a bias, C and H are second moments and b = 0. H and C
are damped throughout: they are estimated from few and related rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hbxt_compress.algorithms.feedback import Factor, factorise
from hbxt_compress.stats import LayerInputs, LayerStats, quadratic

__all__ = [
    "Judge",
    "Moments",
    "Order",
    "Problem",
    "ScaleWeights",
    "Spectrum",
    "fitted",
    "fitted_problem",
    "fitted_spectrum",
]

Order = Literal["activation", "natural"]
ScaleWeights = Literal["pivots", "diagonal", "ones"]

_DEAD = 1e-8  # of the median variance: an input that hardly varies teaches nothing
_DEAD_SHARE = 1e-6  # of the mean variance, which dead inputs are given to break ties
_RETRIES = 6  # of ten times the damping each


@dataclass(frozen=True, slots=True, kw_only=True)
class Spectrum:
    """By input: pivots of the factor, the diagonal of H, and which inputs hardly vary."""

    pivots_I: Tensor
    variance_I: Tensor
    dead_I: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One damped objective, factored. variance_I: the diagonal of hessian_II.

    Float64, or float32 if that is what the statistics are; cross_II: None if they lack it.

    damping: the share of the mean variance that was really added, after retries. dead_I: inputs
    that hardly vary.
    """

    hessian_II: Tensor
    cross_II: Tensor | None
    factor: Factor
    damping: float
    dead_I: Tensor

    @property
    def variance_I(self) -> Tensor:
        return self.hessian_II.diagonal()

    @property
    def spectrum(self) -> Spectrum:
        variance_I = self.variance_I.clone()  # not a view of the matrix, which may go
        return Spectrum(pivots_I=self.factor.pivots_I, variance_I=variance_I, dead_I=self.dead_I)

    def correction(self) -> Tensor:
        """C H^-1, I I: what a weight is multiplied with to fit the quantized net.

        Raises:
            ValueError: E[x y^T] was not gathered.
        """
        if self.cross_II is None:
            raise ValueError("a target is fitted by E[x y^T], which was not gathered")
        return self.factor.solve(self.cross_II)

    def target(
        self, weight_OI: Tensor, share: float, correction_II: Tensor | None = None
    ) -> Tensor:
        """(1 - share) W + share T, O I in the objective's precision.

        correction_II: where it is known; else T takes two triangular solves of O rows.
        """
        weight_OI = weight_OI.to(self.hessian_II)
        if share == 0:
            return weight_OI
        if correction_II is not None:
            fitted_OI = weight_OI @ correction_II
        elif self.cross_II is not None:
            fitted_OI = self.factor.solve(weight_OI @ self.cross_II)
        else:
            raise ValueError("a target is fitted by E[x y^T], which was not gathered")
        return weight_OI.lerp(fitted_OI, share)

    def importance(self, weights: ScaleWeights) -> Tensor | None:
        """What an error in each column counts in the scale search, I; None: all alike."""
        if weights == "ones":
            return None
        return self.factor.pivots_I if weights == "pivots" else self.variance_I

    def loss(self, error_OI: Tensor) -> Tensor:
        """e H e^T of each row, float64 O."""
        return quadratic(error_OI, self.hessian_II)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """H and C of one layer without dead inputs, whose rows and columns are zero.

    Float64, or float32 if the statistics are; C is None if they lack it. Means are float64. scale:
    mean variance of the other inputs, or 1 if all are dead.
    """

    hessian_II: Tensor
    cross_II: Tensor | None
    mean_x_I: Tensor
    mean_y_I: Tensor
    dead_I: Tensor
    scale: float
    centred: bool

    @classmethod
    def of(cls, stats: LayerStats, *, centred: bool) -> Moments:
        """The moments that statistics hold.

        Raises:
            ValueError: a moment is NaN or infinite, or products were not gathered.
        """
        hessian_II = stats.hessian(centred=centred)
        cross_II = None if stats.products_xy_II is None else stats.cross(centred=centred)
        if not all(_finite(one) for one in (hessian_II, cross_II) if one is not None):
            raise ValueError("a layer's input covariance holds NaN or infinity: calibrate it again")
        variance_I = hessian_II.diagonal()
        varying_I = variance_I[variance_I > 0]
        median = float(varying_I.median()) if len(varying_I) else 0.0
        dead_I = variance_I <= _DEAD * median
        alive_I = (~dead_I).to(hessian_II)
        if bool(dead_I.any()):
            hessian_II.mul_(alive_I).mul_(alive_I[:, None])
            cross_II = None if cross_II is None else cross_II.mul_(alive_I)
        return cls(
            hessian_II=hessian_II,
            cross_II=cross_II,
            mean_x_I=stats.mean_x_I,
            mean_y_I=stats.mean_y_I,
            dead_I=dead_I,
            scale=float(variance_I[~dead_I].mean()) if bool(alive_I.any()) else 1.0,
            centred=centred,
        )

    def problem(
        self, damping: float, order: Order = "activation", *, spent: bool = False
    ) -> Problem:
        """The objective with `damping` mean variances added, or ten times more until it factors.

        Dead inputs are left with a small variance of their own and no ties to others, so that they
        are rounded to nearest. spent: nobody will look at hessian_II and cross_II again, so they
        become the problem's, without copies.

        Raises:
            ValueError: no damping that is tried makes the covariance positive definite.
        """
        dead_I = self.dead_I.to(self.hessian_II) * _DEAD_SHARE * self.scale
        hessian_II = self.hessian_II if spent else self.hessian_II.clone()
        variance_I = hessian_II.diagonal().clone()
        for retry in range(_RETRIES + 1):
            share = damping * 10**retry
            own_I = torch.where(self.dead_I, dead_I, share * self.scale)
            hessian_II.diagonal().copy_(variance_I + own_I)
            order_I = torch.arange(len(own_I), device=own_I.device)
            if order == "activation":
                order_I = hessian_II.diagonal().argsort(descending=True, stable=True)
            factor = factorise(hessian_II, order_I)
            if factor is not None:
                cross_II = self.cross_II
                if cross_II is not None:
                    cross_II = cross_II if spent else cross_II.clone()
                    cross_II.diagonal().add_(own_I)
                return Problem(
                    hessian_II=hessian_II,
                    cross_II=cross_II,
                    factor=factor,
                    damping=share,
                    dead_I=self.dead_I,
                )
        raise ValueError(
            f"a layer's input covariance is not one: not positive definite at damping {share:g}"
        )

    def shift(self, weight_OI: Tensor, rounded_OI: Tensor) -> Tensor:
        """b = W E[x] - Q E[y], float64 O; zero if the moments are not centred."""
        if not self.centred:
            return self.mean_x_I.new_zeros(weight_OI.shape[0])
        return weight_OI.double() @ self.mean_x_I - rounded_OI.double() @ self.mean_y_I


def fitted(inputs: LayerInputs, *, centred: bool) -> Moments:
    """The moments of the rows to learn from; computed once for all layers of an input."""
    return inputs.once(("moments of fit", centred), lambda: Moments.of(inputs.fit, centred=centred))


def fitted_problem(
    inputs: LayerInputs, damping: float, order: Order = "activation", *, centred: bool
) -> Problem:
    """Their objective; likewise. Of the widest layers it is not kept, but for its spectrum."""
    if inputs.fit.products_xy_II is None:
        problem = Moments.of(inputs.fit, centred=centred).problem(damping, order, spent=True)
        inputs.once(("spectrum", centred), lambda: problem.spectrum)
        return problem
    return inputs.once(
        ("problem of fit", centred, damping, order),
        lambda: fitted(inputs, centred=centred).problem(damping, order),
    )


def fitted_spectrum(inputs: LayerInputs, damping: float, *, centred: bool) -> Spectrum:
    """That of their objective; of the widest layers with the damping it was first factored with."""
    return inputs.once(
        ("spectrum", centred), lambda: fitted_problem(inputs, damping, centred=centred).spectrum
    )


class Judge:
    """Compares roundings on rows that nothing was fitted to."""

    def __init__(self, *, fit: Moments, held_out: LayerStats) -> None:
        self.fit = fit
        self._hessian_II = held_out.hessian(centred=fit.centred)
        self._cross_II = held_out.cross(centred=fit.centred)
        self._mean_x_I, self._mean_y_I = held_out.mean_x_I, held_out.mean_y_I

    def loss(self, weight_OI: Tensor, rounded_OI: Tensor) -> float:
        """E||W x - Q y - b||^2 less E||W x - mean||^2, which all Q share; b comes from the fit."""
        weight_OI, rounded_OI = (one.to(self._hessian_II) for one in (weight_OI, rounded_OI))
        loss = quadratic(rounded_OI, self._hessian_II).sum()
        loss -= 2 * (weight_OI @ self._cross_II * rounded_OI).sum()
        if self.fit.centred:
            rest_O = weight_OI.double() @ self._mean_x_I - rounded_OI.double() @ self._mean_y_I
            loss += (rest_O - self.fit.shift(weight_OI, rounded_OI)).square().sum()
        return float(loss)


def _finite(matrix_II: Tensor) -> bool:
    """Without a temporary of the matrix's size."""
    return not matrix_II.numel() or bool(torch.isfinite(torch.stack(matrix_II.aminmax())).all())
