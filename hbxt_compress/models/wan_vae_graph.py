"""Export wrappers of the Wan VAE decoder: a graph for the first latent frame, one for each later.

Inside, frames are the batch, T C H W: no runtime has to know more than two axes of pixels, and what
doubles the frames only reshapes. Caches are those of decoder_steps.py. diffusers keeps one frame
after the first chunk and marks a temporal up-sampling that has not run yet ("Rep"); both equal two
frames padded with zeros in front. Shapes: C channels, T frames (1 in, 1 or 4 out), H W.
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
    WanDecoder3d,
    WanResample,
    WanResidualBlock,
    WanResidualUpBlock,
    WanRMS_norm,
    WanUpBlock,
    WanUpsample,
    unpatchify,
)
from torch import Tensor, nn  # noqa: E402

from hbxt_compress.graph.capture import ComponentGraphs  # noqa: E402
from hbxt_compress.graph.ops import attend, convolve_frames, shared_copy, swap  # noqa: E402
from hbxt_compress.manifest import Bucket  # noqa: E402
from hbxt_compress.models.decoder_steps import Past, step_graphs  # noqa: E402
from hbxt_compress.models.wan_graph import public_config  # noqa: E402

__all__ = ["vae_decoder_graphs"]

# diffusers divides by at least 1e-12 / sqrt(C), which a provider that runs in float16 rounds to 0.
_LEAST_RMS = 2.0**-24


def vae_decoder_graphs(
    vae: AutoencoderKLWan, bucket: Bucket, *, component: str = "vae_decoder"
) -> ComponentGraphs:
    """The graphs that a bucket names, for whole frames and for tiles; one latent frame a call."""

    def next_sample(latent: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        caches = [frames.transpose(0, 1)[None] for frames in past]
        x = vae.decoder(vae.post_quant_conv(latent), feat_cache=caches, feat_idx=[0])
        x = x if vae.config.patch_size is None else unpatchify(x, vae.config.patch_size)
        return (torch.clamp(x, min=-1.0, max=1.0),)

    graphs = step_graphs(
        _Step(vae),
        bucket,
        first_reference=lambda latent: vae.decode(latent, return_dict=False),
        next_reference=next_sample,
    )
    return ComponentGraphs(component=component, graphs=graphs, config=public_config(vae.config))


class _Step(nn.Module):
    """What of a VAE decodes one latent frame, swapped for export."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.patch_size = vae.config.patch_size or 1
        self.model = nn.ModuleDict(
            {"post_quant_conv": vae.post_quant_conv, "decoder": shared_copy(vae.decoder)}
        )
        swap(self.model, _swaps)

    def forward(self, latent: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        """sample 1 C T H W in -1..1, then the new caches, two frames each; none: a clip's first."""
        past = Past(caches)
        x = self.model["post_quant_conv"](latent.transpose(1, 2)[0])
        x = torch.clamp(self.model["decoder"](x, past), min=-1.0, max=1.0)
        t, c, h, w = x.shape
        p = self.patch_size
        x = x.reshape(t, c // p**2, p, p, h, w).permute(1, 0, 4, 3, 5, 2)
        return x.reshape(1, c // p**2, t, h * p, w * p), *past.kept


def _swaps(_: str, module: nn.Module) -> nn.Module | None:
    if isinstance(module, WanCausalConv3d):
        return _CausalConv(module)
    if isinstance(module, WanRMS_norm):
        return _ChannelRmsNorm(module)
    if isinstance(module, WanAttentionBlock):
        return _FrameAttention(module)
    if isinstance(module, WanResidualBlock):
        return _ResidualBlock(module)
    if isinstance(module, WanResample):
        return _Upsample(module)
    if isinstance(module, WanUpsample):
        return nn.Upsample(scale_factor=2.0, mode="nearest")  # the same as nearest-exact at 2x
    if isinstance(module, DupUp3D):
        return _RepeatUpsample(module)
    if isinstance(module, WanDecoder3d):
        return _Decoder(module)
    return None


class _Decoder(nn.Module):
    """Both kinds of decoders: those of Wan2.2 add a shortcut around every up block."""

    def __init__(self, decoder: WanDecoder3d) -> None:
        super().__init__()
        self.conv_in, self.mid_block = decoder.conv_in, decoder.mid_block
        self.up_blocks = decoder.up_blocks
        self.norm_out, self.nonlinearity = decoder.norm_out, decoder.nonlinearity
        self.conv_out = decoder.conv_out

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = self.conv_in(x, past)
        before, *after = self.mid_block.resnets
        x = before(x, past)
        for attention, resnet in zip(self.mid_block.attentions, after, strict=True):
            x = resnet(attention(x), past)
        for block in self.up_blocks:
            x = _raised(block, x, past)
        return self.conv_out(self.nonlinearity(self.norm_out(x)), past)


def _raised(block: WanUpBlock | WanResidualUpBlock, x: Tensor, past: Past) -> Tensor:
    """What an up block of either kind makes of frames."""
    into = x
    for resnet in block.resnets:
        x = resnet(x, past)
    several = getattr(block, "upsamplers", None)
    upsample = getattr(block, "upsampler", None) if several is None else several[0]
    x = x if upsample is None else upsample(x, past)
    shortcut = getattr(block, "avg_shortcut", None)
    return x if shortcut is None else x + shortcut(into, past)


class _ResidualBlock(nn.Module):
    """Twice norm, activation and causal convolution, added to the input."""

    def __init__(self, block: WanResidualBlock) -> None:
        super().__init__()
        self.norm1, self.conv1 = block.norm1, block.conv1
        self.norm2, self.conv2 = block.norm2, block.conv2
        self.conv_shortcut, self.nonlinearity = block.conv_shortcut, block.nonlinearity

    def forward(self, x: Tensor, past: Past) -> Tensor:
        shortcut = self.conv_shortcut(x)
        x = self.conv1(self.nonlinearity(self.norm1(x)), past)
        return self.conv2(self.nonlinearity(self.norm2(x)), past) + shortcut


class _CausalConv(nn.Module):
    """A convolution that sees two frames of the past, or, if it is one of pixels, none."""

    def __init__(self, conv: WanCausalConv3d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        left, _, top, _, self.n_past, _ = conv._padding
        self.padding = (top, left)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        before = past.before(x) if self.n_past and past is not None else None
        return convolve_frames(x, self.weight, self.bias, padding=self.padding, before=before)


class _ChannelRmsNorm(nn.Module):
    """x / rms(x over channels) * gamma: functional.normalize times sqrt(C), without its sum."""

    def __init__(self, norm: WanRMS_norm) -> None:
        super().__init__()
        self.gamma = norm.gamma

    def forward(self, x: Tensor) -> Tensor:
        rms = torch.sqrt((x * x).mean(dim=1, keepdim=True))
        return x / torch.clamp(rms, min=_LEAST_RMS) * self.gamma.reshape(-1, 1, 1)


class _FrameAttention(nn.Module):
    """One-headed self-attention over the pixels of each frame."""

    def __init__(self, block: WanAttentionBlock) -> None:
        super().__init__()
        self.norm = _ChannelRmsNorm(block.norm)
        self.to_qkv, self.proj = block.to_qkv, block.proj

    def forward(self, x: Tensor) -> Tensor:
        t, c, h, w = x.shape
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)
        query, key, value = qkv.chunk(3, dim=-1)
        out = attend(query, key, value, n_heads=1, scale=c**-0.5)
        return self.proj(out.transpose(1, 2).reshape(t, c, h, w)) + x


class _Upsample(nn.Module):
    """Twice the pixels and, if there is a time_conv, the frames (except of the clip's first)."""

    def __init__(self, resample: WanResample) -> None:
        super().__init__()
        self.time_conv = getattr(resample, "time_conv", None)
        self.resample = resample.resample

    def forward(self, x: Tensor, past: Past) -> Tensor:
        if self.time_conv is not None and past.first:
            past.begin(x)
        elif self.time_conv is not None:
            t, c, h, w = x.shape
            x = self.time_conv(x, past).reshape(2 * t, c, h, w)
        return self.resample(x)


class _RepeatUpsample(nn.Module):
    """The shortcut of Wan2.2's up blocks: channels repeated, then dealt out to time and space."""

    def __init__(self, shortcut: DupUp3D) -> None:
        super().__init__()
        self.repeats, self.out_channels = shortcut.repeats, shortcut.out_channels
        self.factor_t, self.factor_s = shortcut.factor_t, shortcut.factor_s

    def forward(self, x: Tensor, past: Past) -> Tensor:
        t, c, h, w = x.shape
        f_t, f_s = self.factor_t, self.factor_s
        x = x[:, :, None].expand(t, c, self.repeats, h, w)
        x = x.reshape(t, self.out_channels, f_t, f_s, f_s, h, w).permute(0, 2, 1, 5, 3, 6, 4)
        x = x.reshape(t * f_t, self.out_channels, h * f_s, w * f_s)
        return x[f_t - 1 :] if past.first else x
