"""Every rounder on every quantizing format: deterministic, storable, no worse than it must be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hbxt_compress.algorithms import ROUNDERS, Rounder
from hbxt_compress.algorithms.diagnose import measure
from hbxt_compress.algorithms.rtn import Rtn
from hbxt_compress.formats import FORMATS
from hbxt_compress.stats import LayerInputs, LayerStats

_QUANTIZING = [name for name in FORMATS if not name.startswith("fp")]
_SOME = ["int4-g128", "int4-g32-asym", "int4-g64-r16", "int8-channel"]


def _gauss(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _stats(x: Tensor) -> LayerStats:
    stats = LayerStats.empty(x.shape[-1], "covariance")
    stats.add(x, x + 0.01 * _gauss(*x.shape, seed=77))
    return stats


def _inputs(n_inputs: int = 256, *, rows: int = 2000, takes_bias: bool = True) -> LayerInputs:
    """Correlated inputs with channels of different size, and a mean."""
    mixing = _gauss(n_inputs, n_inputs, seed=8) / n_inputs**0.5
    mixing *= torch.exp(0.5 * _gauss(n_inputs, seed=9))
    fit, held_out = (_stats(_gauss(rows, n_inputs, seed=seed) @ mixing + 0.3) for seed in (10, 11))
    return LayerInputs(fit=fit, held_out=held_out, takes_bias=takes_bias)


def _error(rounder: Rounder, weight_OI: Tensor, inputs: LayerInputs, fmt: str) -> float:
    rounded = rounder.round(weight_OI, inputs, FORMATS[fmt])
    decoded = FORMATS[fmt].decode(rounded.payload)
    return measure(weight_OI, decoded, rounded.shift_O, inputs, 4.0).error


@pytest.mark.parametrize("fmt", _QUANTIZING)
@pytest.mark.parametrize("name", ROUNDERS)
def test_rounding_is_deterministic_and_storable(name: str, fmt: str) -> None:
    weight, inputs = _gauss(144, 256), _inputs(rows=600)
    one, two = (ROUNDERS[name]().round(weight, inputs, FORMATS[fmt]) for _ in range(2))
    assert one.notes == two.notes
    for key, tensor in one.payload.items():
        assert torch.equal(tensor, two.payload[key])
        assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
    decoded = FORMATS[fmt].decode(one.payload)
    assert decoded.shape == weight.shape
    assert measure(weight, decoded, one.shift_O, inputs, 4.0).error < 0.02
    assert one.shift_O is None or one.shift_O.shape == (144,)


@pytest.mark.parametrize("fmt", _SOME)
@pytest.mark.parametrize("name", ROUNDERS)
def test_what_it_needs_is_what_it_takes(name: str, fmt: str) -> None:
    rounder, weight = ROUNDERS[name](), _gauss(144, 256)
    if rounder.need is None:
        assert rounder.round(weight, None, FORMATS[fmt]).shift_O is None
    else:
        with pytest.raises(ValueError, match="calibrate"):
            rounder.round(weight, None, FORMATS[fmt])


@pytest.mark.parametrize("fmt", _SOME)
@pytest.mark.parametrize("name", [n for n in ROUNDERS if n != "rtn"])
def test_knowing_the_inputs_is_worth_something(name: str, fmt: str) -> None:
    """More than 3 dB over nearest rounding on correlated inputs, with the same bytes."""
    weight, inputs = _gauss(144, 256), _inputs()
    least = _error(Rtn(), weight, inputs, fmt)
    assert _error(ROUNDERS[name](), weight, inputs, fmt) < 0.5 * least


@pytest.mark.parametrize("fmt", _SOME)
@pytest.mark.parametrize("name", ROUNDERS)
@pytest.mark.parametrize("what", ["few rows", "dead channel", "zero group", "outlier", "no input"])
def test_bad_luck_gives_a_finite_weight(name: str, fmt: str, what: str) -> None:
    weight, inputs = _gauss(144, 256), _inputs(rows=8 if what == "few rows" else 600)
    if what == "zero group":
        weight[3, :128] = 0
    if what == "outlier":
        weight[5, 7] = 1e4
    if what in ("dead channel", "no input"):
        x = _gauss(600, 256) * (0.0 if what == "no input" else 1.0)
        x[:, 5] = 0
        dead = LayerStats.empty(256, "covariance")
        dead.add(x, x)
        inputs = LayerInputs(fit=dead, held_out=dead, takes_bias=True)
    rounded = ROUNDERS[name]().round(weight, inputs, FORMATS[fmt])
    decoded = FORMATS[fmt].decode(rounded.payload)
    assert bool(torch.isfinite(decoded).all())
    assert rounded.shift_O is None or bool(torch.isfinite(rounded.shift_O).all())
    if what == "zero group":
        assert bool((decoded[3, :128].abs() <= 0.51 * weight[3].abs().max()).all())
    if what == "outlier":
        assert decoded[5, 7] == pytest.approx(1e4, rel=0.1)
