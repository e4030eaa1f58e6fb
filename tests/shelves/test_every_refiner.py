"""Every refiner: codes stay, held-out error never rises, and a kill at any step changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from hbxt_compress.algorithms import REFINERS
from hbxt_compress.algorithms.example import Example, velocity_error
from hbxt_compress.algorithms.scales import search_scales
from hbxt_compress.formats import FORMATS
from hbxt_compress.quantized import Loss, QuantizedWeight
from hbxt_compress.stages.student import QuantizedLinear, free_parameters, tuned

_FMTS = ["int4-g32", "int4-g32-asym", "int4-g64-r16", "int8-channel"]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class _Toy(nn.Module):
    """Two layers with a norm between them, in full precision or quantized."""

    def __init__(self, fmt: str | None) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(64, 128), nn.LayerNorm(128)
        self.second = nn.Linear(128, 72)
        for i, p in enumerate(self.parameters()):
            p.data = _normal(*p.shape, seed=i) / p.shape[-1] ** 0.5
        if fmt is not None:
            self.first, self.second = _rounded(self.first, fmt), _rounded(self.second, fmt)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))


def _rounded(layer: nn.Linear, name: str) -> QuantizedLinear:
    fmt, weight_OI = FORMATS[name if layer.out_features > 72 else name.split("-r")[0]], layer.weight
    grid, low_rank = search_scales(weight_OI.data, fmt), None
    if fmt.rank:
        n_out, n_in = weight_OI.shape
        low_rank = (
            0.02 * _normal(fmt.rank, n_in, seed=7),
            0.02 * _normal(n_out, fmt.rank, seed=8),
        )
    payload = fmt.store(
        grid.levels(weight_OI.data), grid.scales_OG, grid.zeros_OG, low_rank=low_rank
    )
    weight = QuantizedWeight(
        format=fmt.name, payload=payload, shape=tuple(weight_OI.shape), loss=Loss(error=0.0)
    )
    return QuantizedLinear(weight, layer.bias)


def _examples(seed: int, n: int) -> list[Example]:
    original = _Toy(None)
    inputs = [_normal(32, 64, seed=seed + i) for i in range(n)]
    with torch.no_grad():
        return [
            Example(inputs=(x,), target=original(x), weight=0.5 + i / n)
            for i, x in enumerate(inputs)
        ]


_FIT, _HELD_OUT = _examples(100, 6), _examples(200, 3)


def _call(student: nn.Module, x: Tensor) -> Tensor:
    return student(x)


class _Watcher:
    """A progress that may end the run at a step; checkpoints are copies, as in a file."""

    def __init__(self, end_at: int | None = None) -> None:
        self.end_at, self.total, self.n_steps = end_at, 0, 0
        self.state: Mapping[str, Tensor] | None = None

    def step(self, done: int, total: int, loss: float) -> None:
        self.total, self.n_steps = total, self.n_steps + 1
        assert 0 < done <= total
        assert loss >= 0
        if done == self.end_at:
            raise KeyboardInterrupt

    def save(self, state: Mapping[str, Tensor]) -> None:
        self.state = {key: tensor.clone() for key, tensor in state.items()}

    def load(self) -> Mapping[str, Tensor] | None:
        return self.state


def _tuned(
    name: str,
    fmt: str,
    watcher: _Watcher | None = None,
    fit: list[Example] = _FIT,
    call: Callable[..., Tensor] = _call,
) -> tuple[nn.Module, float, float]:
    student = _Toy(fmt)
    before, after = REFINERS[name]().tune(
        student, call, free_parameters(student), fit, _HELD_OUT, watcher or _Watcher()
    )
    return student, before, after


def _stored(student: nn.Module) -> dict[str, Tensor]:
    """All that a file would hold."""
    weights, floats = tuned(student, "transformer")
    payloads = {f"{n}:{key}": t for n, w in weights.items() for key, t in w.payload.items()}
    biases = {f"{n}:bias": w.bias_O for n, w in weights.items() if w.bias_O is not None}
    return {**payloads, **biases, **floats}


def _same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(t, two[name]) for name, t in one.items())


@pytest.mark.parametrize("fmt", _FMTS)
@pytest.mark.parametrize("name", REFINERS)
def test_held_out_error_falls_and_codes_stay(name: str, fmt: str) -> None:
    student, before, after = _tuned(name, fmt)
    assert before == velocity_error(_Toy(fmt), _call, _HELD_OUT)
    assert after == velocity_error(student, _call, _HELD_OUT)
    assert after < before
    first, last = _stored(_Toy(fmt)), _stored(student)
    assert first.keys() == last.keys()
    for key, tensor in first.items():
        assert last[key].dtype == tensor.dtype
        assert last[key].shape == tensor.shape
        assert bool(torch.isfinite(last[key].float()).all())
        if key.endswith((":codes", ":zeros")):
            assert torch.equal(last[key], tensor)
    assert not _same(first, last)


@pytest.mark.parametrize("name", REFINERS)
def test_it_is_still_better_once_it_is_stored(name: str) -> None:
    """Scales and factors are float16 in the file, and the file is what ships."""
    student, before, _ = _tuned(name, "int4-g64-r16")
    weights, _ = tuned(student, "transformer")
    for path, weight in weights.items():
        student.set_submodule(
            path.removeprefix("transformer/"), QuantizedLinear(weight, weight.bias_O)
        )
    assert velocity_error(student, _call, _HELD_OUT) < before


@pytest.mark.parametrize("name", REFINERS)
def test_what_held_out_examples_deny_is_undone(name: str) -> None:
    misleading = [Example(inputs=e.inputs, target=e.target.flip(-1), weight=e.weight) for e in _FIT]
    student, before, after = _tuned(name, "int4-g32", fit=misleading)
    assert after == before
    assert _same(_stored(student), _stored(_Toy("int4-g32")))


@pytest.mark.parametrize("name", REFINERS)
def test_a_model_that_breaks_down_is_left_as_it_was(name: str) -> None:
    def call(student: nn.Module, x: Tensor) -> Tensor:
        return student(x) * (torch.nan if torch.is_grad_enabled() else 1.0)

    student, before, after = _tuned(name, "int4-g32", call=call)
    assert after == before
    assert _same(_stored(student), _stored(_Toy("int4-g32")))


@pytest.mark.parametrize("name", REFINERS)
def test_it_repeats_itself_whatever_others_drew(name: str) -> None:
    found = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        found.append(_tuned(name, "int4-g32"))
    assert found[0][1:] == found[1][1:]
    assert _same(_stored(found[0][0]), _stored(found[1][0]))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("name", REFINERS)
def test_a_killed_run_ends_as_an_undisturbed_one(name: str, share: float) -> None:
    whole = _Watcher()
    student, *errors = _tuned(name, "int4-g32", whole)
    watcher = _Watcher(end_at=max(1, int(share * whole.total)))
    with pytest.raises(KeyboardInterrupt):
        _tuned(name, "int4-g32", watcher)
    done, watcher.end_at, watcher.n_steps = watcher.n_steps, None, 0
    resumed, *errors_again = _tuned(name, "int4-g32", watcher)
    assert errors_again == errors
    assert _same(_stored(resumed), _stored(student))
    if share > 0.5:
        assert watcher.n_steps < whole.n_steps  # it went on, it did not begin again
        assert watcher.n_steps + done >= whole.n_steps


@pytest.mark.parametrize("name", REFINERS)
def test_a_refiner_can_be_written_in_a_recipe(name: str) -> None:
    kind = REFINERS[name]
    assert kind.model_validate_json(kind().model_dump_json()) == kind()
    assert kind.VERSION >= 1
