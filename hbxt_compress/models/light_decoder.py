"""LightDecoder: a small decoder for a VAE's latents, causal in time, without attention.

Depthwise-separable 3-D convolutions where channels are many and pixels few, whole ones where
channels are few; pixels and frames are dealt out of channels (the plan of Hummingbird-XT's light
decoder and of Turbo-VAED, arXiv 2508.09136). Every up-sampling in time gives two frames for one,
and drops the very first, so 1 + n latent frames become 1 + 4 n frames, as in Wan's VAE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "CLASS_NAME", "CausalConv", "ChannelRmsNorm", "Lift", "LightDecoder",
]  # fmt: skip

CLASS_NAME: Final = "LightDecoder"
_LEAST_RMS: Final = 2.0**-12  # above what float16 rounds to 0
_SIZES: Final = (
    "z_dim", "widths", "n_blocks", "n_separable", "kernel", "n_lifts_in_time", "patch_size",
)  # fmt: skip


class CausalConv(nn.Conv3d):
    """A convolution that sees K-1 frames of the past, zeros before the first; same size out."""

    def __init__(self, n_in: int, n_out: int, kernel: Sequence[int], *, groups: int = 1) -> None:
        frames, height, width = kernel
        super().__init__(
            n_in,
            n_out,
            (frames, height, width),
            padding=(0, height // 2, width // 2),
            groups=groups,
        )

    def forward(self, x: Tensor, past: list[Tensor] | None = None) -> Tensor:
        n_before = self.kernel_size[0] - 1
        if not n_before:
            return super().forward(x)
        before = F.pad(x, (0, 0, 0, 0, n_before, 0))
        return super().forward(before if past is None else torch.cat([past.pop(0), x], dim=2))


class ChannelRmsNorm(nn.Module):
    """x / rms(x over channels) * gamma, wherever the other axes are."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        rms = torch.sqrt((x * x).mean(dim=1, keepdim=True))
        return x / torch.clamp(rms, min=_LEAST_RMS) * self.gamma.view(-1, *[1] * (x.ndim - 2))


class _SeparableBlock(nn.Module):
    """Norm, depthwise and pointwise convolution, twice as many features, added to the input."""

    def __init__(self, n: int, kernel: int) -> None:
        super().__init__()
        self.norm = ChannelRmsNorm(n)
        self.depthwise = CausalConv(n, n, (3, kernel, kernel), groups=n)
        self.expand = CausalConv(n, 2 * n, (1, 1, 1))
        self.project = CausalConv(2 * n, n, (1, 1, 1))
        nn.init.zeros_(self.project.weight)  # it begins as what it is given

    def forward(self, x: Tensor, past: Any = None) -> Tensor:
        y = self.depthwise(self.norm(x), past)
        return x + self.project(F.relu(self.expand(y, past)), past)


class _WholeBlock(nn.Module):
    """Two whole convolutions, added to the input; the first alone looks back in time."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1 = CausalConv(n, n, (3, 3, 3))
        self.conv2 = CausalConv(n, n, (1, 3, 3))

    def forward(self, x: Tensor, past: Any = None) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x), past)), past)


class Lift(nn.Module):
    """Twice the pixels along each side and, in time, twice the frames; to other channels."""

    def __init__(self, n_in: int, n_out: int, *, in_time: bool) -> None:
        super().__init__()
        self.n_frames = 2 if in_time else 1
        self.conv = CausalConv(n_in, n_out * 4 * self.n_frames, (1, 1, 1))

    def forward(self, x: Tensor, past: Any = None) -> Tensor:
        x = self.conv(x, past)
        b, c, t, h, w = x.shape
        k = self.n_frames
        x = x.view(b, k, c // (4 * k), 2, 2, t, h, w).permute(0, 2, 5, 1, 6, 3, 7, 4)
        x = x.reshape(b, c // (4 * k), t * k, 2 * h, 2 * w)
        return x[:, :, k - 1 :] if past is None else x


class LightDecoder(nn.Module):
    """Frames B 3 T H W, about -1..1, of latents B C T' H' W' as a VAE's own decoder takes them.

    past: of every convolution that looks back, in turn, the frames before, B C 2 H W; they are
    taken out. None: the latents are a clip's first, and its very first frame comes out alone.

    widths: channels of the stages, whose pixels double from one to the next. n_blocks: of each.
    n_separable: how many stages, the first ones, have depthwise-separable blocks; kernel: pixels
    that those see along a side. n_lifts_in_time: the first ones, each of which doubles frames.
    patch_size: pixels along a side that one of the last stage stands for.
    """

    def __init__(
        self,
        *,
        z_dim: int,
        widths: Sequence[int],
        n_blocks: Sequence[int],
        n_separable: int,
        kernel: int = 3,
        n_lifts_in_time: int = 2,
        patch_size: int = 2,
    ) -> None:
        super().__init__()
        self.config: Mapping[str, Any] = {
            "_class_name": CLASS_NAME, "z_dim": z_dim, "widths": [*widths],
            "n_blocks": [*n_blocks], "n_separable": n_separable, "kernel": kernel,
            "n_lifts_in_time": n_lifts_in_time, "patch_size": patch_size,
        }  # fmt: skip
        self.z_dim, self.patch_size = z_dim, patch_size
        self.factor_in_time = 2**n_lifts_in_time
        self.factor_in_space = patch_size * 2 ** (len(widths) - 1)
        self.conv_in = CausalConv(z_dim, widths[0], (1, 3, 3))
        self.stages = nn.ModuleList(
            nn.ModuleList(
                _SeparableBlock(width, kernel) if i < n_separable else _WholeBlock(width)
                for _ in range(n)
            )
            for i, (width, n) in enumerate(zip(widths, n_blocks, strict=True))
        )
        self.lifts = nn.ModuleList(
            Lift(a, b, in_time=i < n_lifts_in_time) for i, (a, b) in enumerate(pairwise(widths))
        )
        self.conv_out = CausalConv(widths[-1], 3 * patch_size**2, (1, 3, 3))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The decoder that a config.json describes; ValueError naming what it lacks."""
        lacking = [name for name in _SIZES if name not in config]
        if lacking:
            raise ValueError(f"missing: {', '.join(lacking)}")
        return cls(**{name: config[name] for name in _SIZES})

    def features(self, x: Tensor, past: Any = None) -> tuple[Tensor, list[Tensor]]:
        """The frames in patches, B 3*p*p T H W, and what came out of each stage."""
        x, found = self.conv_in(x, past), []
        for i, stage in enumerate(self.stages):
            for block in stage:  # type: ignore[attr-defined]
                x = block(x, past)
            found.append(x)
            if i < len(self.lifts):
                x = self.lifts[i](x, past)
        return self.conv_out(F.relu(x), past), found

    def forward(self, x: Tensor, past: list[Tensor] | None = None) -> Tensor:
        return self.pixels(self.features(x, past)[0])

    def pixels(self, x: Tensor) -> Tensor:
        """B 3 T H*p W*p of patches B 3*p*p T H W."""
        b, c, t, h, w = x.shape
        p = self.patch_size
        x = x.view(b, c // p**2, p, p, t, h, w).permute(0, 1, 4, 5, 2, 6, 3)
        return x.reshape(b, c // p**2, t, h * p, w * p)
