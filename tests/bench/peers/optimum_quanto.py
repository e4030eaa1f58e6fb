"""optimum-quanto: quantize() and freeze() on the torch module, with its default max optimizer."""

from __future__ import annotations

from functools import partial

import host
import torch
import wan
from optimum.quanto import HqqOptimizer, freeze, qint4, quantize
from torch import Tensor


def _quantize(case: host.Case, **options: object) -> host.Outcome:
    model = wan.load(case.transformer, torch.float16)  # its scales have the weights' dtype
    with case.clock:
        quantize(model, exclude=["condition_embedder*", "proj_out*"], **options)
        freeze(model)
    weights, stored = {}, {}
    for name, layer in wan.linears(model).items():
        weights[name] = layer.weight.dequantize()
        for kind, tensor in _parts(layer.weight).items():
            stored[kind] = stored.get(kind, 0) + tensor.nbytes
    settings = {name: str(one) for name, one in options.items()} | {"dtype": "float16"}
    return host.Outcome(wan.to_numpy(weights), stored, settings)


def _parts(weight: Tensor) -> dict[str, Tensor]:
    """The plain tensors behind a quantized one, by a name that says what and how wide."""
    found: dict[str, Tensor] = {}
    for name in weight.__tensor_flatten__()[0]:
        inner = getattr(weight, name)
        if hasattr(inner, "__tensor_flatten__"):
            found |= _parts(inner)
        else:
            found[f"{name} {inner.dtype}"] = inner
    return found


METHODS = {
    "qint4": partial(_quantize, weights=qint4),
    "qint4 HQQ": partial(_quantize, weights=qint4, optimizer=HqqOptimizer()),
}

if __name__ == "__main__":
    host.run("optimum-quanto", METHODS)
