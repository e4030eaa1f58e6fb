"""VMAF and CAMBI by libvmaf, which the ffmpeg that imageio-ffmpeg carries has built in.

That ffmpeg is GPL: it is run as a process, never linked. Both sides reach it as raw frames, turned
to YUV here (BT.709, limited range, 8 bit, 4:4:4), so that it converts nothing; libvmaf reads the
luma alone. VMAF was trained on codec damage at 1080p: it tells near clips apart, and is 0 for far.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np

from hbxt_compress.clips import Clip
from hbxt_compress.metrics.scales import POINTS, Scale
from hbxt_compress.metrics.weights import Unavailable, WeightFiles, sha256_of

__all__ = ["CAMBI", "VMAF", "Libvmaf", "run_libvmaf", "to_yuv"]

_MODEL: Final = "vmaf_v0.6.1"
_LEAST_PX: Final = 32  # libvmaf reads beyond smaller frames, and dies of it
_CAMBI_LEAST_PX: Final = 216  # of the longer side; below it the whole run fails
_K_RED, _K_BLUE = 0.2126, 0.0722  # BT.709
_LUMA = np.array([_K_RED, 1 - _K_RED - _K_BLUE, _K_BLUE])
_TO_YUV = np.stack(  # columns: luma, then blue and red less luma, as shares of the 8-bit range
    [
        219 / 255 * _LUMA,
        224 / 255 * (np.array([0, 0, 1]) - _LUMA) / (2 * (1 - _K_BLUE)),
        224 / 255 * (np.array([1, 0, 0]) - _LUMA) / (2 * (1 - _K_RED)),
    ],
    axis=1,
).astype(np.float32)
_OFFSET = np.array([16, 128, 128], np.float32)


def to_yuv(frame: np.ndarray) -> np.ndarray:
    """A frame (uint8 H W 3, RGB) as planes Y, Cb, Cr: uint8 3 H W, BT.709, limited range."""
    return np.rint(frame.astype(np.float32) @ _TO_YUV + _OFFSET).astype(np.uint8).transpose(2, 0, 1)


def run_libvmaf(
    ffmpeg: str, reference: Clip, candidate: Clip, features: Sequence[str] = ()
) -> dict[str, Any]:
    """libvmaf's log: `frames`, one each with its `metrics`, and `pooled_metrics` (min, mean, ...).

    features: what is computed beside VMAF, as libvmaf names it, options behind a colon.

    Raises:
        Unavailable: frames below 32 pixels a side, a failed run, or frames that it left out.
    """
    n_frames, height, width = reference.frames.shape[:3]
    if min(height, width) < _LEAST_PX:
        raise Unavailable(
            f"frames of {height}x{width} pixels are too small for libvmaf: each side must have "
            f"{_LEAST_PX}"
        )
    wanted = "|".join(f"name={name.replace(':', chr(92) + ':')}" for name in features)
    chosen = f":feature='{wanted}'" if wanted else ""
    command = [ffmpeg, "-hide_banner", "-nostdin", "-v", "error"]
    with tempfile.TemporaryDirectory() as folder:
        # libvmaf takes the distorted side first; it is not symmetric.
        for name, clip in (("candidate.yuv", candidate), ("reference.yuv", reference)):
            with (Path(folder) / name).open("wb") as file:
                for frame in clip.frames:
                    file.write(to_yuv(frame).tobytes())
            command += ["-f", "rawvideo", "-pix_fmt", "yuv444p", "-s", f"{width}x{height}"]
            command += ["-r", f"{reference.fps:g}", "-i", name]
        graph = f"[0:v][1:v]libvmaf=log_fmt=json:log_path=log.json:model='version={_MODEL}'{chosen}"
        command += ["-lavfi", graph, "-f", "null", "-"]
        run = subprocess.run(command, cwd=folder, capture_output=True, check=False)
        log = Path(folder) / "log.json"
        if run.returncode or not log.is_file():
            said = run.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise Unavailable(
                f"libvmaf failed on {n_frames} frames of {height}x{width} (exit {run.returncode}): "
                f"{said[-1][:200]}"
            )
        found: dict[str, Any] = json.loads(log.read_text(encoding="utf-8"))
    if len(found["frames"]) != n_frames:
        raise Unavailable(f"libvmaf compared {len(found['frames'])} of {n_frames} frames")
    return found


def _vmaf(pooled: Mapping[str, Mapping[str, float]]) -> float:
    return pooled["vmaf"]["mean"]


def _banding(pooled: Mapping[str, Mapping[str, float]]) -> float:
    return abs(pooled["cambi"]["mean"] - pooled["cambi_source"]["mean"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Libvmaf:
    """A number of libvmaf's for a pair of clips; `ffmpeg` is empty until it is loaded."""

    name: str
    direction: Literal["lower", "higher"]
    family: Literal["fidelity", "distribution", "health"]
    pick: Callable[[Mapping[str, Mapping[str, float]]], float]
    features: tuple[str, ...] = ()
    longer_px: int = _LEAST_PX
    ffmpeg: str | None = None
    unit: str = ""
    least_n: int = 8
    scale: Scale | None = None
    extractor: str | None = None
    extractor_sha256: str | None = None

    def load(self, files: WeightFiles) -> Self:
        """This metric with an ffmpeg that has libvmaf; the sha256 is that of the program."""
        ffmpeg = _find_ffmpeg()
        if " libvmaf " not in _told_by(ffmpeg, "-filters"):
            raise Unavailable(
                f"{ffmpeg} has no filter libvmaf: name an ffmpeg that has it in IMAGEIO_FFMPEG_EXE"
            )
        version = " ".join(_told_by(ffmpeg, "-version").split()[:3])
        return replace(
            self,
            ffmpeg=ffmpeg,
            extractor=f"{_MODEL} in {version}",
            extractor_sha256=sha256_of(Path(ffmpeg)),
        )

    def compare(self, reference: Clip, candidate: Clip) -> float:
        """vmaf: mean over frames, 0..100; a clip against itself has 97.4 or more, not always 100.

        cambi: |difference| of the two sides' mean banding, 0 (none) to 24 each.
        """
        if self.ffmpeg is None:
            raise Unavailable("load() it first")
        height, width = reference.frames.shape[1:3]
        if max(height, width) < self.longer_px:
            raise Unavailable(
                f"frames of {height}x{width} pixels are too small for {self.name}: "
                f"one side must have {self.longer_px}"
            )
        found = run_libvmaf(self.ffmpeg, reference, candidate, self.features)
        return float(self.pick(found["pooled_metrics"]))


def _find_ffmpeg() -> str:
    try:
        import imageio_ffmpeg

        named = imageio_ffmpeg.get_ffmpeg_exe()
    except ImportError:
        raise Unavailable("no package imageio-ffmpeg: pip install 'hbxt-compress[slow]'") from None
    except RuntimeError:
        raise Unavailable(
            "imageio-ffmpeg has no ffmpeg for this platform: name one in IMAGEIO_FFMPEG_EXE"
        ) from None
    path = shutil.which(named)
    if path is None:
        raise Unavailable(f"{named} is no program: name an ffmpeg in IMAGEIO_FFMPEG_EXE")
    return str(Path(path).absolute())


def _told_by(ffmpeg: str, option: str) -> str:
    try:
        run = subprocess.run(
            [ffmpeg, "-hide_banner", option], capture_output=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(
            f"{ffmpeg} does not run ({error}): name another in IMAGEIO_FFMPEG_EXE"
        ) from None
    return run.stdout.decode(errors="replace")


VMAF = Libvmaf(name="vmaf", direction="higher", family="fidelity", pick=_vmaf, scale=POINTS)
CAMBI = Libvmaf(
    name="cambi",
    direction="lower",
    family="health",
    pick=_banding,
    features=("cambi:full_ref=true",),
    longer_px=_CAMBI_LEAST_PX,
)
