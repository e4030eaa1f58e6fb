"""Prepare: rewrites that leave the model's function as it is and make its weights easier to round.

Free ones first: features between two layers are mixed, and both weights stored so. Then what a
layer's input is multiplied with at run time. Each is kept where it helps on held-out prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hbxt_compress.algorithms import INPUT_PREPARERS, PAIR_PREPARERS, AnyPreparer
from hbxt_compress.algorithms.choose import IDENTITY, choose_mixing, choose_transform
from hbxt_compress.algorithms.transform import Mixing, Transform
from hbxt_compress.chain import layer_at
from hbxt_compress.formats import FORMATS, WeightFormat
from hbxt_compress.formats.activations import ACTIVATIONS
from hbxt_compress.layers import Pair
from hbxt_compress.plan import LayerPlan
from hbxt_compress.ranks import ALONE, Ranks
from hbxt_compress.stages.walk import Station
from hbxt_compress.stats import LayerInputs

__all__ = ["THIN", "Kept", "input_transform", "mix"]

# Choosing a mixing takes fewer rows than rounding; 5 batches on is another step and another branch.
THIN = 5


class Kept:
    """Weights of a module as they were, to be put back: a resumed run must see the same ones."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    def replace(self, path: str, parameter: Tensor, value: Tensor) -> None:
        """Gives a parameter another value until `restore`."""
        self._kept.setdefault(path, (parameter, parameter.data))
        parameter.data = value.to(parameter.device, torch.float32)

    def restore(self) -> bool:
        """Every parameter as it was; whether any was another."""
        for parameter, value in self._kept.values():
            parameter.data = value
        return bool(self._kept)


def mix(
    station: Station,
    pairs: Sequence[Pair],
    planned: Mapping[str, LayerPlan],
    preparers: Sequence[AnyPreparer],
    kept: Kept,
    ranks: Ranks = ALONE,
) -> dict[str, str]:
    """Mixes the features of a piece's pairs in both models.

    Module -> what was chosen for it, or why nothing was even tried.
    """
    asked: list[Any] = [p for p in preparers if isinstance(p, tuple(PAIR_PREPARERS.values()))]
    chosen: dict[str, str] = {}
    sides = station.sides
    joined: list[tuple[Pair, list[Any]]] = []
    for pair in pairs:
        makers = [maker for maker in asked if pair.joint in maker.JOINTS]
        if not makers or pair.first not in planned or pair.second not in planned:
            continue
        width = layer_at(sides.full.module, pair.second).weight.shape[1]
        able = [maker for maker in makers if width <= maker.widest]
        if able:
            joined.append((pair, able))
        if len(able) < len(makers):
            chosen[pair.first] = chosen[pair.second] = _too_wide(width, makers)
    if not joined:
        return chosen
    ends = [end for pair, _ in joined for end in (pair.first, pair.second)]
    modules = list(dict.fromkeys(ends))
    inputs = sides.inputs(station.piece, modules, "covariance", thin=THIN, cross=False)
    for pair, makers in joined:
        first, second = (layer_at(sides.full.module, path) for path in (pair.first, pair.second))
        fmts = FORMATS[planned[pair.first].weights], FORMATS[planned[pair.second].weights]
        choose = partial(_chosen, pair, makers, first.weight.data, second.weight.data, inputs, fmts)
        name, mixing = ranks.by_first(choose)
        if name.startswith(IDENTITY):
            continue
        untried = [chosen[pair.first]] if pair.first in chosen else []
        chosen[pair.first] = chosen[pair.second] = "; ".join([name, *untried])
        for side, chain in (("full", sides.full), ("half", sides.half)):
            one = layer_at(chain.module, pair.first)
            two = layer_at(chain.module, pair.second)
            bias: Tensor | None = None if one.bias is None else one.bias.data
            weight, bias = mixing.first(one.weight.data, bias)
            kept.replace(f"{side}.{pair.first}.weight", one.weight, weight)
            if bias is not None:
                kept.replace(f"{side}.{pair.first}.bias", one.bias, bias)
            kept.replace(f"{side}.{pair.second}.weight", two.weight, mixing.second(two.weight.data))
    return chosen


def _chosen(
    pair: Pair,
    makers: Sequence[Any],
    first_FI: Tensor,
    second_OF: Tensor,
    inputs: Mapping[str, LayerInputs],
    fmts: tuple[WeightFormat, WeightFormat],
) -> tuple[str, Mixing]:
    """Name and mixing of a pair."""
    seen = inputs[pair.first], inputs[pair.second]
    candidates = [
        candidate
        for maker in makers
        for candidate in maker.candidates(first_FI, second_OF, seen[1], pair.n_heads)
    ]
    name, mixing, _ = choose_mixing(first_FI, second_OF, *seen, fmts, candidates)
    return name, mixing


def _too_wide(width: int, makers: Sequence[Any]) -> str:
    """Which preparers are not asked about so many features."""
    names = {kind: name for name, kind in PAIR_PREPARERS.items()}
    over = [
        f"{names[type(maker)]} over its limit of {maker.widest}"
        for maker in makers
        if width > maker.widest
    ]
    return f"{width} features: {', '.join(over)}"


def input_transform(
    station: Station,
    group: Sequence[str],
    planned: Mapping[str, LayerPlan],
    inputs: LayerInputs,
    preparers: Sequence[AnyPreparer],
) -> tuple[str, Transform]:
    """Name and transform for the layers of one input; the identity where none gains enough."""
    makers: list[Any] = [p for p in preparers if isinstance(p, tuple(INPUT_PREPARERS.values()))]
    if not makers or inputs.fit.products_yy_II is None:
        return IDENTITY, Transform()
    weights = [
        layer_at(station.sides.full.module, module).weight.detach().flatten(1).float()
        for module in group
    ]
    candidates = [one for maker in makers for one in maker.candidates(weights, inputs)]
    fmts = [FORMATS[planned[module].weights] for module in group]
    rounded = [ACTIVATIONS.get(planned[module].activations) for module in group]
    activation = next((one for one in rounded if one is not None), None)
    name, transform, _ = choose_transform(weights, inputs, fmts, candidates, activation=activation)
    return name, transform
