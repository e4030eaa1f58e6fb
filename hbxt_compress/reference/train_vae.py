"""Trains the reference model's video autoencoder (Wan2.2's architecture, 8x8x4 compression)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from hbxt_compress.reference import loop, shapes, whole_clip

__all__ = ["Z_DIM", "clips", "measure_psnr", "new_vae", "polish_decoder", "train"]

Z_DIM = 12
N_STEPS = 4500
N_POLISH = 1200
_FIRST_POLISH_STEP = 100_000  # so that polishing sees clips of its own
_BATCH = 4
_KL_WEIGHT = 1e-4


def new_vae(mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderKLWan:
    """An untrained VAE of the reference geometry; mean and std, Z_DIM each, normalise latents."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=Z_DIM,
        dim_mult=[1, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        latents_mean=mean or [0.0] * Z_DIM,
        latents_std=std or [1.0] * Z_DIM,
    )


def clips(split: shapes.Split, indices: range | list[int]) -> Tensor:
    """Clips as the VAE takes them: float32 B 3 T H W in [-1, 1]."""
    drawn = np.stack([shapes.draw(shapes.scene(split, index)) for index in indices])
    return torch.from_numpy(drawn).permute(0, 4, 1, 2, 3).contiguous() * 2 - 1


def train(folder: Path, device: torch.device, n_steps: int = N_STEPS) -> AutoencoderKLWan:
    """The trained VAE, in eval mode, latents not yet normalised."""
    torch.manual_seed(0)
    vae = new_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)

    def forward(x: Tensor, noise: Tensor) -> Tensor:
        mean, logvar = whole_clip.encode(vae, x).float().chunk(2, dim=1)
        logvar = logvar.clamp(-20, 10)
        y = whole_clip.decode(vae, mean + noise * torch.exp(0.5 * logvar)).float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + _KL_WEIGHT * kl

    loss_of = loop.compiled(forward)

    def step(k: int) -> float:
        x = clips("train", range(k * _BATCH, (k + 1) * _BATCH)).to(device)
        generator = torch.Generator().manual_seed(k)
        noise = torch.randn(_BATCH, Z_DIM, 5, 8, 8, generator=generator).to(device)
        for group in optimizer.param_groups:
            group["lr"] = loop.cosine(k, n_steps, 2e-3)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(x, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    loop.run("vae", folder, n_steps, {"model": vae, "optimizer": optimizer}, step)
    return vae.eval().requires_grad_(False)


def polish_decoder(
    vae: AutoencoderKLWan, folder: Path, device: torch.device, n_steps: int = N_POLISH
) -> None:
    """Trains the decoder alone, in place, on squared error: the latent space stays as it is."""
    vae.to(device).requires_grad_(False)
    vae.decoder.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(
        vae.decoder.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0
    )

    def forward(x: Tensor, latents: Tensor) -> Tensor:
        return F.mse_loss(whole_clip.decode(vae, latents).float(), x)

    loss_of = loop.compiled(forward)

    def step(k: int) -> float:
        start = (k + _FIRST_POLISH_STEP) * _BATCH
        x = clips("train", range(start, start + _BATCH)).to(device)
        for group in optimizer.param_groups:
            group["lr"] = loop.cosine(k, n_steps, 1e-3)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                latents = whole_clip.encode(vae, x)[:, :Z_DIM].float()
            loss = loss_of(x, latents)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    loop.run("decoder", folder, n_steps, {"model": vae.decoder, "optimizer": optimizer}, step)
    vae.eval().requires_grad_(False)


@torch.no_grad()
def measure_psnr(vae: AutoencoderKLWan, n_clips: int = 64) -> float:
    """Mean over unseen evaluation clips of the round trip's PSNR in dB (peak 1, whole clip)."""
    values = []
    for start in range(0, n_clips, 8):
        x = clips("evaluation", range(start, start + 8)).to(vae.device)
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample
        mse = ((y - x) / 2).square().flatten(1).mean(1)
        values.append(-10 * torch.log10(mse))
    return float(torch.cat(values).mean())
