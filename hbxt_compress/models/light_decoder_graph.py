"""Export wrappers of a LightDecoder, with the ends that a VAE decoder's graphs have.

Inside, frames are the batch, T C H W, as in wan_vae_graph.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hbxt_compress.graph.capture import ComponentGraphs
from hbxt_compress.graph.ops import convolve_frames, shared_copy, swap
from hbxt_compress.manifest import Bucket
from hbxt_compress.models.decoder_steps import Past, step_graphs
from hbxt_compress.models.light_decoder import CausalConv, Lift, LightDecoder

__all__ = ["light_decoder_graphs"]


def light_decoder_graphs(
    decoder: LightDecoder, bucket: Bucket, *, component: str = "vae_decoder"
) -> ComponentGraphs:
    """The graphs that a bucket names, for whole frames and for tiles; one latent frame a call."""

    def sample(latent: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        caches = [frames.transpose(0, 1)[None] for frames in past]
        return (torch.clamp(decoder(latent, caches or None), min=-1.0, max=1.0),)

    graphs = step_graphs(
        _Step(decoder),
        bucket,
        first_reference=sample,
        next_reference=sample,
    )
    return ComponentGraphs(component=component, graphs=graphs, config=dict(decoder.config))


class _Step(nn.Module):
    """What decodes one latent frame, swapped for export."""

    def __init__(self, decoder: LightDecoder) -> None:
        super().__init__()
        self.patch_size = decoder.patch_size
        self.model = shared_copy(decoder)
        swap(self.model, _swaps)

    def forward(self, latent: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        """sample 1 3 T H W in -1..1, then the new caches, two frames each; none: a clip's first."""
        past = Past(caches)
        x, _ = self.model.features(latent.transpose(1, 2)[0], past)
        x = torch.clamp(x, min=-1.0, max=1.0)
        t, c, h, w = x.shape
        p = self.patch_size
        x = x.reshape(t, c // p**2, p, p, h, w).permute(1, 0, 4, 2, 5, 3)
        return x.reshape(1, c // p**2, t, h * p, w * p), *past.kept


def _swaps(_: str, module: nn.Module) -> nn.Module | None:
    if isinstance(module, CausalConv):
        return _FramesConv(module)
    if isinstance(module, Lift):
        return _FramesLift(module)
    return None


class _FramesConv(nn.Module):
    """A CausalConv of frames T C H W."""

    def __init__(self, conv: CausalConv) -> None:
        super().__init__()
        self.weight, self.bias, self.groups = conv.weight, conv.bias, conv.groups
        self.looks_back = conv.kernel_size[0] > 1
        self.padding = (conv.kernel_size[1] // 2, conv.kernel_size[2] // 2)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        before = past.before(x) if self.looks_back else None
        return convolve_frames(
            x, self.weight, self.bias, padding=self.padding, before=before, groups=self.groups
        )


class _FramesLift(nn.Module):
    """A Lift of frames T C H W."""

    def __init__(self, lift: Lift) -> None:
        super().__init__()
        self.conv, self.n_frames = _FramesConv(lift.conv), lift.n_frames

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = self.conv(x, past)
        t, c, h, w = x.shape
        k = self.n_frames
        x = x.reshape(t, k, c // (4 * k), 2, 2, h, w).permute(0, 1, 2, 5, 3, 6, 4)
        x = x.reshape(t * k, c // (4 * k), 2 * h, 2 * w)
        return x[k - 1 :] if past.first else x
