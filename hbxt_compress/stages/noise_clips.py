"""Noise clips: states to calibrate on that are real clips under noise, instead of trajectories.

A clip's latents x0 come from the model's own VAE; at every observed step of the sampler that ships

    x_t = (1 - sigma_t) x0 + sigma_t eps

which is where a trajectory that ends at x0 would pass in flow matching. Nothing is denoised, and
clips may be smaller than those of the artifact: a model that could not sample here in a day is
calibrated by one pass of its blocks. What the sampler's own errors add to a state is not in it.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hbxt_compress.errors import CalibrationError, SourceError, listing
from hbxt_compress.footage import timed_frames, video_seconds
from hbxt_compress.geometry import Geometry
from hbxt_compress.machine import Machine
from hbxt_compress.models import Family, family_of
from hbxt_compress.prompts import ClipFile, Clips, PromptSet, seed_of
from hbxt_compress.runtime.noise import noise
from hbxt_compress.runtime.text import PromptTokenizer
from hbxt_compress.source import Source
from hbxt_compress.store import Work
from hbxt_compress.trajectories import Trajectory

__all__ = ["FACTS", "VERSION", "clip_geometry", "noise_clips"]

VERSION = 1
FACTS = ("torch", "diffusers", "transformers", "av")
log = logging.getLogger(__name__)
_ENCODER = "vae"


def noise_clips(work: Work, source: Source, prompts: PromptSet, on: Machine) -> None:
    """Writes `prompt-NNN.safetensors`, each the noised states of one clip, as `calibrate` does.

    Raises:
        SourceError: the model cannot take clips of that size.
        CalibrationError: clips are unreadable or too short (all named), or latents not finite.
    """
    assert prompts.clips is not None
    family, clips = family_of(source), prompts.clips
    size = clip_geometry(family, source, clips)
    family.tokens(source, size)
    _require_long_enough(clips, size)
    encoder = None
    for i, clip in enumerate(clips.files):
        if not work.ranks.owns(i):
            continue
        log.info("noise_clips: %s", clip.file, extra={"progress": (i, len(clips.files), "clips")})

        def make(path: Path, clip: ClipFile = clip) -> None:
            nonlocal encoder
            encoder = encoder or _Noised(family, source, prompts, torch.device(on.device))
            encoder.states(clip, _frames(Path(clips.folder) / clip.file, size)).save(path)

        work.piece(f"prompt-{i:03d}.safetensors", make)
    work.ranks.barrier()
    done = len(clips.files)
    log.info("noise_clips: done", extra={"progress": (done, done, "clips")})


def clip_geometry(family: Family, source: Source, clips: Clips) -> Geometry:
    """The size of the clips that are shown; the model's own rate where none is asked for."""
    return Geometry(
        height=clips.height,
        width=clips.width,
        n_frames=clips.n_frames,
        fps=clips.fps or family.geometry(source).fps,
    )


def _frames(path: Path, size: Geometry) -> Tensor:
    """The middle of a video in a size, float32 1 C T H W in -1..1; many begin or end in black.

    Each frame by the smallest scaling that covers the size (bicubic, antialiased), then the middle.
    """
    frames = []
    start_s = max(0.0, (video_seconds(path) - size.n_frames / size.fps) / 2)
    for frame_HWC in timed_frames(path, n_frames=size.n_frames, fps=size.fps, start_s=start_s):
        x_1CHW = torch.from_numpy(frame_HWC).permute(2, 0, 1)[None].float() / 127.5 - 1
        height, width = x_1CHW.shape[-2:]
        scale = max(size.height / height, size.width / width)
        covering = max(size.height, round(height * scale)), max(size.width, round(width * scale))
        if covering != (height, width):
            x_1CHW = F.interpolate(x_1CHW, covering, mode="bicubic", antialias=True)
        top, left = (covering[0] - size.height) // 2, (covering[1] - size.width) // 2
        kept_1CHW = x_1CHW[..., top : top + size.height, left : left + size.width]
        frames.append(kept_1CHW.clamp(-1, 1))
    return torch.stack(frames, dim=2)


def _require_long_enough(clips: Clips, size: Geometry) -> None:
    wanted_s = (size.n_frames - 1) / size.fps
    problems = []
    for clip in clips.files:
        path = Path(clips.folder) / clip.file
        try:
            seconds = video_seconds(path)
        except SourceError as error:
            problems.append(str(error))
            continue
        if seconds <= wanted_s:
            problems.append(f"{path}: lasts {seconds:.2f} s")
    if problems:
        raise CalibrationError(
            f"{len(problems)} of {len(clips.files)} clips cannot give {size.n_frames} frames at "
            f"{size.fps:g} a second, which takes more than {wanted_s:.2f} s; leave them out, or "
            f"change clips.n_frames or clips.fps:\n{listing(problems)}"
        )


class _Noised:
    """The model's VAE, tokenizer and sampler: all that noised states are made with."""

    def __init__(
        self, family: Family, source: Source, prompts: PromptSet, device: torch.device
    ) -> None:
        self.family, self.source, self.device = family, source, device
        self.vae = family.load(source, _ENCODER).to(device)
        self.tokenizer = PromptTokenizer(source.folder / "tokenizer", family.text_length(source))
        sampler = family.sampler(source)
        self.spec, self.observed = sampler.observed(prompts.n_steps, prompts.observe)
        self.seed = prompts.seed

    def states(self, clip: ClipFile, frames_1CTHW: Tensor) -> Trajectory:
        """One clip at every observed noise level, with noise of its own at each."""
        x0_CTHW = self._latents(frames_1CTHW).numpy()
        if not np.isfinite(x0_CTHW).all():
            raise CalibrationError(f"{clip.file}: the VAE's latents are not finite")
        sigmas, timesteps = self.spec.sigmas(), self.spec.timesteps()
        latents = []
        for k in self.observed:
            eps_CTHW = noise(seed_of(self.seed, f"{clip.sha256}:{k}"), x0_CTHW.shape)
            x_CTHW = (np.float32(1) - sigmas[k]) * x0_CTHW + sigmas[k] * eps_CTHW
            latents.append(torch.from_numpy(x_CTHW))
        shown = [float(timesteps[k]) for k in self.observed]
        (ids, mask), (none_ids, none_mask) = (
            [torch.from_numpy(array) for array in self.tokenizer(text)]
            for text in (clip.caption, "")
        )
        return Trajectory(
            latents_KCTHW=torch.stack(latents),
            timesteps_K=torch.tensor(shown),
            guidance_K=torch.tensor([self.spec.guidance_at(t) for t in shown]),
            ids_1S=ids,
            mask_1S=mask,
            none_ids_1S=none_ids,
            none_mask_1S=none_mask,
        )

    @torch.no_grad()
    def _latents(self, frames_1CTHW: Tensor) -> Tensor:
        encoded = self.family.encode(self.source, self.vae, frames_1CTHW.to(self.device))
        return encoded[0].float().cpu()
