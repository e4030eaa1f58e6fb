"""Runs: a few neighbouring columns taken one by one, each changing those after it in the run.

R columns are rows of a tensor here, with O numbers each. One number of one column hangs on all
columns before it, so there is nothing to multiply matrices with: thousands of columns take most of
their time in small steps. Of wide layers a whole run is compiled into one pass over O.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hbxt_compress.algorithms.compiled import Compiled

__all__ = ["RUN", "FedRun", "MovedRun", "feed", "move"]

RUN = 16
"""columns of a run: compiling takes as the square of them"""
_EAGER_UP_TO = 2048  # inputs: their statistics are float64, and their columns soon done
_CODE = Compiled("wide layers are rounded")
_PassOn = Callable[[list[Tensor], Tensor, int, Tensor, Tensor], None]
_Run = Callable[..., tuple[Tensor, ...]]
_Columns = Callable[..., tuple[Tensor, ...]]


class FedRun(NamedTuple):
    """Of a run: units, levels less zeros; errors, goal less value; away, what feedback left."""

    units_RO: Tensor
    errors_RO: Tensor
    away_RO: Tensor


class MovedRun(NamedTuple):
    """Of a run: new units; moves, what was added to values; by how much the loss fell."""

    units_RO: Tensor
    moves_RO: Tensor
    gain_O: Tensor


def feed(
    work_RO: Tensor, goal_RO: Tensor, unit_RR: Tensor, grid_RO: Sequence[Tensor], n_inputs: int
) -> FedRun:
    """Rounds each column of `work`, and adds its error times a row of `unit` to those after it.

    grid: scales, least and largest units. n_inputs: of the layer, of which these are some. `work`
    is not the caller's any more.
    """
    given = work_RO, goal_RO, unit_RR.contiguous(), *grid_RO
    return FedRun(*_code(_feed, work_RO, n_inputs)(*given))


def move(
    gradient_RO: Tensor, units_RO: Tensor, own_RR: Tensor, grid_RO: Sequence[Tensor], n_inputs: int
) -> MovedRun:
    """Puts each column's units where the loss is least, and takes the move off later gradients.

    gradient: e H of the columns, e the error; own: their part of H. The rest as in `feed`; the
    gradient is not the caller's any more.
    """
    given = gradient_RO, units_RO, own_RR.contiguous(), *grid_RO
    return MovedRun(*_code(_move, gradient_RO, n_inputs)(*given))


def _code(function: _Run, one_RO: Tensor, n_inputs: int) -> _Columns:
    eager = partial(function, _in_place)
    is_wide = n_inputs > _EAGER_UP_TO and one_RO.device.type == "cpu"
    if not is_wide or len(one_RO) != RUN or one_RO.shape[1] == 1:
        return eager
    of = one_RO.dtype
    examples = [torch.ones(RUN, 48, dtype=of) for _ in range(5)]
    examples.insert(2, torch.eye(RUN, dtype=of))
    differ = [(1,), (1,), (), (1,), (1,), (1,)]

    def fused(*given: Tensor) -> tuple[Tensor, ...]:
        return function(_one_by_one, *given)

    return _CODE.of((function, of), fused, examples, differ) or eager


def _feed(
    pass_on: _PassOn,
    work_RO: Tensor,
    goal_RO: Tensor,
    unit_RR: Tensor,
    scale_RO: Tensor,
    low_RO: Tensor,
    high_RO: Tensor,
) -> tuple[Tensor, ...]:
    columns, found = list(work_RO.unbind()), []
    for j, scale_O in enumerate(scale_RO.unbind()):
        units_O = (columns[j] / scale_O).round().clamp(low_RO[j], high_RO[j])
        value_O = units_O * scale_O
        error_O = goal_RO[j] - value_O
        pass_on(columns, work_RO, j, unit_RR, error_O)
        found.append((units_O, error_O, columns[j] - value_O))
    return tuple(torch.stack(one) for one in zip(*found, strict=True))


def _move(
    pass_on: _PassOn,
    gradient_RO: Tensor,
    units_RO: Tensor,
    own_RR: Tensor,
    scale_RO: Tensor,
    low_RO: Tensor,
    high_RO: Tensor,
) -> tuple[Tensor, ...]:
    gradients, found = list(gradient_RO.unbind()), []
    gain_O = torch.zeros_like(gradients[0])
    for j, scale_O in enumerate(scale_RO.unbind()):
        best_O = units_RO[j] + gradients[j] / own_RR[j, j] / scale_O
        new_O = best_O.round().clamp(low_RO[j], high_RO[j])
        move_O = (new_O - units_RO[j]) * scale_O
        gain_O = gain_O + move_O * (2 * gradients[j] - move_O * own_RR[j, j])
        pass_on(gradients, gradient_RO, j, own_RR, -move_O)
        found.append((new_O, move_O))
    units_RO, moves_RO = (torch.stack(one) for one in zip(*found, strict=True))
    return units_RO, moves_RO, gain_O


def _in_place(
    columns: list[Tensor], whole_RO: Tensor, j: int, share_RR: Tensor, change_O: Tensor
) -> None:
    """Later columns get their share of a change; all are views of the whole."""
    whole_RO[j + 1 :].addr_(share_RR[j, j + 1 :], change_O)


def _one_by_one(
    columns: list[Tensor], whole_RO: Tensor, j: int, share_RR: Tensor, change_O: Tensor
) -> None:
    """The same, said so that a compiler keeps every column near the core."""
    for k in range(j + 1, len(columns)):
        columns[k] = columns[k] + share_RR[j, k] * change_O
