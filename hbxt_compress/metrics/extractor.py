"""The project's own video encoder: the eye of the Frechet distance and of KID.

A small network trained on the reference model's kind of clips (see reference/train_extractor.py).
Its content features are a mean over frames that are each seen alone, so they are blind to the order
of frames by construction; its temporal features are made of differences of consecutive frames.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from hbxt_compress.clips import Clip
from hbxt_compress.metrics.weights import Unavailable, sha256_of

__all__ = ["FOLDER", "Extractor", "VideoEncoder"]

FOLDER = Path(__file__).parent.parent / "reference" / "extractor"
SIZE_PX = 64
N_FEATURES = 64
_CHUNK_CLIPS = 8


class VideoEncoder(nn.Module):
    """Frames float B T 3 64 64 in [-1, 1] -> content (B, 64) and temporal (B, 192) features.

    Each frame becomes 64 numbers on what it shows, pooled over places, and 64 on where. `centre`
    and `spread` bring every feature to mean 0 and deviation 1 over the training clips.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 48)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for width in widths[1:])
        self.what_1 = nn.Conv2d(48, N_FEATURES, 3, padding=1)
        self.what_2 = nn.Linear(2 * N_FEATURES, N_FEATURES)
        self.where_1 = nn.Conv2d(48, 32, 3, stride=2, padding=1)
        self.where_2 = nn.Linear(32 * 16, N_FEATURES)
        self.motion_1 = nn.Conv1d(N_FEATURES, N_FEATURES, 3, padding=1)
        self.motion_2 = nn.Conv1d(N_FEATURES, N_FEATURES, 3, padding=1)
        self.register_buffer("centre", torch.zeros(4 * N_FEATURES))
        self.register_buffer("spread", torch.ones(4 * N_FEATURES))

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        n_clips, n_frames = frames.shape[:2]
        x = frames.flatten(0, 1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
        places = F.silu(self.what_1(x)).flatten(2)
        what = F.silu(self.what_2(torch.cat([places.mean(dim=2), places.amax(dim=2)], dim=1)))
        where = self.where_2(F.silu(self.where_1(x)).flatten(1))
        seen = torch.cat([what, where], dim=1).unflatten(0, (n_clips, n_frames))
        change = seen[:, 1:] - seen[:, :-1]
        moved = F.silu(self.motion_1(change[..., N_FEATURES:].transpose(1, 2)))
        moved = F.silu(self.motion_2(moved)).mean(dim=2)
        content = seen[..., :N_FEATURES].mean(dim=1)
        found = torch.cat([content, change.abs().mean(dim=1), moved], dim=1)
        found = (found - self.centre) / self.spread
        return found[:, :N_FEATURES], found[:, N_FEATURES:]


class Extractor:
    """The shipped encoder, checked against its card; `name` and `sha256` go into every report."""

    def __init__(self, folder: Path = FOLDER) -> None:
        """Loads the folder's card.json and model.safetensors; Unavailable if they do not match."""
        try:
            card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
            self.name: str = card["name"]
            self.sha256 = sha256_of(folder / "model.safetensors")
            wanted = card["sha256"]
        except (OSError, ValueError, KeyError) as error:
            raise Unavailable(
                f"the video encoder of this package cannot be read ({error!r}): install "
                "it again, or run python -m hbxt_compress.reference.train_extractor"
            ) from None
        if self.sha256 != wanted:
            raise Unavailable(
                f"the video encoder has sha256 {self.sha256[:12]}..., its card says "
                f"{str(wanted)[:12]}...: install the package again"
            )
        self._net = VideoEncoder()
        weights = {
            key: value.float() for key, value in load_file(folder / "model.safetensors").items()
        }
        self._net.load_state_dict(weights, strict=True)
        self._net.eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, clips: Sequence[Clip]) -> tuple[np.ndarray, np.ndarray]:
        """Content (N, 64) and temporal (N, 192) features, float64; any frame size is resized."""
        content, temporal = [], []
        for start in range(0, len(clips), _CHUNK_CLIPS):
            frames = np.stack([clip.frames for clip in clips[start : start + _CHUNK_CLIPS]])
            x = torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
            if x.shape[-2:] != (SIZE_PX, SIZE_PX):
                flat = F.interpolate(
                    x.flatten(0, 1),
                    (SIZE_PX, SIZE_PX),
                    mode="bilinear",
                    antialias=True,
                    align_corners=False,
                )
                x = flat.unflatten(0, x.shape[:2])
            c, t = self._net(x)
            content.append(c.double().numpy())
            temporal.append(t.double().numpy())
        return np.concatenate(content), np.concatenate(temporal)
