"""The light decoder beside the full one: seconds of their graphs, PSNR, errors from frame to frame.

    python tests/bench/light_decoder.py build/light/store/lighten/<key>/student --clips 64
    python tests/bench/light_decoder.py student --lessons <folder of teach> --sheet sheet.png

student: what `decoder: light` made of the built-in model. Clips are evaluation's, unseen by both.
Both decoders' graphs are exported in float32 and run one after the other, clip by clip. lessons:
latents that the model made, whose frames by the full decoder are what the light one should give.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hbxt_compress.graph.export import export_component
from hbxt_compress.lessons import Lessons
from hbxt_compress.manifest import Bucket
from hbxt_compress.models import Family, family_of
from hbxt_compress.reference import shapes
from hbxt_compress.runtime.decode import decode
from hbxt_compress.runtime.session import Session, open_session
from hbxt_compress.source import BUILTIN, Source, locate

__all__ = ["Decoded", "figures", "sheet"]

_SHOWN = (0, 4, 8, 12, 16)  # frames of a sheet
Decoder = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """Clips T H W 3 in 0..1 by both decoders, the real ones or None, and seconds for each clip."""

    real: Sequence[np.ndarray] | None
    full: Sequence[np.ndarray]
    light: Sequence[np.ndarray]
    seconds: Sequence[tuple[float, float]]


def figures(found: Decoded) -> dict[str, float]:
    """Means over clips; of a pair of times the least, which what else runs disturbs least.

    temporal: mean error of the differences between frames, peak 1. Without real clips the full
    decoder's are what errors are counted from.
    """
    told: dict[str, float] = {"clips": len(found.full)}
    if found.seconds:
        full, light = (min(one[i] for one in found.seconds) for i in (0, 1))
        told |= {"ms_full": 1e3 * full, "ms_light": 1e3 * light, "faster": full / light}
    if found.real is None:
        told["psnr_to_full"] = _mean(_psnr, found.light, found.full)
        told["temporal_error"] = _mean(_temporal, found.light, found.full)
        told["temporal_change"] = _mean(_change, found.light) / _mean(_change, found.full) - 1
        return told
    psnr = [_mean(_psnr, one, found.real) for one in (found.full, found.light)]
    moved = [_mean(_temporal, one, found.real) for one in (found.full, found.light)]
    return told | {
        "psnr_full": psnr[0], "psnr_light": psnr[1], "psnr_lost": psnr[0] - psnr[1],
        "temporal_full": moved[0], "temporal_light": moved[1],
        "temporal_more": moved[1] / moved[0] - 1,
    }  # fmt: skip


def _mean(measure: Callable[..., float], *clips: Sequence[np.ndarray]) -> float:
    return float(np.mean([measure(*one) for one in zip(*clips, strict=True)]))


def _psnr(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(-10 * np.log10(np.square(got - wanted).mean()))


def _temporal(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(np.diff(got, axis=0) - np.diff(wanted, axis=0)).mean())


def _change(clip: np.ndarray) -> float:
    return float(np.abs(np.diff(clip, axis=0)).mean())


def sheet(rows: Sequence[np.ndarray], scale: int = 2) -> Image.Image:
    """Clips T H W 3 in 0..1 below each other, some frames of each."""
    lines = [np.concatenate([one[t] for t in _SHOWN], axis=1) for one in rows]
    levels = np.rint(np.clip(np.concatenate(lines), 0, 1) * 255).astype(np.uint8)
    image = Image.fromarray(levels)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _decoder(folder: Path, family: Family, source: Source, bucket: Bucket, threads: int) -> Decoder:
    """Frames in 0..1 of latents in the VAE's units, by graphs exported into a new folder."""
    folder.mkdir()
    module = family.load(source, "vae_decoder")
    export_component(folder, family.graphs(source, "vae_decoder", module), {}, precision=32)

    @cache
    def graph(name: str) -> Session:
        return open_session(folder / name, "cpu", n_threads=threads)

    return lambda z: np.stack([*decode(z, bucket, graph)]) / 2 + 0.5


def _decoded(
    latents: Sequence[np.ndarray], real: Sequence[np.ndarray] | None, both: tuple[Decoder, Decoder]
) -> Decoded:
    frames: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    seconds = []
    for z in latents:
        took = []
        for one, into in zip(both, frames, strict=True):
            began = time.perf_counter()
            into.append(one(z))
            took.append(time.perf_counter() - began)
        seconds.append((took[0], took[1]))
    # the first clip opens the graphs
    return Decoded(real=real, full=frames[0], light=frames[1], seconds=seconds[1:])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("student", type=Path)
    options.add_argument("--clips", type=int, default=64)
    options.add_argument("--lessons", type=Path)
    options.add_argument("--n-made", type=int, default=64)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--sheet", type=Path)
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    original, student = locate(BUILTIN, hashed=False), locate(str(chosen.student), hashed=False)
    family = family_of(original)
    bucket = family.buckets(original)[0]
    mean, std = (np.array(s, np.float32)[:, None, None, None]
                 for s in family.latent_statistics(original))  # fmt: skip
    vae = family.load(original, "vae")
    real = [shapes.draw(shapes.scene("evaluation", i)) for i in range(chosen.clips)]
    latents = []
    for clip in real:
        x = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].contiguous() * 2 - 1
        with torch.no_grad():
            latents.append(family.encode(original, vae, x)[0].numpy() * std + mean)
    with tempfile.TemporaryDirectory() as name:
        both = (
            _decoder(Path(name) / "full", family, original, bucket, chosen.threads),
            _decoder(Path(name) / "light", family, student, bucket, chosen.threads),
        )
        found = _decoded(latents, real, both)
        told = {"real": figures(found)}
        rows = [one for i in range(3) for one in (real[i], found.full[i], found.light[i])]
        if chosen.lessons is not None:
            lessons = Lessons(chosen.lessons)
            n = min(len(lessons), chosen.n_made)
            states = lessons.states(range(len(lessons) - n, len(lessons)),
                                    [len(lessons.levels_K) - 1] * n)  # fmt: skip
            made = _decoded([one.numpy() * std + mean for one in states], None, both)
            told["made"] = figures(made)
            rows += [one for i in range(3) for one in (made.full[i], made.light[i])]
    for path in (chosen.sheet, chosen.json):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if chosen.sheet is not None:
        sheet(rows).save(chosen.sheet)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(told, indent=1) + "\n")
    for kind, values in told.items():
        told_of = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        sys.stdout.write(f"{kind}: {told_of}\n")


if __name__ == "__main__":
    main()
