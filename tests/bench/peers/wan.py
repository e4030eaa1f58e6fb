"""The model and its calibration inputs as torch peers want them (needs torch and diffusers).

Two views of one WanTransformer3DModel, sharing its Linear modules:
    load()      the diffusers module itself, called with a dict of its own arguments
    Packed      only the blocks, each a module of one tensor, for peers that quantize block by block
                and hand a single tensor from one block to the next, as language models do. Wan's
                blocks also need the text and the timestep of each sample, so those travel with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["Packed", "linears", "load", "samples", "to_numpy"]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    """The transformer in eval mode; its file is float16, so float16 and float32 lose nothing."""
    model = WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype)
    return model.eval().requires_grad_(False)


def samples(inputs: Path, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """One dict of arguments per call of the transformer that calibration has seen."""
    found = load_file(inputs / "calibration.safetensors")
    rows = zip(found["latents"], found["timestep"], found["text"], strict=True)
    return [
        {
            "hidden_states": latents[None].to(dtype),
            "timestep": timestep[None],
            "encoder_hidden_states": text[None].to(dtype),
        }
        for latents, timestep, text in rows
    ]


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that are compared, by their names in the diffusers module."""
    return {
        name.replace(".inner.", "."): module
        for name, module in model.named_modules()
        if name.startswith("blocks.") and getattr(module, "in_features", 0)
    }


def to_numpy(weights: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: one.detach().float().cpu().numpy() for name, one in weights.items()}


class _Block(nn.Module):
    """A block of one tensor: tokens, text and timestep side by side along the sequence."""

    def __init__(self, inner: nn.Module, sizes: list[int], rotary: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.inner, self.sizes, self.rotary = inner, sizes, rotary

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor:
        tokens, text, timestep = hidden_states.split(self.sizes, dim=1)
        rotary = tuple(one.to(hidden_states.device) for one in self.rotary)
        tokens = self.inner(tokens, text, timestep, rotary)
        return torch.cat([tokens, text, timestep], dim=1)


class Packed(nn.Module):
    """The blocks alone. `rows` are their packed inputs, one per sample, computed once."""

    def __init__(self, model: nn.Module, calls: Iterable[dict[str, Tensor]]) -> None:
        super().__init__()
        seen: list[tuple[Tensor, ...]] = []
        handle = model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args))
        with torch.no_grad():
            for call in calls:
                model(**call)
        handle.remove()
        self.rows = [torch.cat(args[:3], dim=1) for args in seen]
        sizes = [one.shape[1] for one in seen[0][:3]]
        self.blocks = nn.ModuleList(_Block(one, sizes, seen[0][3]) for one in model.blocks)
        self.config = model.config

    @property
    def device(self) -> torch.device:
        return self.rows[0].device

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states
