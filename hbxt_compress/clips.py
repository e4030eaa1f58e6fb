"""Clip and ClipSet: generated frames with where they came from; lossless on disk, mp4 for people.

Also the few things every maker or judge of frames must do in one way: float samples to 8 bit, video
files in and out (PyAV), a sheet of frames as PNG, and the health check.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Self, overload

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hbxt_compress.errors import (
    RuntimeUnavailable,
    SourceError,
    StoreError,
    UsageError,
    listing,
)

__all__ = [
    "Clip",
    "ClipSet",
    "HealthTally",
    "StoredClips",
    "contact_sheet",
    "health",
    "read_video",
    "to_uint8",
    "write_lossless_mp4",
    "write_mp4",
]

_INDEX = "clips.json"
_H264_ENCODERS = ("libx264", "libopenh264")  # hardware's are listed even where they fail
_BLACK = 2  # of 255: what limited-range video calls black comes back as 0..2
_FLAT = 2  # of 255: rounding noise on a constant picture


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clip:
    """One generated clip.

    frames: uint8 T H W 3. latents: float32 S C T' H' W', the state after each of S denoising steps,
    or None where it was not asked for.
    """

    frames: np.ndarray
    prompt: str
    seed: int
    fps: float
    latents: np.ndarray | None = None

    @property
    def sha256(self) -> str:
        """Digest of the frames' shape and bytes; prompt, seed and latents do not enter."""
        digest = hashlib.sha256(f"{self.frames.dtype} {self.frames.shape}".encode())
        digest.update(np.ascontiguousarray(self.frames).data)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Writes one safetensors file; the same clip gives the same bytes."""
        tensors = {"frames": np.ascontiguousarray(self.frames)}
        if self.latents is not None:
            tensors["latents"] = np.ascontiguousarray(self.latents, dtype=np.float32)
        about = {"prompt": self.prompt, "seed": self.seed, "fps": self.fps}
        save_file(tensors, path, metadata={"clip": json.dumps(about, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """The clip in a file; StoreError if there is none or it is damaged."""
        try:
            with safe_open(path, framework="numpy") as file:
                about = json.loads(file.metadata()["clip"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(
                frames=tensors["frames"],
                prompt=about["prompt"],
                seed=about["seed"],
                fps=about["fps"],
                latents=tensors.get("latents"),
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise StoreError(f"{path.name}: not a readable clip ({error})") from error


@dataclass(frozen=True, slots=True)
class StoredClips(Sequence[Clip]):
    """The clips of files, each read when it is asked for and not kept."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, i: int) -> Clip: ...
    @overload
    def __getitem__(self, i: slice) -> StoredClips: ...
    def __getitem__(self, i: int | slice) -> Clip | StoredClips:
        if isinstance(i, slice):
            return StoredClips(self.paths[i])
        return Clip.load(self.paths[i])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClipSet:
    """Clips in the order of the suite that asked for them.

    On disk one file a clip and clips.json, written last: without it there is no clip set.
    """

    clips: Sequence[Clip]

    @staticmethod
    def file_name(i: int) -> str:
        """The name of the i-th clip's file, from 0."""
        return f"{i:04d}.safetensors"

    @classmethod
    def seal(cls, folder: Path, items: Sequence[tuple[str, int]]) -> None:
        """Writes clips.json over the clip files of `items`, (prompt, seed) pairs.

        Raises:
            StoreError: a clip that is missing, damaged or of another prompt or seed (all named).
        """
        index, problems = [], []
        for i, (prompt, seed) in enumerate(items):
            name = cls.file_name(i)
            try:
                clip = Clip.load(folder / name)
            except StoreError as error:
                problems.append(str(error))
                continue
            if (clip.prompt, clip.seed) != (prompt, seed):
                problems.append(f"{name}: is of {clip.prompt!r} (seed {clip.seed}), not {prompt!r}")
            about = {"prompt": prompt, "seed": seed, "fps": clip.fps, "sha256": clip.sha256}
            index.append({"file": name, **about})
        _refuse(folder, problems)
        text = json.dumps({"clips": index}, indent=2, ensure_ascii=False)
        _write_whole(folder / _INDEX, (text + "\n").encode())

    def save(self, folder: Path) -> None:
        """Writes every clip, then clips.json."""
        folder.mkdir(parents=True, exist_ok=True)
        for i, clip in enumerate(self.clips):
            clip.save(folder / self.file_name(i))
        self.seal(folder, [(clip.prompt, clip.seed) for clip in self.clips])

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The clips of a folder, every frame checked against its digest; read when asked for.

        Raises:
            StoreError: no or unreadable clips.json; clips that are missing or changed (all named).
        """
        try:
            document = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            index = [(entry["file"], entry["sha256"]) for entry in document["clips"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{folder / _INDEX}: no clip set ({error}); sample it again"
            ) from error
        problems = []
        for name, sha256 in index:
            try:
                if Clip.load(folder / name).sha256 != sha256:
                    problems.append(f"{name}: frames changed since they were written")
            except StoreError as error:
                problems.append(str(error))
        _refuse(folder, problems)
        return cls(clips=StoredClips(tuple(folder / name for name, _ in index)))


def to_uint8(samples: np.ndarray) -> np.ndarray:
    """Samples in -1..1 as uint8 0..255 of the same shape: clipped, then rounded; NaN becomes 0."""
    scaled = np.clip(np.asarray(samples, dtype=np.float32) / 2 + 0.5, 0, 1) * 255
    return np.nan_to_num(scaled.round(), nan=0.0).astype(np.uint8)


def health(frames: np.ndarray) -> list[str]:
    """What is wrong with frames T H W 3 (uint8, or float in 0..1), worst first; [] if nothing is.

    Non-finite values, a wrong shape, dtype or range, all black, or no spatial variation in any
    frame. A still picture is healthy.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        return [f"shape {frames.shape}: not T H W 3"]
    if np.issubdtype(frames.dtype, np.floating):
        finite = np.isfinite(frames)
        if not finite.all():
            return [f"{frames.size - int(finite.sum())} of {frames.size} values are not finite"]
        if frames.min() < -1e-3 or frames.max() > 1 + 1e-3:
            return [f"values span {frames.min():.3g}..{frames.max():.3g}, not 0..1"]
        frames = frames * 255
    elif frames.dtype != np.uint8:
        return [f"dtype {frames.dtype}: neither uint8 nor float"]
    tally = HealthTally()
    for frame in frames:
        tally.add(frame)
    return tally.problems()


class HealthTally:
    """The health of a clip whose frames (H W 3, 0..255) pass by one at a time."""

    def __init__(self) -> None:
        self._brightest = 0.0
        self._spread = 0.0

    def add(self, frame: np.ndarray) -> None:
        self._brightest = max(self._brightest, float(frame.max()))
        self._spread = max(self._spread, float(np.ptp(frame, axis=(0, 1)).max()))

    def problems(self) -> list[str]:
        """All black, or no spatial variation in any frame so far; [] if neither."""
        if self._brightest <= _BLACK:
            return [f"all black: the brightest value is {self._brightest:.0f} of 255"]
        if self._spread <= _FLAT:
            return [f"constant: no frame varies by more than {self._spread:.0f} of 255"]
        return []


def write_mp4(path: Path, frames: Iterable[np.ndarray], fps: float) -> int:
    """Writes frames (uint8 H W 3, even sizes) as H.264 and returns how many; holds one at a time.

    Raises:
        UsageError: no frames, odd or changing sizes, another dtype, or a name not ending in .mp4.
        RuntimeUnavailable: this PyAV has no H.264 encoder.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise UsageError(f"{path}: video is written as H.264 in MP4; give a name ending in .mp4")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.partial.mp4")
    n_frames = 0
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = None
            for frame in frames:
                if stream is None:
                    stream = _h264_stream(container, frame, fps)
                if frame.shape != (stream.height, stream.width, 3) or frame.dtype != np.uint8:
                    wanted = f"uint8 ({stream.height}, {stream.width}, 3)"
                    got = f"{frame.dtype} {frame.shape}"
                    raise UsageError(f"frame {n_frames} is {got}, the first one was {wanted}")
                container.mux(stream.encode(_video_frame(frame)))
                n_frames += 1
            if stream is None:
                raise UsageError(f"{path}: no frames to write")
            container.mux(stream.encode(None))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return n_frames


def write_lossless_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    """Writes frames (uint8 T H W 3) as H.264 in RGB, which a reader gives back to the bit.

    Raises:
        RuntimeUnavailable: this PyAV has no libx264rgb.
    """
    if "libx264rgb" not in av.codecs_available:
        raise RuntimeUnavailable(
            f"this PyAV {av.__version__} has no encoder libx264rgb; "
            "install the `av` wheel from the package index"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264rgb", rate=rate, options={"qp": "0"})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        for frame in frames:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(rgb))
        container.mux(stream.encode(None))


def read_video(path: Path, *, max_frames: int | None = None) -> np.ndarray:
    """The frames of a file's first video stream, uint8 T H W 3, at most max_frames of them."""
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                if max_frames is not None and len(frames) >= max_frames:
                    break
                frames.append(frame.to_ndarray(format="rgb24"))
    except (OSError, FFmpegError, IndexError) as error:
        raise SourceError(f"{path}: not a readable video ({error})") from error
    if not frames:
        raise SourceError(f"{path}: a video without frames")
    return np.stack(frames)


def contact_sheet(path: Path, clips: Sequence[np.ndarray], *, n_columns: int = 8) -> None:
    """Writes a PNG: one row a clip (uint8 T H W 3, equal H W), n_columns frames spread over T."""
    if not clips or len({clip.shape[1:] for clip in clips}) != 1:
        shapes = [clip.shape for clip in clips]
        raise UsageError(f"{path}: a sheet needs clips of one frame size, got {shapes}")
    rows = []
    for clip in clips:
        picked = np.linspace(0, len(clip) - 1, n_columns).round().astype(int)
        tiles = np.pad(clip[picked], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
        rows.append(np.concatenate(list(tiles), axis=1))
    sheet = np.ascontiguousarray(np.concatenate(rows, axis=0))
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = sheet.shape[:2]
    encoder.pix_fmt, encoder.time_base = "rgb24", Fraction(1)
    packets = [
        *encoder.encode(av.VideoFrame.from_ndarray(sheet, format="rgb24")),
        *encoder.encode(None),
    ]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    _write_whole(Path(path), b"".join(bytes(packet) for packet in packets))


def _h264_stream(
    container: av.container.OutputContainer, frame: np.ndarray, fps: float
) -> av.VideoStream:
    if frame.ndim != 3 or frame.shape[0] % 2 or frame.shape[1] % 2:
        raise UsageError(f"frames are {frame.shape}: H.264 needs H W 3 with even height and width")
    available = [name for name in _H264_ENCODERS if name in av.codecs_available]
    if not available:
        raise RuntimeUnavailable(
            f"this PyAV {av.__version__} has no H.264 encoder ({', '.join(_H264_ENCODERS)}); "
            "install the `av` wheel from the package index"
        )
    rate = Fraction(fps).limit_denominator(1001)
    options = {}
    if available[0] == "libx264":  # it would look 40 frames ahead, and keep them
        options = {"crf": "12", "preset": "medium", "rc-lookahead": "10"}
    stream = container.add_stream(available[0], rate=rate, options=options)
    assert isinstance(stream, av.VideoStream)
    stream.height, stream.width = frame.shape[:2]
    stream.pix_fmt = "yuv420p"
    stream.codec_context.color_range = ColorRange.MPEG
    stream.codec_context.colorspace = Colorspace.ITU709
    if not options:
        stream.bit_rate = max(1_000_000, int(frame.size * float(rate)))
    return stream


def _video_frame(frame: np.ndarray) -> av.VideoFrame:
    rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    return rgb.reformat(
        format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
    )


def _refuse(folder: Path, problems: Sequence[str]) -> None:
    if problems:
        raise StoreError(f"{folder}: sample these clips again:\n{listing(problems)}")


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(content)
    temporary.replace(path)
