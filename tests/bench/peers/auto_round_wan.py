"""AutoRound's own diffusion route, which knows Wan's blocks, on a pipeline that replays our inputs.

AutoRound drives a diffusers pipeline by prompts. Here every "prompt" is the index of a calibration
sample, and the pipeline's call is one call of the transformer with that sample.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import host
import torch
import wan
from auto_round import AutoRound
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Replay(DiffusionPipeline):
    """Calls the transformer with recorded samples instead of denoising."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)
        self.samples: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def __call__(self, prompts: list[str], **_: object) -> None:
        for prompt in prompts:
            call = self.samples[int(prompt)]
            self.transformer(**{name: one.to(self.transformer.dtype) for name, one in call.items()})


def _tune(case: host.Case, group: int, iters: int, sym: bool = True) -> host.Outcome:
    pipe = Replay(wan.load(case.transformer))
    pipe.samples = wan.samples(case.inputs)
    names = [str(i) for i in range(len(pipe.samples))]
    settings: dict[str, Any] = {"bits": 4, "group_size": group, "sym": sym, "iters": iters}
    with case.clock:
        tuner = AutoRound(
            pipe,
            scheme="W4A16",
            dataset=DataLoader(list(zip(names, names, strict=True)), batch_size=1),
            nsamples=len(names),
            calib_num_inference_steps=1,
            device_map="cpu",
            amp=False,  # else it casts the model to bfloat16, which loses bits of a float16 one
            **settings,
        )
        model, _ = tuner.quantize()
    weights, stored = {}, {"codes": 0, "scales": 0, "zero_points": 0}
    for name, layer in wan.linears(model).items():
        weights[name] = layer.weight
        stored["codes"] += layer.weight.numel() // 2
        stored["scales"] += layer.scale.numel() * 2  # the packed formats keep float16 scales
        stored["zero_points"] += 0 if sym else layer.scale.numel() // 2
    settings |= {"scheme": "W4A16", "nsamples": len(names), "scale_dtype": str(layer.scale.dtype)}
    return host.Outcome(wan.to_numpy(weights), stored, settings)


METHODS = {
    "RTN optimized g128": partial(_tune, group=128, iters=0),
    "200 iters g128": partial(_tune, group=128, iters=200),
    "200 iters g64": partial(_tune, group=64, iters=200),
    "1000 iters g64": partial(_tune, group=64, iters=1000),
}

if __name__ == "__main__":
    host.run("auto-round", METHODS)
