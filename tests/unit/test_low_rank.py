"""The 16-bit branch: exact where the weight is low-rank, stable, and worth its bytes on spikes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hbxt_compress.algorithms import low_rank as module
from hbxt_compress.algorithms.gptq import Gptq
from hbxt_compress.algorithms.low_rank import branch, split_low_rank
from tests.oracles.free_format import FreeFormat
from tests.oracles.inputs import correlated, inputs_of, normal


def _low(n_out: int, n_in: int, rank: int, seed: int = 0) -> Tensor:
    return normal(n_out, rank, seed=seed) @ normal(rank, n_in, seed=seed + 1)


def _left(weight: Tensor, importance: Tensor | None, rank: int) -> Tensor:
    return weight.double() - branch(split_low_rank(weight, importance, rank))


@pytest.mark.parametrize(("n_out", "n_in"), [(48, 96), (96, 48), (20, 20)])
def test_a_weight_of_the_branchs_rank_is_all_branch(n_out: int, n_in: int) -> None:
    weight = _low(n_out, n_in, 4)
    importance = torch.exp(normal(n_in, seed=7))
    for given in (None, importance):
        left = _left(weight, given, 4)
        assert left.norm() < 2e-3 * weight.norm()  # what float16 factors leave
        assert _left(weight, given, 3).norm() > 0.05 * weight.norm()


def test_no_branch_of_that_rank_is_nearer_under_the_importance() -> None:
    weight, importance = normal(24, 40), torch.exp(2 * normal(40, seed=3))
    root = importance.double().sqrt()
    wanted = torch.linalg.svdvals(weight.double() * root)[6:].square().sum()
    got = (_left(weight, importance, 6) * root).square().sum()
    assert float(wanted) <= float(got) <= float(wanted) * 1.001
    plain = (_left(weight, None, 6) * root).square().sum()
    assert float(plain) > 1.1 * float(got)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_the_randomised_branch_is_nearly_the_exact_one(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = 3 * _low(*shape, 8) + normal(*shape, seed=5)
    exact = _left(weight, None, 8).norm()
    monkeypatch.setattr(module, "_EXACT_UP_TO", 10)
    one, two = split_low_rank(weight, None, 8), split_low_rank(weight, None, 8)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert _left(weight, None, 8).norm() < exact * 1.001


def test_shapes_types_and_signs_are_fixed() -> None:
    weight = normal(12, 30)
    down, up = split_low_rank(weight, None, 5)
    assert (down.shape, up.shape) == ((5, 30), (12, 5))
    assert down.dtype == up.dtype == torch.float16
    peaks = down.gather(1, down.abs().argmax(1, keepdim=True))
    assert bool((peaks > 0).all())
    strengths = down.double().norm(dim=1) * up.double().norm(dim=0)
    assert bool((strengths.diff() <= 1e-2).all())


def test_odd_weights_give_finite_factors() -> None:
    weight = normal(16, 32)
    cases = {
        "zero": (torch.zeros(16, 32), None),
        "outlier": (weight.clone().index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(1e4)),
                    None),
        "rank beyond the weight": (weight[:4], None),
        "no importance": (weight, torch.zeros(32)),
        "one input counts": (weight, torch.eye(32)[5] * 1e6),
        "importances 1e30 apart": (weight, torch.logspace(-20, 10, 32)),
    }  # fmt: skip
    for name, (one, importance) in cases.items():
        down, up = split_low_rank(one, importance, 8)
        assert down.shape == (8, 32), name
        assert bool(torch.isfinite(branch((down, up))).all()), name
        assert _left(one, importance, 8).norm() <= 1.5 * one.norm() + 1e-9, name
    assert abs(_left(cases["outlier"][0], None, 8)[3, 4]) < 10
    with pytest.raises(ValueError, match="rank 0"):
        split_low_rank(weight, None, 0)
    with pytest.raises(ValueError, match="NaN"):
        split_low_rank(weight * torch.inf, None, 2)


def test_gptq_rounds_what_the_branch_leaves() -> None:
    """On spiky weights the branch beats twice as many scales; the payload decodes to the sum."""
    x = correlated(2000, 96)
    inputs = inputs_of(x)
    weight = normal(64, 96) / 10 + _low(64, 96, 4) / 4

    def error(fmt: FreeFormat) -> float:
        rounded = Gptq().round(weight, inputs, fmt)
        decoded = fmt.decode(rounded.payload)
        assert rounded.shift_O is not None
        lost = x @ (weight - decoded).T - rounded.shift_O
        return float(lost.square().sum() / (x @ weight.T).square().sum())

    with_branch = error(FreeFormat(group=32, rank=4))
    assert with_branch < 0.1 * error(FreeFormat(group=32))
    assert with_branch < 0.1 * error(FreeFormat(group=16))
    notes = Gptq().round(weight, inputs, FreeFormat(group=32, rank=4)).notes
    assert 0 <= int(notes["alternations"]) <= 3


def test_gptq_with_a_branch_is_deterministic_and_works_without_held_out_rows() -> None:
    weight, fmt = normal(24, 64), FreeFormat(group=32, rank=3, asymmetric=True)
    inputs = inputs_of(correlated(300, 64), held=0)
    one, two = (Gptq().round(weight, inputs, fmt).payload for _ in range(2))
    assert one.keys() == {"levels", "scales", "zeros", "down", "up"}
    assert all(torch.equal(one[key], two[key]) for key in one)
