"""Transformers as Wan's own code names them: read off its `WanModel`, not off a table of ours."""

from __future__ import annotations

from hbxt_compress.torchvision_ops import mend_torchvision

mend_torchvision()

import torch  # noqa: E402
from diffusers import WanTransformer3DModel  # noqa: E402
from diffusers.loaders.lora_conversion_utils import (  # noqa: E402
    _convert_non_diffusers_wan_lora_to_diffusers as diffusers_lora,
)
from diffusers.loaders.single_file_utils import (  # noqa: E402
    convert_wan_transformer_to_diffusers as diffusers_names,
)
from torch import Tensor  # noqa: E402

__all__ = [
    "WanTransformer3DModel", "diffusers_lora", "diffusers_names", "original_shapes",
    "original_tensors",
]  # fmt: skip


def original_shapes(
    dim: int, ffn: int, n_layers: int, channels: int, text: int, freq: int
) -> dict[str, tuple[int, ...]]:
    """Every parameter of WanModel(model_type='ti2v', cross_attn_norm=True, qk_norm=True)."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, n_in: int, n_out: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (n_out, n_in), (n_out,)

    shapes["patch_embedding.weight"] = (dim, channels, 1, 2, 2)
    shapes["patch_embedding.bias"] = (dim,)
    linear("text_embedding.0", text, dim)
    linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", freq, dim)
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", dim, 6 * dim)
    for i in range(n_layers):
        at = f"blocks.{i}"
        for attention in ("self_attn", "cross_attn"):
            for one in "qkvo":
                linear(f"{at}.{attention}.{one}", dim, dim)
            shapes[f"{at}.{attention}.norm_q.weight"] = (dim,)
            shapes[f"{at}.{attention}.norm_k.weight"] = (dim,)
        shapes[f"{at}.norm3.weight"] = shapes[f"{at}.norm3.bias"] = (dim,)
        linear(f"{at}.ffn.0", dim, ffn)
        linear(f"{at}.ffn.2", ffn, dim)
        shapes[f"{at}.modulation"] = (1, 6, dim)
    linear("head.head", dim, channels * 4)
    shapes["head.modulation"] = (1, 2, dim)
    return shapes


def original_tensors(dtype: torch.dtype = torch.bfloat16, seed: int = 3) -> dict[str, Tensor]:
    """Random weights for the micro model of tests/micro.py; no two tensors are alike."""
    random = torch.Generator().manual_seed(seed)
    shapes = original_shapes(dim=128, ffn=256, n_layers=2, channels=4, text=128, freq=64)
    return {
        name: (0.02 * torch.randn(shape, generator=random)).to(dtype)
        for name, shape in shapes.items()
    }
