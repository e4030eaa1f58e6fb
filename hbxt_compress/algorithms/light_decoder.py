"""Light: a small decoder in place of the VAE's own; encoder and latent space stay as they are.

On a batch of real clips x, and of latents that the model made, where x is the full decoder's clip,

    min E e^2 + a |e| + b sum_s |grad e_s| + c |d_t e| + d ||P f - f_teacher||^2 / ||f_teacher||^2

with e = y - x, the first frame counted as often as the frames of any other latent one, else its
colours come out wrong; e_s: averaged over s x s pixels, s = 1, 2, 4; d_t: from frame to frame; f:
what the low-resolution stages give, P: 1x1 convolutions learnt along (Turbo-VAED, arXiv 2508.09136,
with differences in space and time instead of LPIPS, whose weights need a download).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from hbxt_compress.algorithms.training import Net, Training, Watch, drawn, train
from hbxt_compress.strict import Settings
from hbxt_compress.views import KINDS, Kind, View, Views

__all__ = ["Light", "Lightened", "Losses", "error_terms"]

_AT_ONCE = 16


class Losses(Settings):
    """What else than the squared error counts, and how much; frames are in -1..1."""

    absolute: Annotated[float, Field(ge=0)] = 0.1
    gradient: Annotated[float, Field(ge=0)] = 0.1
    """of differences between neighbouring pixels, at three scales"""
    temporal: Annotated[float, Field(ge=0)] = 0.2
    """of differences between neighbouring frames"""
    features: Annotated[float, Field(ge=0)] = 0.02
    """of the low-resolution stages, relative to the full decoder's; 0 keeps none of them"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lightened:
    """weights: the trained decoder's, by name. measured: what to tell of it."""

    weights: Mapping[str, Tensor]
    measured: Mapping[str, float]


class Light(Settings):
    """A light decoder, trained on real and on generated clips."""

    VERSION: ClassVar[int] = 1

    widths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=2)] = (96, 48, 16)
    """channels of the stages; pixels double between two. Where more stages are needed the first is
    repeated"""
    n_blocks: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=2)] = (2, 2, 0)
    """of the same stages"""
    n_separable: Annotated[int, Field(ge=0)] = 2
    """how many of these stages, the first, have depthwise-separable convolutions"""
    kernel: Annotated[int, Field(ge=1, le=7)] = 3
    """pixels along a side that a depthwise convolution sees; odd"""
    train: Training = Training(
        n_steps=3600, batch=8, rate=2.0e-3, warmup=100, average=0.995, judge_every=500
    )
    losses: Losses = Losses()
    n_clips: Annotated[int, Field(ge=8)] = 64
    """clips that the model makes for it; the last sixteenth judges only"""
    n_real: Annotated[int, Field(ge=0)] = 1024
    """real clips, where a model has any; the last sixteenth judges only"""
    made: Annotated[float, Field(ge=0, le=1)] = 0.25
    """share of the batch that the model made"""
    prompts: str = "wide"
    """the prompt set that they are made of"""

    @model_validator(mode="after")
    def _agree(self) -> Light:
        if len(self.n_blocks) != len(self.widths):
            raise ValueError(f"{len(self.widths)} widths, but n_blocks of {len(self.n_blocks)}")
        if self.n_separable > len(self.widths):
            raise ValueError(f"n_separable {self.n_separable}: there are {len(self.widths)} widths")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel}: must be odd")
        return self

    @property
    def wants_features(self) -> bool:
        """Whether the full decoder's features are looked at."""
        return self.losses.features > 0

    @property
    def at_once(self) -> int:
        """How many clips it decodes at the same time."""
        return self.train.batch

    @property
    def n_decoded(self) -> int:
        """About how many clips are decoded meanwhile; a gradient counts as three."""
        n_judgements = 2 + self.train.n_steps // self.train.judge_every
        return 3 * self.train.n_steps * self.train.batch + n_judgements * (
            (self.n_clips + self.n_real) // 16
        )

    def sizes(self, z_dim: int, factor_in_time: int, factor_in_space: int) -> dict[str, Any]:
        """What a decoder for such latents is built with.

        Raises:
            ValueError: factors that stages of twice the pixels, or frames, do not come to.
        """
        n_stages, in_time = factor_in_space.bit_length() - 1, factor_in_time.bit_length() - 1
        if 2**n_stages != factor_in_space or 2**in_time != factor_in_time or in_time >= n_stages:
            raise ValueError(
                f"light: {factor_in_space} pixels and {factor_in_time} frames to one of latents: "
                "both must be powers of two, and frames fewer"
            )
        more = n_stages - len(self.widths)
        if more < 0:
            raise ValueError(
                f"light: widths: {len(self.widths)} stages, {factor_in_space} pixels to one of "
                f"latents take {n_stages}"
            )
        return {
            "z_dim": z_dim,
            "widths": (*self.widths[:1] * more, *self.widths),
            "n_blocks": (*self.n_blocks[:1] * more, *self.n_blocks),
            "n_separable": self.n_separable + more if self.n_separable else 0,
            "kernel": self.kernel,
            "n_lifts_in_time": in_time,
            "patch_size": 2,
        }

    def lighten(self, decoder: nn.Module, views: Views, watch: Watch) -> Lightened:
        """Trains a decoder with `features(latents)`: its patches of frames, and its stages' ends.

        Raises:
            ValueError: a size of the decoder does not suit the views.
            Diverged: a loss is not finite.
        """
        how = self.train
        counts = {kind: views.n(kind) for kind in KINDS if views.n(kind)}
        kinds = list(counts)
        judged = {kind: max(1, n // 16) for kind, n in counts.items()}
        shares = dict.fromkeys(kinds, how.batch)
        if len(kinds) == 2:
            n_made = min(how.batch - 1, max(1, round(how.batch * self.made)))
            shares = {"real": how.batch - n_made, "made": n_made}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(how.seed)  # the projections begin the same, too
            taught = _Taught(decoder, views.rows("made", [0]), self.wants_features)
        net, device = Net(taught, how), next(decoder.parameters()).device
        first = int(decoder.factor_in_time)  # type: ignore[arg-type]

        def turn(k: int) -> tuple[dict[str, float], dict[str, Tensor]]:
            draw, parts = drawn(how.seed, k), []
            for kind, n in shares.items():
                rows = torch.randint(counts[kind] - judged[kind], (n,), generator=draw)
                parts.append(views.rows(kind, rows.tolist()))
            z = torch.cat([one.latents_NCTHW for one in parts]).to(device)
            x = _signed(torch.cat([one.frames_N3THW for one in parts])).to(device)
            with how.autocast(device):
                y, matched = taught(z, parts[-1].features)
            terms = error_terms(y.float() - x, first)
            loss = (
                terms["squared"]
                + self.losses.absolute * terms["absolute"]
                + self.losses.gradient * terms["gradient"]
                + self.losses.temporal * terms["temporal"]
                + self.losses.features * matched
            )
            norm = net.descend(loss, k / how.n_steps)
            told = {name: float(one.detach()) for name, one in terms.items()}
            values = {"loss": float(loss.detach()), **told, "features": float(matched.detach())}
            return {**values, "norm": norm}, {"latents": z, "frames": x}

        def squared(kind: Kind) -> float:
            """Over the clips that judge."""
            total = 0.0
            held_out = range(counts[kind] - judged[kind], counts[kind])
            for start in range(0, len(held_out), _AT_ONCE):
                one = views.rows(kind, held_out[start : start + _AT_ONCE])
                y = decoder(one.latents_NCTHW.to(device)).clamp(-1, 1).cpu()
                total += float((y - _signed(one.frames_N3THW)).square().mean((1, 2, 3, 4)).sum())
            return total / len(held_out)

        @torch.no_grad()
        def judge() -> float:
            return sum(squared(kind) for kind in kinds) / len(kinds)

        train({"decoder": net}, how, turn, judge, watch)
        with torch.no_grad():
            measured = {f"held_out_psnr_{kind}": _psnr(squared(kind)) for kind in kinds}
        weights = {name: p.detach() for name, p in decoder.state_dict().items()}
        return Lightened(weights=weights, measured=measured)


class _Taught(nn.Module):
    """A decoder, and 1x1 convolutions from its stages to the full decoder's features."""

    def __init__(self, decoder: nn.Module, sample: View, matched: bool) -> None:
        super().__init__()
        self.decoder = decoder.requires_grad_(True)
        with torch.no_grad():
            device = next(decoder.parameters()).device
            y, stages = decoder.features(sample.latents_NCTHW.to(device))  # type: ignore[operator]
            shape = decoder.pixels(y).shape  # type: ignore[operator]
        if shape != sample.frames_N3THW.shape:
            wanted_shape = list(sample.frames_N3THW.shape)
            raise ValueError(f"light: the decoder's clips are {list(shape)}, not {wanted_shape}")
        wanted = sample.features if matched else []
        self.projections = nn.ModuleList(
            nn.Conv3d(mine.shape[1], full.shape[1], 1)
            for mine, full in zip(stages, wanted, strict=False)
            if mine.shape[2:] == full.shape[2:]
        ).to(device)
        if len(self.projections) < len(wanted):
            raise ValueError("light: the full decoder's blocks have other sizes than the stages")

    def forward(self, z: Tensor, wanted: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Frames of latents N C T H W; the relative error of the last rows' features."""
        y, stages = self.decoder.features(z)  # type: ignore[operator]
        errors = [y.new_zeros((), dtype=torch.float32)]
        for project, mine, full in zip(self.projections, stages, wanted, strict=False):
            full = full.to(y.device).float()
            found = project(mine[-len(full) :]).float()
            errors.append((found - full).square().mean() / full.square().mean())
        return self.decoder.pixels(y), torch.stack(errors).sum()  # type: ignore[operator]


def error_terms(e_N3THW: Tensor, first: int = 1) -> dict[str, Tensor]:
    """Means over an error's pixels: squared, absolute, gradient (at three scales), temporal.

    first: times that the first frame counts, but for the temporal mean.
    """
    whole, temporal = e_N3THW, e_N3THW.diff(dim=2).abs()
    if first > 1:
        whole = torch.cat([e_N3THW[:, :, :1].expand(-1, -1, first - 1, -1, -1), e_N3THW], dim=2)
    gradient, flat = [], whole.flatten(0, 1)
    for scale in (1, 2, 4):
        e = F.avg_pool3d(flat, (1, scale, scale)) if scale > 1 else flat
        gradient += [e.diff(dim=2).abs().mean(), e.diff(dim=3).abs().mean()]
    return {
        "squared": whole.square().mean(),
        "absolute": whole.abs().mean(),
        "gradient": torch.stack(gradient).mean(),
        "temporal": temporal.mean() if temporal.numel() else e_N3THW.new_zeros(()),
    }


def _signed(levels: Tensor) -> Tensor:
    """uint8 levels in -1..1."""
    return levels.float() / 127.5 - 1


def _psnr(squared: float) -> float:
    """In dB, of a mean squared error of frames in -1..1."""
    return -10 * math.log10(max(squared, 1e-12) / 4)
