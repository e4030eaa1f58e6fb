"""torchao: quantize_() on the torch module, with the int4 configuration it has for CPUs.

Its GPTQ asks for CUDA and for a package of CUDA kernels; that row says so. AWQ keeps all inputs and
runs them through every layer for every scale it tries: 55 samples took more than 20
minutes, so it gets 14 of the 1536, every step and guidance branch among them.
"""

from __future__ import annotations

from functools import partial

import host
import torch
import wan
from torch import Tensor, nn
from torchao.prototype.awq import AWQConfig
from torchao.prototype.gptq import GPTQConfig
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int4WeightOnlyConfig, quantize_

_EVERY = 115  # of the samples, for AWQ


def _quantize(
    case: host.Case, group: int, qparams: str = "tinygemm", around: type | None = None
) -> host.Outcome:
    model = wan.load(case.transformer)
    wanted = set(wan.linears(model))
    base = PrototypeInt4WeightOnlyConfig(group, int4_choose_qparams_algorithm=qparams)
    if around is GPTQConfig:
        base = Int4WeightOnlyConfig(group)

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name in wanted

    with case.clock:
        if around is None:
            quantize_(model, base, chosen)
        else:
            first, last = ("observe", "convert") if around is GPTQConfig else ("prepare", "convert")
            quantize_(model, around(base_config=base, step=first), chosen)
            with torch.no_grad():
                for call in wan.samples(case.inputs)[:: _EVERY if around is AWQConfig else 1]:
                    model(**call)
            quantize_(model, around(base_config=base, step=last), chosen)
    weights, stored = {}, {}
    for name, layer in wan.linears(model).items():
        identity = torch.eye(layer.in_features)
        weights[name] = nn.functional.linear(identity, layer.weight).T
        for kind, tensor in _parts(layer.weight).items():
            stored[kind] = stored.get(kind, 0) + tensor.nbytes
    return host.Outcome(wan.to_numpy(weights), stored, {"config": str(base), "around": str(around)})


def _parts(weight: Tensor) -> dict[str, Tensor]:
    return {
        f"{name} {getattr(weight, name).dtype}": getattr(weight, name)
        for name in weight.__tensor_flatten__()[0]
    }


METHODS = {
    "int4 tinygemm g128": partial(_quantize, group=128),
    "int4 HQQ g128": partial(_quantize, group=128, qparams="hqq"),
    "int4 AWQ g128": partial(_quantize, group=128, around=AWQConfig),
    "int4 GPTQ g128": partial(_quantize, group=128, around=GPTQConfig),
}

if __name__ == "__main__":
    host.run("torchao", METHODS)
