"""Whatever rounds or prepares does so on the device of its rows, with the same outcome."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hbxt_compress.algorithms import INPUT_PREPARERS, PAIR_PREPARERS, ROUNDERS
from hbxt_compress.algorithms.choose import choose_mixing, choose_transform
from hbxt_compress.algorithms.diagnose import measure
from hbxt_compress.formats import FORMATS
from hbxt_compress.formats.activations import ACTIVATIONS
from hbxt_compress.stats import LayerInputs, LayerStats
from tests.pretend import DEVICE, OtherDevice, back, there

_N_OUT, _N_IN, _HEADS = 32, 64, 2
_FORMATS = ["int8-channel", "int4-g64", "int4-g32-asym-r16"]


def _numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _inputs(*, elsewhere: bool) -> LayerInputs:
    """Rows of which some columns are much louder, so that preparers find something to do."""
    loud_I = torch.linspace(-2, 2, _N_IN).exp()
    sides = []
    for seed in (1, 2):
        x, noise = _numbers(300, _N_IN, seed=seed) * loud_I, _numbers(300, _N_IN, seed=seed + 5)
        rows = x, x + 0.05 * noise * loud_I
        x, y = (there(one) for one in rows) if elsewhere else rows
        sides.append(LayerStats.empty(_N_IN, "covariance", DEVICE if elsewhere else None))
        sides[-1].add(x, y)
    return LayerInputs(fit=sides[0], held_out=sides[1], takes_bias=True)


def _weight(*, elsewhere: bool, n_out: int = _N_OUT) -> Tensor:
    weight_OI = _numbers(n_out, _N_IN, seed=9)
    return there(weight_OI) if elsewhere else weight_OI


@torch.no_grad()
@pytest.mark.parametrize("name", _FORMATS)
@pytest.mark.parametrize("rounder", sorted(ROUNDERS))
def test_rounding(rounder: str, name: str) -> None:
    how, fmt, found = ROUNDERS[rounder](), FORMATS[name], []
    with OtherDevice():
        for elsewhere in (False, True):
            weight_OI, inputs = _weight(elsewhere=elsewhere), _inputs(elsewhere=elsewhere)
            rounded = how.round(weight_OI, inputs, fmt)
            decoded_OI = fmt.decode(rounded.payload)
            assert decoded_OI.device == weight_OI.device
            loss = measure(weight_OI, decoded_OI, rounded.shift_O, inputs, 4.25, rounded.target_OI)
            found.append((back(dict(rounded.payload)), back(rounded.shift_O), loss))
    (payload, shift_O, loss), (other, other_shift_O, other_loss) = found
    assert payload.keys() == other.keys()
    for key in payload:
        assert torch.equal(payload[key], other[key])
    assert loss == other_loss
    assert shift_O is None or torch.equal(shift_O, other_shift_O)


@torch.no_grad()
@pytest.mark.parametrize("preparer", sorted(INPUT_PREPARERS))
def test_preparing_an_input(preparer: str) -> None:
    maker, found = INPUT_PREPARERS[preparer](), []
    with OtherDevice():
        for elsewhere in (False, True):
            weights, inputs = [_weight(elsewhere=elsewhere)], _inputs(elsewhere=elsewhere)
            fmts = [FORMATS["int8-channel"]]
            candidates = list(maker.candidates(weights, inputs))
            chosen = choose_transform(
                weights, inputs, fmts, candidates, -1e9, activation=ACTIVATIONS["int8-token"]
            )
            name, transform, gain_db = chosen
            assert transform.weight(weights[0]).device == weights[0].device
            assert transform.inputs(inputs).fit.absmax_I.device == weights[0].device
            found.append((name, gain_db))
    assert found[0] == found[1]


@torch.no_grad()
@pytest.mark.parametrize("preparer", sorted(PAIR_PREPARERS))
def test_mixing_between_two_layers(preparer: str) -> None:
    maker, found = PAIR_PREPARERS[preparer](), []
    with OtherDevice():
        for elsewhere in (False, True):
            first_FI = _weight(elsewhere=elsewhere, n_out=_N_IN)
            second_OF, inputs = _weight(elsewhere=elsewhere), _inputs(elsewhere=elsewhere)
            fmts = FORMATS["int4-g64"], FORMATS["int4-g64"]
            candidates = list(maker.candidates(first_FI, second_OF, inputs, _HEADS))
            name, mixing, gain_db = choose_mixing(
                first_FI, second_OF, inputs, inputs, fmts, candidates, -1e9
            )
            weight, bias = mixing.first(first_FI, first_FI[:, 0])
            assert weight.device == first_FI.device
            assert bias is not None
            found.append((name, gain_db))
    assert found[0] == found[1]


def test_the_other_device_does_not_mix_with_the_first() -> None:
    with OtherDevice(), pytest.raises(RuntimeError, match="of the CPU among those of lazy:0"):
        there(torch.ones(2)) + torch.ones(2)
