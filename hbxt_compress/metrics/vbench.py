"""VBench's scores of single clips: how far the candidate's are from the reference's, either way.

Higher is not better: frozen and collapsed clips score high. Flickering is computed here, exactly as
VBench does. The other dimensions need networks and are left to the package itself. It wants older
versions of numpy and transformers than this project, so it is run by a Python of its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, Self

import numpy as np

from hbxt_compress.clips import Clip, write_lossless_mp4
from hbxt_compress.metrics.scales import Scale
from hbxt_compress.metrics.weights import Unavailable, WeightFiles, sha256_of

__all__ = ["DIMENSIONS", "VBENCH", "VbenchScore", "temporal_flickering"]

_RUN: Final = Path(__file__).with_name("vbench_run.py")
_DINO: Final = "dino_model/dino_vitbase16_pretrain.pth"
# dimension -> what VBench 0.1.5 opens in its cache folder, and downloads where it is missing
_OPENED: Final[Mapping[str, tuple[str, ...]]] = {
    "subject_consistency": ("dino_model/facebookresearch_dino_main/hubconf.py", _DINO),
    "background_consistency": ("clip_model/ViT-B-32.pt",),
    "motion_smoothness": ("amt_model/amt-s.pth",),
    "dynamic_degree": ("raft_model/models/raft-things.pth",),
    "aesthetic_quality": (
        "clip_model/ViT-L-14.pt",
        "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
    ),
    "imaging_quality": ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
}
# As far as the publishers state them: in the address of a file, or 8 digits in its name.
_SHA256: Final[Mapping[str, str]] = {
    "clip_model/ViT-B-32.pt": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "clip_model/ViT-L-14.pt": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth": "358bb6af",
}
DIMENSIONS: Final = ("temporal_flickering", *_OPENED)

Scores = Callable[[Sequence[Clip]], list[float]]


def temporal_flickering(frames: np.ndarray) -> float:
    """1 - mean absolute difference of consecutive frames / 255, in [0, 1]; frames uint8 T H W 3.

    VBench asks for still scenes; a moving one scores lower because it moves.
    """
    if len(frames) < 2:
        raise Unavailable("flickering needs clips of 2 frames or more")
    change = [
        np.abs(after.astype(np.int16) - before.astype(np.int16)).mean()
        for before, after in itertools.pairwise(frames)
    ]
    return float(1 - np.mean(change) / 255)


@dataclass(frozen=True, slots=True, kw_only=True)
class VbenchScore:
    """One of VBench's dimensions, in [0, 1]; `look` is empty until it is loaded."""

    dimension: str
    look: Scores | None = None
    unit: str = ""
    direction: Literal["lower", "higher"] = "lower"
    family: Literal["fidelity", "distribution", "health"] = "health"
    least_n: int = 8
    scale: Scale | None = None
    extractor: str | None = None
    extractor_sha256: str | None = None

    @property
    def name(self) -> str:
        return f"vbench_{self.dimension}"

    def load(self, files: WeightFiles) -> Self:
        """This dimension with its package and weights found; Unavailable without them.

        The sha256 is that of the weights, or of their sha256 in a row where there are several.
        """
        if self.dimension not in _OPENED:
            return replace(self, look=lambda clips: [temporal_flickering(c.frames) for c in clips])
        python = _find_python(files)
        version = _version(python)
        cache = files.vbench_cache or Path.home() / ".cache" / "vbench"
        sha256s = _checked(self.dimension, cache)
        return replace(
            self,
            look=lambda clips: _scored(self.dimension, clips, python, cache),
            extractor=f"vbench {version}: {', '.join(Path(name).name for name in sha256s)}",
            extractor_sha256=next(iter(sha256s.values()))
            if len(sha256s) == 1
            else hashlib.sha256("".join(sha256s.values()).encode()).hexdigest(),
        )

    def scores(self, clips: Sequence[Clip]) -> list[float]:
        """One score a clip, in [0, 1] and in order; dynamic_degree says 0 or 1."""
        if self.look is None:
            raise Unavailable("load() it first")
        return self.look(clips)


def _find_python(files: WeightFiles) -> str:
    if files.vbench is not None:
        return str(files.vbench.absolute())
    if importlib.util.find_spec("vbench") is not None:
        return sys.executable
    raise Unavailable(
        "no package vbench: install vbench==0.1.5 in a virtual environment of its own (it needs "
        "numpy below 2) and set HBXT_VBENCH to the python in it"
    )


def _version(python: str) -> str:
    ask = "import importlib.metadata as m; print(m.version('vbench'))"
    try:
        run = subprocess.run(
            [python, "-c", ask], capture_output=True, check=True, timeout=60, text=True
        )
    except (OSError, subprocess.SubprocessError):
        raise Unavailable(
            f"{python} has no package vbench: set HBXT_VBENCH to a python that has vbench==0.1.5"
        ) from None
    return run.stdout.strip()


def _checked(dimension: str, cache: Path) -> dict[str, str]:
    """sha256 of each file that a dimension opens; nothing is ever downloaded."""
    names = _OPENED[dimension]
    if missing := [name for name in names if not (cache / name).is_file()]:
        raise Unavailable(
            f"{cache} lacks {', '.join(missing)}: let VBench download it, as eval/README.md shows, "
            "or name another folder in VBENCH_CACHE_DIR"
        )
    found = {name: sha256_of(cache / name) for name in names}
    for name, sha256 in found.items():
        if not sha256.startswith(_SHA256.get(name, "")):
            raise Unavailable(
                f"{name} has sha256 {sha256[:12]}..., expected {_SHA256[name][:12]}: get it again"
            )
    return found


def _scored(dimension: str, clips: Sequence[Clip], python: str, cache: Path) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        videos, out, torch_home = (Path(folder) / name for name in ("videos", "out", "hub"))
        paths = [videos / f"{i:05d}.mp4" for i in range(len(clips))]
        for path, clip in zip(paths, clips, strict=True):
            write_lossless_mp4(path, clip.frames, clip.fps)
        environment = {
            **os.environ,
            "VBENCH_CACHE_DIR": str(cache.absolute()),
            "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",  # its weights are pickles: none may run code
            "HF_HUB_OFFLINE": "1",
        }
        if dimension == "subject_consistency":  # DINO looks there, whatever path VBench gives it
            checkpoints = torch_home / "hub" / "checkpoints"
            checkpoints.mkdir(parents=True)
            (checkpoints / Path(_DINO).name).symlink_to((cache / _DINO).absolute())
            environment["TORCH_HOME"] = str(torch_home)
        # As text: a script's own folder would be searched first, and this file be its vbench.
        command = [python, "-c", _RUN.read_text("utf-8"), dimension, str(videos), str(out)]
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
        written = out / "scores_eval_results.json"
        if run.returncode or not written.is_file():
            raise Unavailable(
                f"VBench failed on {len(clips)} clips (exit {run.returncode}): "
                f"{_last_words(dimension, run.stderr.decode(errors='replace'))}"
            )
        _, each = json.loads(written.read_text(encoding="utf-8"))[dimension]
    # Its order is that of the folder's listing; its quality of a single clip is in percent.
    by_name = {Path(one["video_path"]).name: float(one["video_results"]) for one in each}
    if missing := [path.name for path in paths if path.name not in by_name]:
        raise Unavailable(f"VBench scored {len(by_name)} of {len(clips)} clips, not {missing[0]}")
    whole = 100 if dimension == "imaging_quality" else 1
    return [by_name[path.name] / whole for path in paths]


def _last_words(dimension: str, stderr: str) -> str:
    if "weights_only" in stderr:  # amt-s.pth is known to hold more than tensors
        names = ", ".join(Path(name).name for name in _OPENED[dimension])
        return f"{names} holds more than tensors, which may run code: save it with tensors only"
    said = [line for line in stderr.splitlines() if line.strip()]
    return said[-1].strip()[:200] if said else "it said nothing"


VBENCH: Final = tuple(VbenchScore(dimension=dimension) for dimension in DIMENSIONS)
