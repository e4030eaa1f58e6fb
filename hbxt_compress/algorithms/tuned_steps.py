"""Tuned steps: a fitted solver's levels and coefficients, all together, by what comes out at last.

Fitting a step at a time asks that every step meets the teacher's path. Only its end matters:

    min mean_n ||x_n(levels, coefficients) - clean_n||^2 / ||clean_n||^2

by gradients through all steps (bespoke non-stationary solvers, Shaul et al. 2024, arXiv
2403.01329). The model's weights stay; what is trained is some dozens of numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hbxt_compress.algorithms.training import Net, Training, Watch, drawn, train

__all__ = ["FittedSolver", "relative_errors", "tune"]

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


class FittedSolver(nn.Module):
    """Levels and coefficients as parameters: float32, the levels as logarithms of their gaps."""

    def __init__(self, levels: Sequence[float], coefficients: Sequence[Sequence[float]]) -> None:
        super().__init__()
        falling = torch.tensor([*levels, 0.0], dtype=torch.float64)
        self.gaps = nn.Parameter((falling[:-1] - falling[1:]).log().float())
        self.rows = nn.ParameterList(nn.Parameter(torch.tensor(row)) for row in coefficients)

    def levels(self) -> Tensor:
        """N falling levels, the first one 1; the last one's gap to 0 is the last gap."""
        return 1 - torch.cat([self.gaps.new_zeros(1), self.gaps.softmax(0).cumsum(0)[:-1]])

    def forward(self, velocity: Velocity, eps: Tensor, text: Tensor) -> Tensor:
        """The clean latents; velocity(x, level, text) with a level that has a gradient."""
        basis, x = [eps], eps
        for level, row in zip(self.levels(), self.rows, strict=True):
            basis.append(velocity(x, level, text))
            x = sum((c * one for c, one in zip(row, basis, strict=True)), torch.zeros(()))
        return x


def tune(
    solver: FittedSolver,
    velocity: Velocity,
    learnt: tuple[Tensor, Tensor, Tensor],
    held_out: tuple[Tensor, Tensor, Tensor],
    how: Training,
    device: torch.device,
    watch: Watch,
) -> tuple[float, float]:
    """Trains the solver in place; its mean relative error on the held-out clips before and after.

    learnt, held_out: noise and clean latents N C T H W, and text features N L D, of some clips.
    device: where the velocity is computed.

    Raises:
        Diverged: a loss is not finite.
    """

    def turn(k: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        draw = drawn(how.seed, k)
        rows = torch.randint(len(learnt[0]), (how.batch,), generator=draw)
        eps, clean, text = (one[rows] for one in learnt)
        with how.autocast(device):
            found = solver(velocity, eps, text)
        loss = relative_errors(found, clean).mean()
        norm = net.descend(loss, k / how.n_steps)
        return {"loss": float(loss.detach()), "norm": norm}, {"noise": eps, "text": text}

    @torch.no_grad()
    def judge() -> float:
        eps, clean, text = held_out
        return float(relative_errors(solver(velocity, eps, text), clean).mean())

    net = Net(solver, how)
    return train({"solver": net}, how, turn, judge, watch)


def relative_errors(found_NCTHW: Tensor, wanted_NCTHW: Tensor) -> Tensor:
    """N squared errors over the squared norms of what is wanted."""
    lost = (found_NCTHW.float() - wanted_NCTHW).square().flatten(1).sum(1)
    return lost / wanted_NCTHW.square().flatten(1).sum(1)
