"""Set metrics: the distance between the features of two sets of clips, by the project's encoder.

Content and temporal features are two metrics, for content alone finds nothing wrong with shuffled
frames. The name of a loaded metric carries its extractor and 12 digits of the weights' sha256:
distances by different extractors, or from different numbers of clips, cannot be compared.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np

from hbxt_compress.clips import Clip
from hbxt_compress.metrics.frechet import frechet_distance, kernel_distance
from hbxt_compress.metrics.scales import Scale
from hbxt_compress.metrics.weights import Unavailable, WeightFiles

__all__ = [
    "FD_CONTENT",
    "FD_TEMPORAL",
    "FVD_I3D",
    "I3D_SHA256",
    "KID_CONTENT",
    "KID_TEMPORAL",
    "SetDistance",
]

I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
_I3D_LEAST_FRAMES = 10
_CHUNK_CLIPS = 4

Features = Callable[[Sequence[Clip]], np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class SetDistance:
    """A distance between two sets of clips; `look` is empty until it is loaded.

    eye says which features: of the project's encoder, or of I3D, whose name is fvd_i3d.
    """

    name: str
    eye: Literal["content", "temporal", "i3d"]
    distance: Callable[[np.ndarray, np.ndarray], float]
    look: Features | None = None
    extractor: str | None = None
    extractor_sha256: str | None = None
    unit: str = ""
    direction: Literal["lower", "higher"] = "lower"
    family: Literal["fidelity", "distribution", "health"] = "distribution"
    least_n: int = 256
    scale: Scale | None = None

    def load(self, files: WeightFiles) -> Self:
        """This metric with its network in memory; Unavailable if that cannot be had."""
        if self.eye == "i3d":
            look, sha256 = _open_i3d(files)
            named = "i3d_torchscript, resized and scaled inside, all frames"
            return replace(self, look=look, extractor=named, extractor_sha256=sha256)
        from hbxt_compress.metrics.extractor import Extractor  # here, so that a list needs no torch

        encoder, part = Extractor(), 0 if self.eye == "content" else 1
        return replace(
            self,
            name=f"{self.name}[{encoder.name}@{encoder.sha256[:12]}]",
            look=lambda clips: encoder.features(clips)[part],
            extractor=encoder.name,
            extractor_sha256=encoder.sha256,
        )

    def features(self, clips: Sequence[Clip]) -> np.ndarray:
        """One row per clip, float64 (N, D)."""
        if self.look is None:
            raise Unavailable("load() it first")
        return self.look(clips)

    def measure(self, reference: Sequence[Clip], candidate: Sequence[Clip]) -> float:
        """The distance between the two sets."""
        return self.distance(self.features(reference), self.features(candidate))


def _open_i3d(files: WeightFiles) -> tuple[Features, str]:
    """I3D's logits as StyleGAN-V takes them (resized, scaled inside the file), and its sha256.

    Of a clip's all frames, where published numbers are of 16.
    """
    if files.i3d is None or not files.i3d.is_file():
        raise Unavailable(
            "no i3d_torchscript.pt: set HBXT_I3D to its path; fd_content and fd_temporal "
            "need no such file"
        )
    content = files.i3d.read_bytes()  # once: what is hashed is what runs
    sha256, wanted = hashlib.sha256(content).hexdigest(), files.i3d_sha256 or I3D_SHA256
    if sha256 != wanted:
        raise Unavailable(
            f"{files.i3d.name} has sha256 {sha256[:12]}..., expected {wanted[:12]}...: get the "
            "published file, or state another hash in HBXT_I3D_SHA256"
        )
    import torch  # here, so that a list of metrics needs no torch

    model = torch.jit.load(io.BytesIO(content), map_location="cpu").eval()

    @torch.no_grad()
    def look(clips: Sequence[Clip]) -> np.ndarray:
        n_frames = len(clips[0].frames)
        if n_frames < _I3D_LEAST_FRAMES:
            raise Unavailable(
                f"clips of {n_frames} frames are too short, I3D needs {_I3D_LEAST_FRAMES}"
            )
        rows = []
        for start in range(0, len(clips), _CHUNK_CLIPS):
            frames = np.stack([clip.frames for clip in clips[start : start + _CHUNK_CLIPS]])
            video = torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float().contiguous()
            found = model(video, rescale=True, resize=True, return_features=True)
            rows.append(found.reshape(len(frames), -1).double().numpy())
        return np.concatenate(rows)

    return look, sha256


FD_CONTENT = SetDistance(name="fd_content", eye="content", distance=frechet_distance)
FD_TEMPORAL = SetDistance(name="fd_temporal", eye="temporal", distance=frechet_distance)
KID_CONTENT = SetDistance(name="kid_content", eye="content", distance=kernel_distance)
KID_TEMPORAL = SetDistance(name="kid_temporal", eye="temporal", distance=kernel_distance)
FVD_I3D = SetDistance(name="fvd_i3d", eye="i3d", distance=frechet_distance)
