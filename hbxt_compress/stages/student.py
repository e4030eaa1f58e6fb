"""Student: a quantized component as a torch module whose scales, biases and norms can be tuned.

Scales move by a factor exp(g) a group, so that one step size suits all of them; everything else
that is no weight matrix moves directly. Codes are frozen, unless they are asked for: then each of
at most 4 bit is the nearest to a number that moves (straight-through estimator, Bengio et al. 2013,
arXiv 1308.3432).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hbxt_compress.algorithms.transform import Transform
from hbxt_compress.chain import layer_at
from hbxt_compress.formats import FORMATS, WeightFormat
from hbxt_compress.layers import LayerName
from hbxt_compress.quantized import QuantizedWeight

__all__ = ["QuantizedLinear", "free_parameters", "make_student", "tuned"]

_FACTORS = ("down", "up")
_MOST_LEVELS = 16  # finer codes are near enough as they are


class _Nearest(torch.autograd.Function):
    """The nearest whole number in a range; its gradient is passed on as if it were the number."""

    @staticmethod
    def forward(ctx: object, number: Tensor, low: int, high: int) -> Tensor:
        return number.round().clamp_(low, high)

    @staticmethod
    def backward(ctx: object, *gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[0], None, None


class QuantizedLinear(nn.Module):
    """A linear layer that computes with its codes; differentiable in scales, factors and bias.

    gain_OG: logarithm of what the stored scales are multiplied by. The bias is float32 O or None.
    codes_OI: float32 numbers that codes are nearest to, once `thaw` was called; else None.
    """

    def __init__(self, weight: QuantizedWeight, bias_O: Tensor | None) -> None:
        super().__init__()
        self.quantized = weight
        self.gain_OG = nn.Parameter(torch.zeros_like(weight.payload["scales"], dtype=torch.float32))
        self.factors = nn.ParameterDict(
            {
                key: nn.Parameter(weight.payload[key].float())
                for key in _FACTORS
                if key in weight.payload
            }
        )
        self.bias = None if bias_O is None else nn.Parameter(bias_O.detach().float().clone())
        self.codes_OI: nn.Parameter | None = None

    def thaw(self) -> nn.Parameter | None:
        """Makes codes movable, where they have 4 bits or less; the numbers they are nearest to."""
        if self.codes_OI is None and sum(self._format.n_levels) < _MOST_LEVELS:
            self.codes_OI = nn.Parameter(self.quantized.payload["codes"].float())
        return self.codes_OI

    @property
    def weight(self) -> Tensor:
        """The effective float32 weight O I; some model code asks a linear for its dtype."""
        stored = self.quantized.payload
        payload = {**stored, **self.factors, "scales": self.scales_OG, "codes": self._codes()}
        return _undone(Transform.of(stored), self._format.decode(payload))

    @property
    def scales_OG(self) -> Tensor:
        """The tuned scales, float32."""
        return self.quantized.payload["scales"].float() * self.gain_OG.exp()

    @property
    def _format(self) -> WeightFormat:
        return FORMATS[self.quantized.format]

    def _codes(self) -> Tensor:
        """O I, as they are stored, or whole float32 numbers with a gradient."""
        stored_OI = self.quantized.payload["codes"]
        if self.codes_OI is None:
            return stored_OI
        below, above = self._format.n_levels
        low = -below if stored_OI.dtype.is_signed else 0
        codes_OI: Tensor = _Nearest.apply(self.codes_OI, low, low + below + above)
        return codes_OI

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def snapped(self) -> QuantizedWeight:
        """The weight as it is stored: scales and factors rounded to float16."""
        payload = dict(self.quantized.payload)
        payload["scales"] = _half(self.scales_OG, payload["scales"])
        payload["codes"] = self._codes().detach().to(payload["codes"].dtype)
        for key, factor in self.factors.items():
            payload[key] = _half(factor, payload[key])
        bias = None if self.bias is None else self.bias.detach().clone()
        return replace(self.quantized, payload=payload, bias_O=bias)


def make_student(
    module: nn.Module, component: str, weights: Mapping[LayerName, QuantizedWeight]
) -> nn.Module:
    """A copy of a full-precision component with its quantized linears in it, nothing trainable.

    Tables stay as they are.
    """
    student = copy.deepcopy(module).requires_grad_(False)
    for name, weight in weights.items():
        path = name.removeprefix(f"{component}/")
        if path == name or len(weight.shape) != 2:
            continue
        if not isinstance(student.get_submodule(path), nn.Embedding):
            layer = layer_at(student, path)
            bias = layer.bias if weight.bias_O is None else weight.bias_O
            payload = {key: part.to(layer.weight.device) for key, part in weight.payload.items()}
            weight = replace(weight, payload=payload)
            student.set_submodule(path, QuantizedLinear(weight, bias))
    return student.requires_grad_(False)


def free_parameters(student: nn.Module, *, codes: bool = False) -> dict[str, list[nn.Parameter]]:
    """What may be tuned, by kind: scales, factors, biases, norms (norm weights, modulation), codes.

    codes: whether codes of at most 4 bit may move as well; else that list is empty.
    """
    kinds: dict[str, list[nn.Parameter]] = {
        kind: [] for kind in ("scales", "factors", "biases", "norms", "codes")
    }
    for module in student.modules():
        if isinstance(module, QuantizedLinear):
            movable = module.thaw() if codes else None
            kinds["codes"] += [] if movable is None else [movable]
            kinds["scales"].append(module.gain_OG)
            kinds["factors"] += list(module.factors.values())
            kinds["biases"] += [] if module.bias is None else [module.bias]
    kinds["norms"] += [parameter for _, parameter in _norms(student)]
    return kinds


def tuned(
    student: nn.Module, component: str
) -> tuple[dict[LayerName, QuantizedWeight], dict[str, Tensor]]:
    """(quantized weights, other changed parameters by `<component>/<path>`), as they are stored."""
    weights = {
        LayerName(f"{component}/{path}"): module.snapped()
        for path, module in student.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    floats = {
        f"{component}/{path}": parameter.detach().clone() for path, parameter in _norms(student)
    }
    return weights, floats


def _norms(student: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Norm weights and biases and modulation tables: what belongs to no linear or convolution."""
    owned = {
        id(parameter)
        for module in student.modules()
        if isinstance(module, (QuantizedLinear, nn.Linear, nn.Conv2d, nn.Conv3d, nn.Embedding))
        for parameter in module.parameters()
    }
    return [(path, p) for path, p in student.named_parameters() if id(p) not in owned]


def _half(value: Tensor, before: Tensor) -> Tensor:
    """float16, or what was stored before where float16 cannot hold it."""
    half = value.detach().to(torch.float16)
    return torch.where(torch.isfinite(half) & (half != 0), half, before)


def _undone(transform: Transform, decoded_OI: Tensor) -> Tensor:
    return decoded_OI if transform.is_identity else transform.undo(decoded_OI)
