"""optimum-quanto: quantize() and freeze() on the torch module, with its default max optimizer."""

from __future__ import annotations

from functools import partial

import host
import torch
import wan
from optimum.quanto import freeze, qint4, qint8, quantize
from optimum.quanto.tensor import QTensor
from torch import nn


class _Blocks(nn.Module):
    """Only what is to be quantized: `include` of quantize() takes patterns of whole names."""


def _quantize(case: host.Case, weights: object) -> host.Outcome:
    # its scales have the dtype of the weights they stand for
    model = wan.load(case.transformer, torch.float16)
    with case.clock:
        quantize(model, weights=weights, exclude=["condition_embedder*", "proj_out*"])
        freeze(model)
    done, stored = {}, {}
    for name, layer in wan.linears(model).items():
        assert isinstance(layer.weight, QTensor), name
        done[name] = layer.weight.dequantize()
        for kind, tensor in _parts(layer.weight).items():
            stored[kind] = stored.get(kind, 0) + tensor.nbytes
    group = getattr(layer.weight, "_group_size", None)
    return host.Outcome(
        wan.to_numpy(done), stored, {"weights": str(weights), "group": group, "dtype": "float16"}
    )


def _parts(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The plain tensors behind a quantized one, by a name that says what and how wide."""
    found: dict[str, torch.Tensor] = {}
    for name in weight.__tensor_flatten__()[0]:
        inner = getattr(weight, name)
        if hasattr(inner, "__tensor_flatten__") and type(inner) is not torch.Tensor:
            found |= {f"{name}{key}": one for key, one in _parts(inner).items()}
        else:
            found[f"{name} {inner.dtype}"] = inner
    return found


METHODS = {
    "qint4 (its group of 128)": partial(_quantize, weights=qint4),
    "qint8": partial(_quantize, weights=qint8),
}

if __name__ == "__main__":
    host.run("optimum-quanto", METHODS)
