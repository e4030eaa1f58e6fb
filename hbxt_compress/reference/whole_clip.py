"""AutoencoderKLWan on a whole clip at once: the numbers of its chunk loop, several times faster.

diffusers feeds the Wan VAE one latent frame at a time through feature caches. Causal convolutions
give the same result on the whole sequence; only the temporal resamplers treat the first frame
apart, which is restated here. Training needs the speed; tests hold it against diffusers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample
from torch import Tensor

__all__ = ["decode", "encode"]


def _down(layer: WanResample, x: Tensor) -> Tensor:
    x = _resample_2d(layer, x)
    if layer.mode == "downsample3d":
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    return x


def _up(layer: WanResample, x: Tensor) -> Tensor:
    if layer.mode == "upsample3d":
        first, rest = x[:, :, :1], layer.time_conv(x[:, :, 1:])
        b, _, t, h, w = rest.shape
        rest = rest.view(b, 2, -1, t, h, w).permute(0, 2, 3, 1, 4, 5).reshape(b, -1, 2 * t, h, w)
        x = torch.cat([first, rest], dim=2)
    return _resample_2d(layer, x)


def _resample_2d(layer: WanResample, x: Tensor) -> Tensor:
    b, c, t, h, w = x.shape
    y = layer.resample(x.transpose(1, 2).reshape(b * t, c, h, w))
    return y.view(b, t, *y.shape[1:]).transpose(1, 2)


def encode(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """Moments of the latents, B 2Z T' H' W', of clips B 3 T H W in [-1, 1] with T = 1 mod 4."""
    p = vae.config.patch_size or 1
    b, c, t, h, w = clips.shape
    x = clips.view(b, c, t, h // p, p, w // p, p).permute(0, 1, 6, 4, 2, 3, 5)
    x = x.reshape(b, c * p * p, t, h // p, w // p)
    net = vae.encoder
    x = net.conv_in(x)
    for block in net.down_blocks:
        shortcut = block.avg_shortcut(x)
        for resnet in block.resnets:
            x = resnet(x)
        if block.downsampler is not None:
            x = _down(block.downsampler, x)
        x = x + shortcut
    x = net.mid_block(x)
    return vae.quant_conv(net.conv_out(F.silu(net.norm_out(x))))


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Clips B 3 T H W (about [-1, 1], not clamped) of unnormalised latents B Z T' H' W'."""
    net = vae.decoder
    x = net.mid_block(net.conv_in(vae.post_quant_conv(latents)))
    for block in net.up_blocks:
        start = x
        for resnet in block.resnets:
            x = resnet(x)
        if block.upsampler is not None:
            x = _up(block.upsampler, x)
        if block.avg_shortcut is not None:
            x = x + block.avg_shortcut(start, first_chunk=True)
    x = net.conv_out(F.silu(net.norm_out(x)))
    p = vae.config.patch_size or 1
    b, c, t, h, w = x.shape
    x = x.view(b, c // (p * p), p, p, t, h, w).permute(0, 1, 4, 5, 3, 6, 2)
    return x.reshape(b, c // (p * p), t, h * p, w * p)
