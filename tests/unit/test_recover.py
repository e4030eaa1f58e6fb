"""Recovery: it recovers, never makes things worse, and a killed run ends as an undisturbed one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hbxt_compress.algorithms import recover
from hbxt_compress.algorithms.example import Example, velocity_error
from hbxt_compress.algorithms.recover import Recover
from hbxt_compress.algorithms.scales import search_scales
from hbxt_compress.chain import Chain
from hbxt_compress.errors import CalibrationError
from hbxt_compress.formats import FORMATS
from hbxt_compress.layers import LayerName
from hbxt_compress.machine import Machine
from hbxt_compress.models import family_of
from hbxt_compress.quantized import Loss, QuantizedModel, QuantizedWeight, save_block
from hbxt_compress.sampler import SamplerSpec
from hbxt_compress.stages import refine as refining
from hbxt_compress.stages.refine import refine
from hbxt_compress.stages.side_by_side import Batch
from hbxt_compress.stages.student import QuantizedLinear, free_parameters
from hbxt_compress.store import Entry, Work
from tests.observed import observed, source_of


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _quantized(weight_OI: Tensor, name: str = "int4-g32") -> QuantizedWeight:
    fmt = FORMATS[name]
    grid = search_scales(weight_OI, fmt)
    payload = fmt.store(grid.levels(weight_OI), grid.scales_OG, grid.zeros_OG)
    shape = tuple(weight_OI.shape)
    return QuantizedWeight(format=name, payload=payload, shape=shape, loss=Loss(error=0.0))


def _layer(n_out: int, n_in: int, seed: int, wrong: float) -> QuantizedLinear:
    """Scales off by a factor of about exp(+-wrong), bias by `wrong`."""
    weight = _quantized(_normal(n_out, n_in, seed=seed) / n_in**0.5)
    noise = (wrong * _normal(*weight.payload["scales"].shape, seed=seed + 1)).exp()
    weight.payload["scales"].copy_((weight.payload["scales"].float() * noise).half())
    layer = QuantizedLinear(weight, wrong * _normal(n_out, seed=seed + 2))
    return layer.requires_grad_(False)


def _toy(wrong: float = 0.0) -> nn.Module:
    return nn.Sequential(_layer(32, 64, 1, wrong), _layer(16, 32, 5, wrong))


def _call(student: nn.Module, x: Tensor) -> Tensor:
    return student(x)


def _examples(target: Callable[[Tensor], Tensor], seed: int, n: int = 7) -> list[Example]:
    inputs = [_normal(48, 64, seed=seed + i) for i in range(n)]
    return [
        Example(inputs=(x,), target=target(x), weight=0.5 + i / n) for i, x in enumerate(inputs)
    ]


class _Memory:
    """Keeps the newest checkpoint, and may end the run at a step."""

    def __init__(self, end_at: int | None = None) -> None:
        self.end_at, self.state = end_at, None
        self.steps: list[int] = []
        self.losses: list[float] = []

    def step(self, done: int, total: int, loss: float) -> None:
        self.steps.append(done)
        self.losses.append(loss)
        if done == self.end_at:
            raise KeyboardInterrupt

    def save(self, state: Mapping[str, Tensor]) -> None:
        self.state = {key: tensor.clone() for key, tensor in state.items()}

    def load(self) -> Mapping[str, Tensor] | None:
        return self.state


def _tune(
    how: Recover,
    student: nn.Module,
    fit: list[Example],
    held_out: list[Example],
    memory: _Memory | None = None,
) -> tuple[float, float]:
    memory = memory or _Memory()
    parameters = free_parameters(student, codes=how.code_rate > 0)
    return how.tune(student, _call, parameters, fit, held_out, memory)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def _same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one | two)


@pytest.fixture(scope="module")
def sets() -> tuple[list[Example], list[Example]]:
    """Examples of the toy with the right scales, to learn from and to judge by."""
    right = _toy()
    with torch.no_grad():
        return _examples(right, 100), _examples(right, 200, n=3)


def test_wrong_scales_and_biases_are_recovered(
    sets: tuple[list[Example], list[Example]],
) -> None:
    student, right, memory = _toy(0.2), _toy(), _Memory()
    how = Recover(n_steps=600, scale_rate=1e-2, rate=1e-2)
    before, after = _tune(how, student, *sets, memory)
    assert before > 0.03
    assert after < 1e-4 * before
    assert after == pytest.approx(velocity_error(student, _call, sets[1]), rel=1e-6)
    assert memory.steps == list(range(1, 601))
    assert sum(memory.losses[-50:]) < 1e-3 * sum(memory.losses[:50])
    # The first layer's scales may grow as the second's shrink; the product is what can be known.
    product, wanted = (one[1].weight @ one[0].weight for one in (student, right))
    assert (product - wanted).norm() < 0.02 * wanted.norm()
    assert not any(p.requires_grad for p in student.parameters())


def _wrong_codes(student: nn.Module, right: nn.Module) -> float:
    """The share of stored codes that differ."""
    pairs = zip(student, right, strict=True)
    differ = [(a.snapped().payload["codes"] != b.snapped().payload["codes"]) for a, b in pairs]
    return float(torch.cat([one.flatten() for one in differ]).float().mean())


@pytest.mark.parametrize("deep", [False, True])
def test_wrong_codes_are_found_again(deep: bool) -> None:
    """Every twentieth code is one off: all are mended, most where layers can make up for another.

    Frozen codes leave nearly all of the error.
    """
    errors = {}
    for rate in (0.0, 0.01):
        student, right = (
            _toy() if deep else nn.Sequential(_layer(16, 64, 1, 0.0)) for _ in range(2)
        )
        with torch.no_grad():
            fit, held_out = _examples(right, 100, n=12), _examples(right, 200, n=3)
        for layer in student:
            codes = layer.quantized.payload["codes"].view(-1)[::20]
            codes += torch.where(codes < 15, 1, -1).to(torch.uint8)
        assert _wrong_codes(student, right) == pytest.approx(0.05, abs=0.001)
        how = Recover(n_steps=400, scale_rate=1e-3, rate=1e-3, code_rate=rate)
        before, errors[rate] = _tune(how, student, fit, held_out)
        assert errors[rate] < before
        wrong = _wrong_codes(student, right)
    assert wrong < 0.025 if deep else wrong == 0
    assert errors[0.01] < (0.2 if deep else 1e-6) * errors[0.0]


def test_one_layers_scales_are_found_again() -> None:
    right, student = _layer(16, 64, 1, 0.0), _layer(16, 64, 1, 0.2)
    with torch.no_grad():
        fit, held_out = _examples(right, 100), _examples(right, 200)
    how = Recover(n_steps=400, scale_rate=2e-2, rate=2e-2)
    _tune(how, student, fit, held_out)
    ratio = student.scales_OG / right.scales_OG
    assert (ratio - 1).abs().max() < 5e-3
    assert student.bias is not None
    assert student.bias.abs().max() < 5e-3
    assert torch.equal(student.quantized.payload["codes"], right.quantized.payload["codes"])


def test_a_wrong_learning_rate_leaves_everything_as_it_was(
    sets: tuple[list[Example], list[Example]],
) -> None:
    student = _toy(0.05)
    started = _state(student)
    before, after = _tune(Recover(n_steps=40, scale_rate=5.0, rate=5.0), student, *sets)
    assert before == after == velocity_error(student, _call, sets[1])
    assert _same(_state(student), started)


def test_what_helps_only_where_it_was_tuned_is_not_kept(
    sets: tuple[list[Example], list[Example]],
) -> None:
    student, memory = _toy(0.05), _Memory()
    started = _state(student)
    misled = [Example(inputs=e.inputs, target=e.target + 1.0, weight=e.weight) for e in sets[0]]
    how = Recover(n_steps=150, scale_rate=1e-2, rate=2e-2)
    before, after = _tune(how, student, misled, sets[1], memory)
    assert memory.losses[-1] < 0.5 * memory.losses[0]
    assert before == after
    assert _same(_state(student), started)


def test_the_loss_is_that_of_a_literal_loop() -> None:
    """Two examples of unlike guidance, of a model that stands still; equal weights cancel."""
    student, share, fit = _toy(0.1), 0.3, []
    for seed, g in ((100, 4.0), (101, 1.0)):
        x, target = _normal(6, 64, seed=seed), _normal(6, 16, seed=seed + 50)
        fit.append(Example(inputs=(x,), target=target, weight=1.5, guidance=g))
    lost, kept = [], []
    for one in fit:
        with torch.no_grad():
            pair = one.target, student(*one.inputs) - one.target
        for found, v in zip((kept, lost), pair, strict=True):
            n, g = (3, one.guidance) if one.guidance != 1 else (6, 1.0)
            guided = [g * v[i] + (1 - g) * v[i + n] if g != 1 else v[i] for i in range(n)]
            branch = [g * g * v[i].square().mean() for i in range(n)]
            branch += [(g - 1) ** 2 * v[i + n].square().mean() for i in range(n if g != 1 else 0)]
            found.append((sum(c.square().mean() for c in guided) / n, sum(branch) / n))
    memory = _Memory()
    _tune(Recover(n_steps=2, scale_rate=1e-9, rate=1e-9, guided=share), student, fit, fit, memory)
    mean = [sum(one[i] for one in kept) / 2 for i in (0, 1)]
    expected = [share * g / mean[0] + (1 - share) * b / mean[1] for g, b in lost]
    assert sorted(memory.losses) == pytest.approx(sorted(float(e) for e in expected), rel=1e-4)


def test_pulling_at_the_guided_velocity_gains_there(
    sets: tuple[list[Example], list[Example]],
) -> None:
    """Where no scale reaches both branches, a share in the loss lowers the guided error."""
    paired = [[replace(one, guidance=4.0) for one in side] for side in sets]
    for side in paired:  # what no scale can reach
        side[:] = [
            replace(one, target=one.target + 0.3 * one.inputs[0][:, :16] * _normal(16, seed=9))
            for one in side
        ]
    errors = [
        _tune(Recover(n_steps=300, scale_rate=1e-2, guided=share), _toy(0.2), *paired)[1]
        for share in (0.0, 0.5)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(("guidance", "n_prompts"), [(4.0, 5), (4.0, 1), (1.0, 5)])
def test_examples_hold_both_branches_of_every_state_once(guidance: float, n_prompts: int) -> None:
    """Against the batches themselves; no example is larger than a batch, but for single states."""
    latents = _normal(n_prompts, 2, 3, seed=1)
    texts = (2.0, 1.0) if guidance != 1 else (2.0,)
    batches = [
        Batch(
            full=(latents, torch.full((n_prompts,), 500.0), torch.full((n_prompts, 1, 1), text)),
            half=(latents, torch.full((n_prompts,), 500.0), torch.full((n_prompts, 1, 1), -text)),
            weight=1.0,
            held_out=True,
        )
        for text in texts
    ]
    full = Chain(nn.ModuleDict({"blocks": nn.ModuleList()}), "blocks", lambda _, x, t, c: x * c)
    spec = SamplerSpec(solver="unipc", n_steps=4, shift=3.0, guidance=guidance)
    found = list(refining._examples(full, batches, spec))
    assert all(held_out and one.guidance == guidance for held_out, one in found)
    assert max(len(one.target) for _, one in found) <= max(n_prompts, len(texts))
    guided = torch.cat([one.guided(one.target) for _, one in found])
    assert torch.equal(guided, latents * (1 + guidance if guidance != 1 else 2))
    assert all(torch.equal(one.target, one.inputs[0] * -one.inputs[2]) for _, one in found)


def test_without_held_out_examples_nothing_is_kept(
    sets: tuple[list[Example], list[Example]],
) -> None:
    student = _toy(0.05)
    started = _state(student)
    assert _tune(Recover(n_steps=5), student, sets[0], []) == (math.inf, math.inf)
    assert _same(_state(student), started)


@pytest.mark.parametrize("code_rate", [0.0, 0.05])
@pytest.mark.parametrize("end_at", [150, 215])
def test_a_resumed_run_ends_as_an_undisturbed_one_bit_for_bit(
    end_at: int, code_rate: float, sets: tuple[list[Example], list[Example]]
) -> None:
    how = Recover(n_steps=230, scale_rate=5e-3, rate=5e-3, code_rate=code_rate)
    undisturbed, killed, resumed = _toy(0.1), _toy(0.1), _toy(0.1)
    errors = _tune(how, undisturbed, *sets)
    memory = _Memory(end_at=end_at)
    with pytest.raises(KeyboardInterrupt):
        _tune(how, killed, *sets, memory)
    assert not _same(_state(killed), _state(undisturbed))
    memory.end_at = None
    memory.steps.clear()
    assert _tune(how, resumed, *sets, memory) == errors
    assert memory.steps == list(range(end_at // 100 * 100 + 1, 231))
    assert _same(_state(resumed), _state(undisturbed))
    assert not _same(_state(resumed), _state(_toy(0.1)))


def test_the_seed_and_nothing_else_decides(sets: tuple[list[Example], list[Example]]) -> None:
    runs = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        student = _toy(0.1)
        torch.manual_seed(noise)
        errors = _tune(Recover(n_steps=20, scale_rate=1e-2, seed=seed), student, *sets)
        runs.append((errors, _state(student)))
    assert runs[0][0] == runs[1][0]
    assert _same(runs[0][1], runs[1][1])
    assert not _same(runs[0][1], runs[2][1])


def test_each_example_is_used_once_an_epoch() -> None:
    for n in (1, 2, 7):
        used = [recover._shuffled(n, step, 3) for step in range(4 * n)]
        for epoch in range(4):
            assert sorted(used[epoch * n : (epoch + 1) * n]) == list(range(n))
    epochs = [[recover._shuffled(7, 7 * epoch + i, 3) for i in range(7)] for epoch in range(4)]
    assert len({tuple(order) for order in epochs}) > 1


@pytest.mark.parametrize("first", [0, 12])
def test_a_loss_that_is_not_finite_ends_the_tuning(
    first: int, sets: tuple[list[Example], list[Example]]
) -> None:
    """The model gives NaN from some forward of the tuning on."""
    student, memory, count = _toy(0.1), _Memory(), 0
    started = _state(student)

    def call(model: nn.Module, x: Tensor) -> Tensor:
        nonlocal count
        out = model(x)
        if torch.is_grad_enabled():
            count += 1
            return out * torch.nan if count > first else out
        return out

    how = Recover(n_steps=50, scale_rate=1e-2, rate=1e-2)
    before, after = how.tune(student, call, free_parameters(student), *sets, memory)
    assert len(memory.steps) == first
    assert math.isfinite(after)
    assert after <= before
    assert after == velocity_error(student, _call, sets[1])
    assert all(bool(torch.isfinite(p).all()) for p in student.parameters())
    assert _same(_state(student), started) == (first == 0)


def test_parameters_that_become_nan_are_put_back(
    sets: tuple[list[Example], list[Example]],
) -> None:
    """A finite loss with a gradient that is not: the harm shows one step later."""
    student = _toy(0.1)
    started = _state(student)

    def call(model: nn.Module, x: Tensor) -> Tensor:
        out = model(x)
        return out + (out.detach() - out).clamp_min(0).sqrt()  # the slope of sqrt at 0

    before, after = Recover(n_steps=5).tune(
        student, call, free_parameters(student), *sets, _Memory()
    )
    assert before == after
    assert math.isfinite(after)
    assert _same(_state(student), started)


@pytest.fixture(scope="module")
def quantized(micro_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Entry:
    """Every linear in the blocks of transformer and text encoder in 4 bits, off by some bias."""
    folder, source = tmp_path_factory.mktemp("quantized"), source_of(micro_wan)
    family = family_of(source)
    for component in ("text_encoder", "transformer"):
        module = family.load(source, component)
        weights = {
            LayerName(f"{component}/{spec.module}"): _quantized(
                module.get_parameter(spec.parameter).data, "int4-g128"
            )
            for spec in family.layers(source)
            if spec.component == component and spec.kind == "linear" and spec.block is not None
        }
        save_block(folder / f"{component}.blocks.safetensors", weights)
    return Entry(folder=folder, stage="quantize", key="k", digest="d")


@pytest.fixture(scope="module")
def seen(micro_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Entry:
    return observed(source_of(micro_wan), tmp_path_factory.mktemp("seen") / "t")


def test_a_component_is_refined_and_a_killed_run_gives_the_same_bytes(
    micro_wan: Path,
    quantized: Entry,
    seen: Entry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recover, "_SAVE_EVERY", 3)
    how = (Recover(n_steps=8, scale_rate=3e-3, rate=1e-3),)
    source = source_of(micro_wan)

    def run(folder: Path) -> dict[str, bytes]:
        folder.mkdir(exist_ok=True)
        refine(Work(folder), source, quantized, seen, 1, how, Machine())
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    undisturbed = run(tmp_path / "one")
    assert undisturbed.keys() == {"text_encoder.safetensors", "transformer.safetensors"}

    step = refining._Checkpoints.step

    def killed(self: refining._Checkpoints, done: int, total: int, loss: float) -> None:
        step(self, done, total, loss)
        if done == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(refining._Checkpoints, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "two")
    assert (tmp_path / "two" / "unfinished" / "transformer.0.checkpoint").exists()
    assert run(tmp_path / "two") == undisturbed

    before, after = QuantizedModel.load(quantized.folder), QuantizedModel.load(tmp_path / "one")
    assert after.weights.keys() == before.weights.keys()
    assert after.floats
    assert all(name.startswith("transformer/") for name in after.floats)
    moved = 0
    for name, weight in after.weights.items():
        assert torch.equal(weight.payload["codes"], before.weights[name].payload["codes"])
        same = torch.equal(weight.payload["scales"], before.weights[name].payload["scales"])
        assert same or name.startswith("transformer/")
        moved += not same
    assert moved > 0


def test_tuning_without_anything_to_judge_by_is_refused(
    micro_wan: Path, quantized: Entry, seen: Entry, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match=r"transformer: .*hold out a prompt"):
        refine(Work(tmp_path), source_of(micro_wan), quantized, seen, 0, (Recover(),), Machine())
