"""Distribution matching on flows whose answer is known."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hbxt_compress.algorithms.dmd import Dmd, energy_distance, matching_gradient
from hbxt_compress.algorithms.low_rank_update import adapt
from hbxt_compress.algorithms.noise_levels import noised
from hbxt_compress.algorithms.pupil import Distilled, Pupil
from hbxt_compress.algorithms.training import Training
from hbxt_compress.lessons import Lesson, Lessons
from hbxt_compress.sampler import SamplerSpec
from tests.watching import Silent

SHAPE = (2, 1, 1, 2)


class Gaussian(nn.Module):
    """The exact velocity of noise that flows to N(mean, 0.5^2), whatever the text says."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        s, variance = (t / 1000).view(-1, 1, 1, 1, 1), 0.25
        gain = variance * (1 - s) / ((1 - s) ** 2 * variance + s**2)
        clean = self.mean + gain * (x - (1 - s) * self.mean)
        return (x - clean) / s


def taught(folder: Path, n: int, mean: float) -> Lessons:
    draw = torch.Generator().manual_seed(1)
    clean = mean + 0.5 * torch.randn(n, *SHAPE, generator=draw)
    Lesson(
        states_NKCTHW=torch.stack([torch.randn(n, *SHAPE, generator=draw), clean], dim=1),
        levels_K=torch.tensor([1.0, 0.0]),
        text_NSD=torch.ones(n, 1, 1),
        none_1SD=torch.ones(1, 1, 1),
        n_tokens=torch.tensor(1),
    ).save(folder / "clips-00000.safetensors")
    return Lessons(folder)


def distilled(how: Dmd, folder: Path, begin: float, guidance: float = 1.0) -> Distilled:
    spec = SamplerSpec(solver="euler", n_steps=8, shift=2.0, guidance=guidance)
    student = Gaussian(begin)
    pupil = Pupil(
        module=student,
        call=lambda module, *inputs: module(*inputs),
        velocity=lambda x, level, text: student(x, torch.full((len(x),), 1000.0 * level), text),
        teacher=Gaussian(2.0),
        original=lambda: Gaussian(2.0),
        compile=lambda by: None,
        device=torch.device("cpu"),
        sampler=spec,
        teachers=spec,
    )
    return how.distill(pupil, taught(folder, 64, 2.0), Silent())


def settings(n_steps: int, **changed: object) -> Dmd:
    train = Training(
        n_steps=n_steps, batch=32, rate=0.05, betas=(0.0, 0.99), average=0.5, warmup=1,
        judge_every=n_steps, precision="float32", compiled=False,
    )  # fmt: skip
    document = {"noise_levels": (1.0, 0.5), "train": train, "critic_rate": 0.1, **changed}
    return Dmd.model_validate(document)


def test_the_student_goes_where_the_teachers_clips_are(tmp_path: Path) -> None:
    found = distilled(settings(150, critic_steps=3), tmp_path, begin=0.0)
    assert float(found.weights["mean"]) == pytest.approx(2.0, abs=0.15)
    assert found.measured["denoising_gap"] < 0.5 * found.measured["denoising_gap_before"]
    assert found.sampler.solver == "renoise"
    assert found.sampler.levels == (1.0, 0.5)
    assert found.sampler.guidance == 1


@pytest.mark.parametrize("guidance", [None, 1.0])
def test_a_critic_that_agrees_with_the_teacher_moves_nothing(
    guidance: float | None, tmp_path: Path
) -> None:
    """Oracle: fake == real and no guidance; without the best being restored, by one step."""
    how = settings(1, critic_rate=1e-30, critic_steps=1, guidance=guidance)
    found = distilled(how, tmp_path, begin=0.3)
    assert found.measured["denoising_gap"] == found.measured["denoising_gap_before"]
    assert float(found.weights["mean"]) == pytest.approx(0.3, abs=1e-7)


def test_the_gradient_is_the_literal_one() -> None:
    draw = torch.Generator().manual_seed(0)
    clean, fake, real = (torch.randn(3, *SHAPE, generator=draw) for _ in range(3))
    found = matching_gradient(clean, fake, real)
    for n in range(3):
        far = sum(
            abs(float(a) - float(b))
            for a, b in zip(clean[n].flatten(), real[n].flatten(), strict=True)
        )
        wanted = (fake[n] - real[n]) / (far / clean[n].numel())
        torch.testing.assert_close(found[n], wanted)
    assert not matching_gradient(clean, real, real).any()


def test_the_energy_distance_is_the_literal_one() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, *SHAPE, generator=draw), torch.randn(4, *SHAPE, generator=draw) + 1

    def mean(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return sum(float((p - q).double().norm()) for p, q in pairs) / len(pairs)

    across = mean(list(itertools.product(a, b)))
    within = [mean(list(itertools.permutations(x, 2))) for x in (a, b)]
    assert energy_distance(a, b) == pytest.approx((2 * across - sum(within)) / 2, rel=1e-6)


def test_sets_of_one_distribution_are_near_zero_apart() -> None:
    draw = torch.Generator().manual_seed(0)
    sets = [torch.randn(400, *SHAPE, generator=draw) for _ in range(2)]
    assert abs(energy_distance(*sets)) < 0.02 < energy_distance(sets[0], sets[1] + 0.5)


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_noised_ends_at_clip_and_noise(level: float) -> None:
    clean, eps = torch.full(SHAPE, 2.0), torch.full(SHAPE, -1.0)
    found = noised(clean, torch.tensor(level), eps)
    torch.testing.assert_close(found, torch.full(SHAPE, 2 - 3 * level))


def test_low_rank_updates_begin_at_the_weights_and_are_merged() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2))
    x, before = torch.randn(5, 6), {n: p.detach().clone() for n, p in module.named_parameters()}
    wanted = module(x)
    merged = adapt(module, 2)
    torch.testing.assert_close(module(x), wanted, rtol=0, atol=0)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert sorted(p.numel() for p in trained.values()) == [
        12,
        16,
    ]  # the last layer is too small for rank 2
    with torch.no_grad():
        for one in trained.values():
            one.add_(0.1 * torch.randn_like(one))
    fresh = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2))
    fresh.load_state_dict(before | merged())
    torch.testing.assert_close(fresh(x), module(x))
    assert torch.linalg.matrix_rank(merged()["0.weight"] - before["0.weight"]) == 2


def test_a_rank_that_no_layer_takes_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 5: no linear layer"):
        adapt(nn.Sequential(nn.Linear(6, 8)), 5)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"noise_levels": (0.9, 0.5)}, "must start at 1 and fall"),
        ({"score_levels": (0.5, 0.1)}, "must rise, between 0 and 1"),
        ({"guidance": 0.5}, "greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changed: Mapping[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Dmd.model_validate(changed)
