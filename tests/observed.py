"""What a micro model met on its own trajectories, and copies of it that were tampered with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from hbxt_compress.machine import Machine
from hbxt_compress.prompts import PromptSet
from hbxt_compress.source import Source, locate
from hbxt_compress.stages.calibrate import calibrate
from hbxt_compress.store import Entry, Work

PROMPTS = ("a red circle", "a blue square moving left", "a green cross", "two white circles")


def source_of(folder: Path) -> Source:
    return locate(str(folder), hashed=False)


def observed(
    source: Source, folder: Path, *, n_prompts: int = 3, observe: tuple[int, ...] = (0, 2)
) -> Entry:
    """The trajectories of some prompts at some of three steps, the last prompt held out."""
    folder.mkdir(parents=True)
    prompts = PromptSet(
        name="p", summary="s", prompts=PROMPTS[:n_prompts], seed=1, n_steps=3, observe=observe
    )
    calibrate(Work(folder), source, prompts, Machine())
    return Entry(folder=folder, stage="calibrate", key="k", digest="d")


def changed(folder: Path, out: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """A copy whose transformer and text encoder have change(name, parameter) for parameters."""
    shutil.copytree(folder, out)
    for component in ("transformer", "text_encoder"):
        (path,) = (out / component).glob("*.safetensors")
        state = {f"{component}/{name}": tensor for name, tensor in load_file(path).items()}
        new = {
            name.removeprefix(f"{component}/"): change(name, tensor).contiguous().clone()
            for name, tensor in state.items()
        }
        save_file(new, path, metadata={"format": "pt"})
    return out


def with_two_experts(folder: Path, out: Path) -> Path:
    """A copy with a second expert of the same weights for timesteps below 875."""
    shutil.copytree(folder, out)
    shutil.copytree(folder / "transformer", out / "transformer_2")
    index = json.loads((out / "model_index.json").read_text())
    index |= {"transformer_2": index["transformer"], "boundary_ratio": 0.875}
    (out / "model_index.json").write_text(json.dumps(index))
    return out
