"""Wan's VAE in both kinds with few channels and random weights, and clip sizes for it."""

from __future__ import annotations

from hbxt_compress.torchvision_ops import mend_torchvision

mend_torchvision()

import torch  # noqa: E402
from diffusers import AutoencoderKLWan  # noqa: E402
from torch import nn  # noqa: E402

from hbxt_compress.geometry import Geometry  # noqa: E402
from hbxt_compress.manifest import Bucket  # noqa: E402
from hbxt_compress.tile import Tile  # noqa: E402

__all__ = ["bucket_of", "small_vae", "uneven"]


def small_vae(*, residual: bool, base_dim: int = 8) -> AutoencoderKLWan:
    """Wan2.2's kind, residual and of patches (8 pixels to a latent), or Wan2.1's (4)."""
    torch.manual_seed(0)
    options = (
        {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
        if residual
        else {}
    )
    module = AutoencoderKLWan(
        base_dim=base_dim, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1,
        temperal_downsample=[True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4, **options,
    )  # fmt: skip
    return uneven(module)


def uneven(module: nn.Module) -> nn.Module:
    """The module with norms' weights that are not all one, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name or name.endswith("gamma"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def bucket_of(
    vae: AutoencoderKLWan, latents: tuple[int, int, int] = (5, 4, 4), tile: Tile | None = None
) -> Bucket:
    """A clip of latents T H W."""
    n_latents, height, width = latents
    factor = 2 ** (len(vae.config.dim_mult) - 1) * (vae.config.patch_size or 1)
    return Bucket(
        geometry=Geometry(
            height=height * factor, width=width * factor, n_frames=4 * n_latents - 3, fps=8.0
        ),
        latent_shape=(vae.config.z_dim, *latents),
        transformer="model.onnx",
        first="model_first.onnx",
        next="model.onnx",
        tile=tile,
    )
