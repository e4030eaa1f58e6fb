"""Sensitivity: how much of the velocity's error each layer answers for, by format.

On the way there: the inputs' covariance tells what each format would leave of an even error, one
that strikes every weight by chance, with the variance step^2 / 12 of its group. On the way back:
with random signs u for cotangents and G = sum_t g_t x_t^T the gradient with respect to the weight,

    E_u E_error (u . J error)^2 = E_u sum_oi step_oi^2 / 12 * G_oi^2

is the energy that such an error brings to the velocity, to first order, a sample for each state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from hbxt_compress.algorithms.choose import estimated_losses
from hbxt_compress.algorithms.scales import search_scales
from hbxt_compress.chain import layer_at
from hbxt_compress.errors import CalibrationError
from hbxt_compress.formats import FORMATS, WeightFormat
from hbxt_compress.plan import FULL_PRECISION, Choice
from hbxt_compress.stages.side_by_side import Batch
from hbxt_compress.stages.tape import Seen
from hbxt_compress.stats import LayerInputs, LayerStats

__all__ = ["SLICE", "WEIGHTS", "WHOLE", "Sensitivity", "arrive", "leave"]

_EVEN = "int4-g64"  # the format whose steps an even error has
WHOLE = 2048  # inputs whose covariance is gathered and factored as one
SLICE = 1024  # inputs, where there are more: diagonal blocks of it, for a third of the time
WEIGHTS = 1 << 20  # of a layer that are rounded for an estimate, in evenly spaced rows


@dataclass(slots=True, kw_only=True)
class Sensitivity:
    """Of one layer. left: by format, what it leaves of an even error's power, 0..inf.

    mean_I: the inputs' mean, where a bias takes it. arrived: for each state the energy that an even
    error brings to the velocity.
    """

    left: Mapping[str, float]
    mean_I: Tensor | None
    arrived: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        """What is known after the way there, as JSON values that lose no digit."""
        return {"left": self.left, "mean_I": None if self.mean_I is None else self.mean_I.tolist()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """What `to_json` wrote, on its way back."""
        mean = document["mean_I"]
        return cls(left=document["left"], mean_I=None if mean is None else torch.tensor(mean))

    def damages(self, energy: float) -> dict[str, float]:
        """By format, the lost share of the velocity's energy."""
        return {name: left * math.fsum(self.arrived) / energy for name, left in self.left.items()}

    @property
    def relative_error(self) -> float:
        """The standard error of a damage by the spread over states, relative to it; or 0."""
        seen = torch.tensor(self.arrived, dtype=torch.float64)
        if len(seen) < 2 or not float(seen.sum()) > 0:
            return 0.0
        return float(seen.std() * math.sqrt(len(seen)) / seen.sum())


def leave(
    module: nn.Module,
    choices: Mapping[str, Choice],
    passing: Iterator[tuple[Batch, Mapping[str, Seen]]],
) -> dict[str, Sensitivity]:
    """What each format leaves, for the layers of a piece that are called on the way there.

    Raises:
        CalibrationError: an input is not finite, or no prompt is there to learn from.
    """
    gathered: dict[str, _Gathered] = {}
    leader: dict[str, str] = {}
    for batch, seen in passing:
        first: dict[int, str] = {}
        for name, one in seen.items():
            leader[name] = first.setdefault(id(one.given), name)
            if leader[name] == name:
                width = one.given.shape[-1]
                gathered.setdefault(name, _Gathered(name, width)).add(one.given, batch)
    groups: dict[tuple[str, bool], list[str]] = {}
    for name, first_of_input in leader.items():
        takes_bias = layer_at(module, name).bias is not None
        groups.setdefault((first_of_input, takes_bias), []).append(name)
    found: dict[str, Sensitivity] = {}
    for (first_of_input, takes_bias), names in groups.items():
        layers = {name: (layer_at(module, name), choices[name]) for name in names}
        found |= _left(layers, gathered[first_of_input].inputs(takes_bias=takes_bias))
    return found


@torch.no_grad()
def arrive(
    module: nn.Module,
    known: Mapping[str, Sensitivity],
    returning: Iterator[tuple[Batch, Mapping[str, Seen]]],
) -> None:
    """Adds what arrives from the layers of a piece, state by state, on the way back."""
    powers: dict[str, Tensor] = {}
    for _, seen in returning:
        for name, one in seen.items():
            if name not in powers:
                powers[name] = _even(layer_at(module, name).weight.data.flatten(1).float())
            assert one.gradient is not None
            mean_I = known[name].mean_I
            for given, gradient in zip(one.given, one.gradient, strict=True):
                rows_NI = given.reshape(-1, given.shape[-1]).float()
                rows_NI = rows_NI if mean_I is None else rows_NI - mean_I.to(rows_NI)
                whole_OI = gradient.reshape(len(rows_NI), -1).float().T @ rows_NI
                squares_OG = whole_OI.unflatten(1, (powers[name].shape[1], -1)).square_().sum(-1)
                arrived = (squares_OG * powers[name]).double().sum()
                known[name].arrived.append(float(arrived))


class _Gathered:
    """Statistics of one input, in slices that a covariance is affordable for."""

    def __init__(self, name: str, n_inputs: int) -> None:
        self._name = name
        size = n_inputs if n_inputs <= WHOLE else SLICE
        self._slices = [
            slice(start, min(start + size, n_inputs)) for start in range(0, n_inputs, size)
        ]
        self._sides: dict[bool, list[LayerStats]] = {}

    def add(self, given: Tensor, batch: Batch) -> None:
        """Adds the rows of a batch that count."""
        counted = batch.rows_BS
        if counted is not None and counted.shape == given.shape[:-1]:
            given = given[counted]
        if batch.held_out not in self._sides:
            widths = [one.stop - one.start for one in self._slices]
            self._sides[batch.held_out] = [
                LayerStats.empty(n, "covariance", given.device, cross=False) for n in widths
            ]
        for columns, stats in zip(self._slices, self._sides[batch.held_out], strict=True):
            part = given[..., columns]
            try:
                stats.add(part, part, batch.weight)
            except ValueError as error:
                raise CalibrationError(f"{self._name}: {error}; no statistics can be had") from None

    def inputs(self, *, takes_bias: bool) -> list[LayerInputs]:
        """What is known of each slice."""
        if len(self._sides) < 2:
            raise CalibrationError(f"{self._name}: no calibration rows; give more prompts")
        return [
            LayerInputs(fit=fit, held_out=held_out, takes_bias=takes_bias)
            for fit, held_out in zip(self._sides[False], self._sides[True], strict=True)
        ]


def _left(
    layers: Mapping[str, tuple[nn.Linear, Choice]], slices: Sequence[LayerInputs]
) -> dict[str, Sensitivity]:
    """Of layers of one input, of whose slices the statistics are."""
    fmts = [
        [FORMATS[name] for name in choice.formats if name not in FULL_PRECISION]
        for _, choice in layers.values()
    ]
    weights = [
        _some_rows(layer.weight.data.flatten(1).float(), own)
        for (layer, _), own in zip(layers.values(), fmts, strict=True)
    ]
    losses = estimated_losses(weights, slices, fmts)
    variance_I = torch.cat([_variance(one) for one in slices])
    mean_I = torch.cat([one.fit.mean_y_I for one in slices]).float()
    told: dict[str, Sensitivity] = {}
    for k, (name, (layer, choice)) in enumerate(layers.items()):
        power_G = _even(weights[k]).double().sum(0)
        even = float(power_G.repeat_interleave(len(variance_I) // len(power_G)) @ variance_I)
        left = {full: 0.0 for full in choice.formats if full in FULL_PRECISION}
        for fmt, loss in zip(fmts[k], losses[k], strict=True):
            left[fmt.name] = loss / even if even > 0 else 0.0
        told[name] = Sensitivity(left=left, mean_I=None if layer.bias is None else mean_I)
    return told


def _variance(inputs: LayerInputs) -> Tensor:
    """Of each input on held-out rows, float64 I."""
    assert inputs.held_out is not None
    return inputs.held_out.hessian(centred=inputs.takes_bias).diagonal().double()


def _some_rows(weight_OI: Tensor, fmts: Sequence[WeightFormat]) -> Tensor:
    """Evenly spaced rows, enough for an estimate; all where a low rank of the whole is needed."""
    n_out, n_in = weight_OI.shape
    if any(fmt.rank for fmt in fmts):
        return weight_OI
    n_rows = min(n_out, max(1, WEIGHTS // n_in))
    return weight_OI[torch.arange(n_rows) * n_out // n_rows]


def _even(weight_OI: Tensor) -> Tensor:
    """step^2 / 12 of every group, float32 O G, its step as its largest entry asks for it."""
    fmt = FORMATS[_EVEN]
    if fmt.group is None or weight_OI.shape[1] % fmt.group:
        fmt = FORMATS["int8-channel"]
    return search_scales(weight_OI, fmt, thorough=False).scales_OG.square() / 12
