"""What decoding in tiles costs and changes: PSNR against whole frames, seconds, peak memory.

    python tests/bench/vae_tiles.py --frame 384x512                  # the built-in model's VAE
    python tests/bench/vae_tiles.py --channels 96 --frame 384x512    # Wan2.1's, random weights
    python tests/bench/vae_tiles.py --tile 128 --overlap 32 --clip some.mp4

Frames are the built-in model's own shapes all over, or those of a clip; encoded, then decoded by
the exported graphs, each way in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from hbxt_compress.torchvision_ops import mend_torchvision

mend_torchvision()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKLWan  # noqa: E402

from hbxt_compress.cli import BUILTIN  # noqa: E402
from hbxt_compress.clips import read_video  # noqa: E402
from hbxt_compress.geometry import Geometry  # noqa: E402
from hbxt_compress.graph.export import export_component  # noqa: E402
from hbxt_compress.manifest import Bucket  # noqa: E402
from hbxt_compress.models import family_of  # noqa: E402
from hbxt_compress.models.wan_vae_graph import vae_decoder_graphs  # noqa: E402
from hbxt_compress.reference.shapes import SIZE_PX, draw, scene  # noqa: E402
from hbxt_compress.runtime.decode import decode  # noqa: E402
from hbxt_compress.runtime.session import Session, open_session  # noqa: E402
from hbxt_compress.source import locate  # noqa: E402
from hbxt_compress.tile import Tile  # noqa: E402

__all__ = ["decoded", "footage", "shapes"]

_FACTOR = 8  # pixels to a latent, of both


def shapes(height: int, width: int, n_frames: int) -> np.ndarray:
    """T H W 3 in 0..1: scenes of one background side by side."""
    rows, columns = -(-height // SIZE_PX), -(-width // SIZE_PX)
    scenes = [replace(scene("evaluation", i), background="black") for i in range(rows * columns)]
    clips = [draw(one)[:n_frames] for one in scenes]
    lines = [np.concatenate(clips[i * columns : (i + 1) * columns], axis=2) for i in range(rows)]
    return np.concatenate(lines, axis=1)[:, :height, :width]


def footage(path: Path, height: int, width: int, n_frames: int) -> np.ndarray:
    """T H W 3 in 0..1: the middle of a clip, made as large as it must be and no larger."""
    frames = torch.from_numpy(read_video(path, max_frames=n_frames)).permute(0, 3, 1, 2) / 255
    scale = 1.001 * max(height / frames.shape[2], width / frames.shape[3])
    frames = torch.nn.functional.interpolate(
        frames, scale_factor=scale, mode="bilinear", antialias=True
    )
    top, left = (frames.shape[2] - height) // 2, (frames.shape[3] - width) // 2
    return frames[:, :, top : top + height, left : left + width].permute(0, 2, 3, 1).numpy()


def decoded(
    folder: Path, bucket: Bucket, tiled: bool, n_threads: int | None
) -> tuple[float, float]:
    """Seconds, and peak MB above what torch and other imports take; frames go into a file."""
    imported = _megabytes("VmRSS")
    opened: dict[str, Session] = {}

    def graph(file: str) -> Session:
        if file not in opened:
            opened.clear()
            opened[file] = open_session(folder / file, "cpu", n_threads=n_threads)
        return opened[file]

    began = time.perf_counter()
    frames = np.stack(list(decode(np.load(folder / "latents.npy"), bucket, graph, tiled=tiled)))
    seconds = time.perf_counter() - began
    np.save(folder / f"{tiled}.npy", frames)
    return seconds, _megabytes("VmHWM") - imported


def _megabytes(key: str) -> float:
    status = Path("/proc/self/status").read_text().split(f"{key}:")[1]
    return int(status.split()[0]) / 1024


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--frame", default="384x512", help="height x width")
    options.add_argument("--n-frames", type=int, default=5)
    options.add_argument("--tile", type=int, default=256)
    options.add_argument("--overlap", type=int, default=64)
    options.add_argument("--channels", type=int, help="of a random VAE like Wan2.1's, which has 96")
    options.add_argument("--clip", type=Path)
    options.add_argument("--threads", type=int)
    chosen = options.parse_args()
    height, width = map(int, chosen.frame.split("x"))
    source = locate(BUILTIN)
    torch.manual_seed(0)
    vae = (
        AutoencoderKLWan(base_dim=chosen.channels).eval().requires_grad_(False)
        if chosen.channels
        else family_of(source).load(source, "vae_decoder")
    )
    content = (
        footage(chosen.clip, height, width, chosen.n_frames)
        if chosen.clip
        else shapes(height, width, chosen.n_frames)
    )
    frames = torch.from_numpy(content).float().permute(3, 0, 1, 2)[None] * 2 - 1
    encode: Any = vae.encode
    latents = encode(frames).latent_dist.mode()[0].numpy()
    bucket = Bucket(
        geometry=Geometry(height=height, width=width, n_frames=chosen.n_frames, fps=8.0),
        latent_shape=latents.shape,
        transformer="model.onnx",
        first="model_first.onnx",
        next="model.onnx",
        tile=Tile.within((height, width), chosen.tile, chosen.overlap),
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_component(folder, vae_decoder_graphs(vae, bucket), {}, precision=32)
        np.save(folder / "latents.npy", latents)
        for tiled in (False, True):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                took = pool.apply(decoded, (folder, bucket, tiled, chosen.threads))
            sys.stdout.write(
                f"{'tiled' if tiled else 'whole'}: {took[0]:.1f} s, peak {took[1]:.0f} MB\n"
            )
        whole, parts = np.load(folder / "False.npy"), np.load(folder / "True.npy")
    error = (((whole - parts) / 2) ** 2).mean(axis=(1, 2, 3))
    decibels = -10 * np.log10([error.mean(), error.max()])
    sys.stdout.write(
        f"tiled against whole: {decibels[0]:.1f} dB, the worst frame {decibels[1]:.1f} dB\n"
    )


if __name__ == "__main__":
    main()
