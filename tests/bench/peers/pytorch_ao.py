"""torchao: quantize_() on the torch module."""

from __future__ import annotations

from functools import partial

import host
import torch
import wan
from torch import nn
from torchao.quantization import (
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    quantize_,
)


def _quantize(case: host.Case, config: object) -> host.Outcome:
    model = wan.load(case.transformer, torch.float16)
    wanted = set(wan.linears(model))
    with case.clock:
        quantize_(model, config, lambda module, name: isinstance(module, nn.Linear) and name in wanted)
    return host.Outcome({}, {}, {"config": str(config)})


METHODS = {}

if __name__ == "__main__":
    host.run("torchao", METHODS)
