"""Runtime: an artifact that generates clips.

One graph is in memory at a time (text encoder, transformer, its second expert, VAE decoder), unless
keep=True, which opens each graph once for many clips. Frames stream out of the VAE latent frame by
latent frame (runtime/decode.py), so memory does not grow with the clip's length.

Legend: L tokens, D text features, C T H W channels, frames, height and width (of latents).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from hbxt_compress.artifact import Artifact
from hbxt_compress.clips import Clip, HealthTally, health, to_uint8
from hbxt_compress.errors import HealthError, UsageError, listing
from hbxt_compress.heap import give_back
from hbxt_compress.manifest import Bucket, Manifest
from hbxt_compress.runtime.decode import decode
from hbxt_compress.runtime.gpus import find_gpus
from hbxt_compress.runtime.noise import noise
from hbxt_compress.runtime.prompt_cache import PromptCache
from hbxt_compress.runtime.scheduler import Denoiser
from hbxt_compress.runtime.session import Provider, Session, open_session
from hbxt_compress.runtime.settings import ProviderSettings, settings_for
from hbxt_compress.runtime.text import PromptTokenizer
from hbxt_compress.sampler import SamplerSpec

__all__ = ["Progress", "Runtime"]

Progress = Callable[[int, int], None]  # steps done, steps in all


@dataclass(slots=True, kw_only=True)
class _Residents:
    """The open graphs. Without keep, opening one closes every other."""

    folder: Path
    provider: Provider
    n_threads: int | None
    config: dict[str, str]
    keep: bool
    settings: dict[str, ProviderSettings]
    open: dict[str, Session] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)

    def get(self, component: str, file: str = "model.onnx") -> Session:
        path = f"{component}/{file}"
        if path not in self.open:
            if not self.keep:
                self.close()
            self.open[path] = open_session(
                self.folder / path, self.provider, n_threads=self.n_threads, config=self.config,
                settings=self.settings,
            )  # fmt: skip
            self.used[path] = self.open[path].provider
        return self.open[path]

    def close(self) -> None:
        """Frees every graph, also where a caller still holds its session."""
        if self.open:
            for session in self.open.values():
                session.close()
            self.open.clear()
            give_back()


class Runtime:
    """Generates from one artifact: `with Runtime.open(folder) as runtime: runtime.generate(...)`"""

    def __init__(
        self,
        artifact: Artifact,
        residents: _Residents,
        bucket: Bucket,
        *,
        tiled: bool,
        cache: PromptCache | None,
    ) -> None:
        self.artifact = artifact
        self.bucket = bucket
        self._residents = residents
        self._tiled = tiled
        self._cache = cache
        self._tokenize = PromptTokenizer(artifact.folder / "tokenizer", self.manifest.text_length)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        provider: Provider = "auto",
        n_threads: int | None = None,
        verify: bool = True,
        keep: bool = False,
        size: str | None = None,
        tiled: bool = False,
        cache: Path | None = None,
    ) -> Self:
        """A runtime on an artifact; keep=True keeps every graph open between clips.

        size: of its clips, as 480x832x81; None: the artifact's first. tiled: frames are decoded
        tile by tile, in less memory, instead of whole. cache: folder of prompts' features; the text
        encoder is opened for what it lacks only.

        Raises:
            ArtifactError: the artifact is damaged, too new or reaches out of its folder.
            UsageError: it has no such size, or no tiles for it.
        """
        artifact = Artifact.open(Path(folder), verify=verify)
        bucket = artifact.manifest.bucket(size)
        if tiled and bucket.tile is None:
            clip = bucket.geometry
            raise UsageError(
                f"tiled: {folder} has no graphs for tiles of frames of {clip.height} x "
                f"{clip.width} pixels, as these are no larger than a tile; decode them whole"
            )
        residents = _Residents(
            folder=artifact.folder,
            provider=provider,
            n_threads=n_threads,
            config=dict(artifact.manifest.session),
            keep=keep,
            settings=settings_for(artifact.manifest.targets, find_gpus()),
        )
        prompts = None if cache is None else PromptCache.of(
            cache, artifact.manifest, provider=provider, n_threads=n_threads,
            settings=residents.settings,
        )  # fmt: skip
        return cls(artifact, residents, bucket, tiled=tiled, cache=prompts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees every graph; the runtime stays usable and opens them again."""
        self._residents.close()

    @property
    def manifest(self) -> Manifest:
        return self.artifact.manifest

    @property
    def providers(self) -> dict[str, str]:
        """What really ran each graph opened so far: `transformer/model.onnx` -> `cpu`."""
        return dict(self._residents.used)

    def generate(
        self,
        prompt: str,
        *,
        negative: str = "",
        seed: int = 0,
        n_steps: int | None = None,
        guidance: float | None = None,
        latents: np.ndarray | None = None,
        keep_latents: bool = False,
        progress: Progress | None = None,
        check: bool = True,
    ) -> Clip:
        """One clip; the same arguments give the same bytes on one machine.

        n_steps and guidance replace the manifest's. latents: initial noise, float32 C T H W,
        instead of the seed's. keep_latents: the state after every step goes into the clip.

        Raises:
            HealthError: non-finite, black or constant output; check=False returns it all the same.
        """
        states: list[np.ndarray] = []
        problems: list[str] = []
        steps = self.trajectory(
            prompt,
            negative=negative,
            seed=seed,
            n_steps=n_steps,
            guidance=guidance,
            latents=latents,
            progress=progress,
        )
        for i, state in enumerate(steps, start=1):
            n_bad = _n_not_finite(state)
            if n_bad and not problems:
                problems = [f"latents: {n_bad} of {state.size} are not finite after step {i}"]
                if check:
                    self._refuse(problems, prompt, seed)
            states = [*states, state] if keep_latents else [state]
        decoded = []
        for i, sample in enumerate(self._samples(states[-1])):
            if n_bad := _n_not_finite(sample):
                problems.append(f"frame {i}: {n_bad} of {sample.size} values are not finite")
            decoded.append(to_uint8(sample))
        frames = np.stack(decoded)
        problems += health(frames)
        if not self._residents.keep:
            self.close()
        if check:
            self._refuse(problems, prompt, seed)
        return Clip(
            frames=frames,
            prompt=prompt,
            seed=seed,
            fps=self.bucket.geometry.fps,
            latents=np.stack(states) if keep_latents else None,
        )

    def stream(
        self,
        prompt: str,
        *,
        seed: int = 0,
        n_steps: int | None = None,
        guidance: float | None = None,
        progress: Progress | None = None,
    ) -> Iterator[np.ndarray]:
        """Frames uint8 H W 3 of a new clip as they are decoded; holds one latent frame's at a time.

        Raises:
            HealthError: non-finite values at once; after the last frame, a black or constant clip.
        """
        latents = self.denoise(
            prompt, seed=seed, n_steps=n_steps, guidance=guidance, progress=progress
        )
        if n_bad := _n_not_finite(latents):
            self._refuse([f"latents: {n_bad} of {latents.size} are not finite"], prompt, seed)
        tally = HealthTally()
        for i, sample in enumerate(self._samples(latents)):
            if n_bad := _n_not_finite(sample):
                bad = f"frame {i}: {n_bad} of {sample.size} values are not finite"
                self._refuse([bad], prompt, seed)
            frame = to_uint8(sample)
            tally.add(frame)
            yield frame
        self._refuse(tally.problems(), prompt, seed)

    def denoise(
        self,
        prompt: str,
        *,
        negative: str = "",
        seed: int = 0,
        n_steps: int | None = None,
        guidance: float | None = None,
        latents: np.ndarray | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """The clean latents of a prompt, float32 C T H W; arguments as for `generate`."""
        *_, last = self.trajectory(
            prompt,
            negative=negative,
            seed=seed,
            n_steps=n_steps,
            guidance=guidance,
            latents=latents,
            progress=progress,
        )
        return last

    def trajectory(
        self,
        prompt: str,
        *,
        negative: str = "",
        seed: int = 0,
        n_steps: int | None = None,
        guidance: float | None = None,
        latents: np.ndarray | None = None,
        progress: Progress | None = None,
    ) -> Iterator[np.ndarray]:
        """The latents after each denoising step, float32 C T H W; arguments as for `generate`."""
        spec = self.manifest.sampler.with_steps(n_steps).with_guidance(guidance)
        x = noise(seed, self.bucket.latent_shape) if latents is None else self._checked(latents)
        denoiser = Denoiser(spec, seed)
        scales = [spec.guidance_at(float(t)) for t in denoiser.timesteps]
        cond = self.encode(prompt)
        uncond = self.encode(negative) if max(scales) > 1 else None
        for i, (timestep, scale) in enumerate(
            zip(denoiser.timesteps, scales, strict=True), start=1
        ):
            velocity = self._velocity(spec, x, timestep, cond)
            if uncond is not None and scale > 1:
                other = self._velocity(spec, x, timestep, uncond)
                velocity = _guided(velocity, other, scale)
            x = denoiser.step(velocity, x)
            if progress is not None:
                progress(i, spec.n_steps)
            yield x

    def encode(self, prompt: str) -> np.ndarray:
        """The text features of a prompt, float32 1 L D; rows of padding are zero."""
        ids, mask = self._tokenize(prompt)
        if self._cache is not None:
            return self._cache.get(ids, mask, lambda: self._encoded(ids, mask))
        return self._encoded(ids, mask)

    def _encoded(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        session = self._residents.get("text_encoder")
        hidden = session.run(
            {"input_ids": ids, "attention_mask": mask}, last_hidden_state=(*ids.shape, None)
        )["last_hidden_state"]
        return np.where(mask[..., None] > 0, hidden, np.float32(0))

    def frames(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        """Frames uint8 H W 3 of clean latents (float32 C T H W), one after the other."""
        return map(to_uint8, self._samples(latents))

    def _samples(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        """The same in -1..1, float32."""
        mean, std = (
            np.array(values, dtype=np.float32)[:, None, None, None]
            for values in (self.manifest.latents_mean, self.manifest.latents_std)
        )
        z = self._checked(latents) * std + mean
        graph = partial(self._residents.get, "vae_decoder")
        return decode(z, self.bucket, graph, tiled=self._tiled)

    def _velocity(
        self, spec: SamplerSpec, x: np.ndarray, timestep: np.float32, text: np.ndarray
    ) -> np.ndarray:
        expert = "transformer_2" if spec.second_expert(float(timestep)) else "transformer"
        inputs = {
            "hidden_states": x[None],
            "timestep": np.array([timestep], dtype=np.float32),
            "encoder_hidden_states": text,
        }
        session = self._residents.get(expert, self.bucket.transformer)
        velocity = session.run(inputs, out_hidden_states=(1, *x.shape))
        return np.asarray(velocity["out_hidden_states"][0])

    def _checked(self, latents: np.ndarray) -> np.ndarray:
        if latents.shape != self.bucket.latent_shape:
            raise UsageError(
                f"latents are {latents.shape}, these graphs work on {self.bucket.latent_shape} "
                "(C T H W)"
            )
        return np.ascontiguousarray(latents, dtype=np.float32)

    def _refuse(self, problems: list[str], prompt: str, seed: int) -> None:
        if problems:
            raise HealthError(
                f"the clip of {prompt!r} (seed {seed}) by {self.artifact.folder} is not healthy:\n"
                f"{listing(problems)}\n"
                "check the artifact with `hbxt verify`, and try the recipe fp16 on the same model"
            )


@np.errstate(invalid="ignore", over="ignore")  # the health check reports it
def _guided(cond: np.ndarray, uncond: np.ndarray, scale: float) -> np.ndarray:
    return np.asarray(uncond + np.float32(scale) * (cond - uncond))


def _n_not_finite(values: np.ndarray) -> int:
    return values.size - int(np.count_nonzero(np.isfinite(values)))
