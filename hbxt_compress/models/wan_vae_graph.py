"""Export wrappers of the Wan VAE decoder: a graph for the first latent frame, one for each later.

A cache is the last two input frames of a causal convolution, zero before the clip begins, handed
on as 1 C 2 H W tensors. diffusers keeps one frame after the first chunk and marks a temporal
up-sampling that has not run yet ("Rep"); both equal two frames padded with zeros in front.
Shapes: batch 1, C channels, T frames (1 in, 1 or 4 out), H W.
"""

from __future__ import annotations

from hbxt_compress.torchvision_ops import mend_torchvision

mend_torchvision()

import torch  # noqa: E402
from diffusers import AutoencoderKLWan  # noqa: E402
from diffusers.models.autoencoders.autoencoder_kl_wan import (  # noqa: E402
    DupUp3D,
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanRMS_norm,
    WanUpsample,
    unpatchify,
)
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from hbxt_compress.graph.capture import (  # noqa: E402
    ComponentGraphs,
    GraphSpec,
    TensorSpec,
    without_values,
)
from hbxt_compress.graph.ops import attend, shared_copy, swap  # noqa: E402
from hbxt_compress.models.wan_graph import public_config  # noqa: E402

__all__ = ["vae_decoder_graphs"]

_KEPT_FRAMES = 2
# diffusers divides by at least 1e-12 / sqrt(C), which a provider that runs in float16 rounds to 0.
_LEAST_RMS = 2.0**-24


def vae_decoder_graphs(
    vae: AutoencoderKLWan,
    *,
    latent_shape: tuple[int, int, int, int],
    component: str = "vae_decoder",
    first: str = "model_first.onnx",
    following: str = "model.onnx",
) -> ComponentGraphs:
    """Two graphs for latents C T H W (batch 1, one frame a call), under these file names."""
    channels, _, height, width = latent_shape
    frame = TensorSpec(shape=(1, channels, 1, height, width))
    first_step = _FirstStep(vae)
    with without_values(first_step), torch.no_grad():
        _, *kept = first_step(torch.zeros(frame.shape))
    caches = {f"cache_in_{i}": TensorSpec(shape=tuple(kept[i].shape)) for i in range(len(kept))}
    outputs = ["sample", *(f"cache_out_{i}" for i in range(len(kept)))]

    def next_sample(latent: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        x = vae.decoder(vae.post_quant_conv(latent), feat_cache=list(past), feat_idx=[0])
        x = x if vae.config.patch_size is None else unpatchify(x, vae.config.patch_size)
        return (torch.clamp(x, min=-1.0, max=1.0),)

    return ComponentGraphs(
        component=component,
        graphs={
            first: GraphSpec(
                module=first_step,
                inputs={"latent_sample": frame},
                outputs=outputs,
                reference=lambda latent: vae.decode(latent, return_dict=False),
            ),
            following: GraphSpec(
                module=_NextStep(vae),
                inputs={"latent_sample": frame, **caches},
                outputs=outputs,
                reference=next_sample,
            ),
        },
        config=public_config(vae.config),
    )


class _Step(nn.Module):
    """What of a VAE decodes one latent frame, swapped for export."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.patch_size = vae.config.patch_size
        self.n_convolutions = sum(isinstance(m, WanCausalConv3d) for m in vae.decoder.modules())
        self.model = nn.ModuleDict(
            {"post_quant_conv": vae.post_quant_conv, "decoder": shared_copy(vae.decoder)}
        )
        swap(self.model, _swaps)

    def decode(
        self, latent: Tensor, caches: list[Tensor | None], *, first: bool
    ) -> tuple[Tensor, ...]:
        """sample in -1..1, then the new caches, two frames each."""
        index = [0]
        x = self.model["post_quant_conv"](latent)
        x = self.model["decoder"](x, feat_cache=caches, feat_idx=index, first_chunk=first)
        if self.patch_size is not None:
            x = unpatchify(x, patch_size=self.patch_size)
        kept = [cache for cache in caches[: index[0]] if cache is not None]
        return torch.clamp(x, min=-1.0, max=1.0), *map(_two_frames, kept)


class _FirstStep(_Step):
    def forward(self, latent: Tensor) -> tuple[Tensor, ...]:
        return self.decode(latent, [None] * self.n_convolutions, first=True)


class _NextStep(_Step):
    def forward(self, latent: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        return self.decode(latent, list(caches), first=False)


def _two_frames(cache: Tensor) -> Tensor:
    missing = _KEPT_FRAMES - cache.shape[2]
    return functional.pad(cache, (0, 0, 0, 0, missing, 0)) if missing else cache


def _swaps(_: str, module: nn.Module) -> nn.Module | None:
    if isinstance(module, WanCausalConv3d):
        return _CausalConv(module)
    if isinstance(module, WanRMS_norm):
        return _ChannelRmsNorm(module)
    if isinstance(module, WanAttentionBlock):
        return _FrameAttention(module)
    if isinstance(module, WanResample) and module.mode == "upsample3d":
        return _TemporalUpsample(module)
    if isinstance(module, WanUpsample):
        return nn.Upsample(scale_factor=2.0, mode="nearest")  # the same as nearest-exact at 2x
    if isinstance(module, DupUp3D):
        return _RepeatUpsample(module)
    return None


class _CausalConv(nn.Module):
    """Conv3d that sees two frames of the past: the cache, or zeros."""

    def __init__(self, conv: WanCausalConv3d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        left, _, top, _, self.n_past, _ = conv._padding
        self.padding = (0, top, left)

    def forward(self, x: Tensor, cache: Tensor | None = None) -> Tensor:
        if self.n_past and cache is not None:
            x = torch.cat([cache, x], dim=2)
        elif self.n_past:
            x = functional.pad(x, (0, 0, 0, 0, self.n_past, 0))
        return functional.conv3d(x, self.weight, self.bias, padding=self.padding)


class _ChannelRmsNorm(nn.Module):
    """x / rms(x over channels) * gamma: functional.normalize times sqrt(C), without its sum."""

    def __init__(self, norm: WanRMS_norm) -> None:
        super().__init__()
        self.gamma = norm.gamma

    def forward(self, x: Tensor) -> Tensor:
        rms = torch.sqrt((x * x).mean(dim=1, keepdim=True))
        return x / torch.clamp(rms, min=_LEAST_RMS) * self.gamma


class _FrameAttention(nn.Module):
    """One-headed self-attention over the pixels of each frame."""

    def __init__(self, block: WanAttentionBlock) -> None:
        super().__init__()
        self.norm = _ChannelRmsNorm(block.norm)
        self.to_qkv, self.proj = block.to_qkv, block.proj

    def forward(self, x: Tensor) -> Tensor:
        _, c, t, h, w = x.shape
        frames = x[0].transpose(0, 1)
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)
        query, key, value = qkv.chunk(3, dim=-1)
        out = attend(query, key, value, n_heads=1, scale=c**-0.5)
        out = self.proj(out.transpose(1, 2).reshape(t, c, h, w))
        return out.transpose(0, 1)[None] + x


class _TemporalUpsample(nn.Module):
    """Twice the frames (except the clip's first) and twice the pixels."""

    def __init__(self, resample: WanResample) -> None:
        super().__init__()
        self.time_conv = _CausalConv(resample.time_conv)
        self.resample = resample.resample
        swap(self.resample, _swaps)

    def forward(self, x: Tensor, feat_cache: list[Tensor | None], feat_idx: list[int]) -> Tensor:
        _, c, t, h, w = x.shape
        past = feat_cache[feat_idx[0]]
        if past is None:
            feat_cache[feat_idx[0]] = x.new_zeros(1, c, _KEPT_FRAMES, h, w)
        else:
            feat_cache[feat_idx[0]] = torch.cat([past, x], dim=2)[:, :, -_KEPT_FRAMES:]
            halves = self.time_conv(x, past).reshape(2, c, t, h, w)
            t = 2 * t
            x = halves.permute(1, 2, 0, 3, 4).reshape(1, c, t, h, w)
        feat_idx[0] += 1
        return self.resample(x[0].transpose(0, 1)).transpose(0, 1)[None]


class _RepeatUpsample(nn.Module):
    """The shortcut of Wan2.2's up blocks: channels repeated, then dealt out to time and space."""

    def __init__(self, shortcut: DupUp3D) -> None:
        super().__init__()
        self.repeats, self.out_channels = shortcut.repeats, shortcut.out_channels
        self.factor_t, self.factor_s = shortcut.factor_t, shortcut.factor_s

    def forward(self, x: Tensor, first_chunk: bool = False) -> Tensor:
        _, c, t, h, w = x.shape
        f_t, f_s = self.factor_t, self.factor_s
        x = x[0][:, None].expand(c, self.repeats, t, h, w)
        x = x.reshape(self.out_channels, f_t, f_s, f_s, t, h, w).permute(0, 4, 1, 5, 2, 6, 3)
        x = x.reshape(1, self.out_channels, t * f_t, h * f_s, w * f_s)
        return x[:, :, f_t - 1 :] if first_chunk else x
