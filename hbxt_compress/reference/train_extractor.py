"""Trains the small video encoder behind the Frechet distance and writes it beside its card.

It learns to tell colour, shape and background from the content features alone and motion from the
temporal features alone, on single-object clips of the train split; the classifiers are thrown away.
Run: python -m hbxt_compress.reference.train_extractor [work folder]
"""

from __future__ import annotations

import json
import logging
import platform
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from hbxt_compress.metrics.extractor import FOLDER, N_FEATURES, VideoEncoder
from hbxt_compress.metrics.weights import sha256_of
from hbxt_compress.reference import loop, shapes

__all__ = ["accuracy", "standardize", "train", "write"]

N_STEPS = 700
_BATCH = 32
_N_FRAMES = 9  # of 17, a window that starts anywhere: half the work
_WORDS = {
    "colour": tuple(shapes.COLOURS),
    "shape": shapes.SHAPES,
    "background": tuple(shapes.BACKGROUNDS),
    "motion": tuple(shapes.MOTIONS),
}


class _Pupil(nn.Module):
    """The encoder with one linear classifier for each attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = VideoEncoder()
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(3 * N_FEATURES if name == "motion" else N_FEATURES, len(words))
                for name, words in _WORDS.items()
            }
        )

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        content, temporal = self.encoder(frames)
        return {
            name: head(temporal if name == "motion" else content)
            for name, head in self.heads.items()
        }


def _batch(split: shapes.Split, indices: range) -> tuple[Tensor, dict[str, Tensor]]:
    """Single-object clips, float B T 3 H W in [-1, 1], and the index of each attribute's word."""
    scenes = [
        scene for scene in (shapes.scene(split, i) for i in indices) if len(scene.things) == 1
    ]
    frames = torch.from_numpy(np.stack([shapes.draw(scene) for scene in scenes]))
    said = {
        name: [
            words.index(
                scene.background if name == "background" else getattr(scene.things[0], name)
            )
            for scene in scenes
        ]
        for name, words in _WORDS.items()
    }
    labels = {name: torch.tensor(values) for name, values in said.items()}
    return frames.permute(0, 1, 4, 2, 3) * 2 - 1, labels


def _generator(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(step)


def train(folder: Path, n_steps: int = N_STEPS) -> nn.Module:
    """The trained encoder with its classifiers, in eval mode; resumes from `folder`."""
    torch.manual_seed(0)
    pupil = _Pupil()
    optimizer = torch.optim.AdamW(pupil.parameters(), lr=1e-3, weight_decay=1e-4)

    def step(k: int) -> float:
        frames, labels = _batch("train", range(k * _BATCH, (k + 1) * _BATCH))
        for group in optimizer.param_groups:
            group["lr"] = loop.cosine(k, n_steps, 3e-3, warmup=50)
        start = int(torch.randint(frames.shape[1] - _N_FRAMES + 1, (), generator=_generator(k)))
        told = pupil(frames[:, start : start + _N_FRAMES])
        loss = sum((F.cross_entropy(told[name], labels[name]) for name in _WORDS), torch.zeros(()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    loop.run("extractor", folder, n_steps, {"model": pupil, "optimizer": optimizer}, step)
    return pupil.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(pupil: nn.Module, n_clips: int = 256) -> dict[str, float]:
    """Share of evaluation clips told right, by attribute."""
    right = dict.fromkeys(_WORDS, 0)
    for start in range(0, n_clips, 32):
        frames, labels = _batch("evaluation", range(start, start + 32))
        told = pupil(frames)
        for name in right:
            right[name] += int((told[name].argmax(1) == labels[name]).sum())
    return {name: count / n_clips for name, count in right.items()}


@torch.no_grad()
def standardize(encoder: nn.Module, n_clips: int = 512) -> None:
    """Sets the encoder's centre and spread from train clips; call it once, after training."""
    found = [
        torch.cat(encoder(_batch("train", range(k, k + 32))[0]), 1) for k in range(0, n_clips, 32)
    ]
    features = torch.cat(found)
    encoder.get_buffer("centre").copy_(features.mean(0))
    encoder.get_buffer("spread").copy_(features.std(0).clamp_min(1e-3))


def write(pupil: nn.Module, folder: Path = FOLDER) -> None:
    """Writes model.safetensors (fp16, encoder only, standardized) and card.json."""
    folder.mkdir(parents=True, exist_ok=True)
    told_right = accuracy(pupil)
    encoder = pupil.get_submodule("encoder")
    standardize(encoder)
    weights = {key: value.half().contiguous() for key, value in encoder.state_dict().items()}
    (folder / "model.safetensors").write_bytes(save(weights))  # save_file makes it private
    card = {
        "name": "shapes-encoder-v1",
        "sha256": sha256_of(folder / "model.safetensors"),
        "n_parameters": sum(value.numel() for value in weights.values()),
        "features": {"content": N_FEATURES, "temporal": 3 * N_FEATURES},
        "input": "RGB in [-1, 1], resized to 64x64 (bilinear, antialiased), every frame",
        "trained_on": "hbxt_compress.reference.shapes, split train, single-object clips",
        "training": {
            "n_steps": N_STEPS,
            "frames": _N_FRAMES,
            "batch": _BATCH,
            "seed": 0,
            "optimizer": "AdamW, peak 3e-3",
        },
        "evaluation_accuracy": told_right,
        "made_with": {"python": platform.python_version(), "torch": torch.__version__},
        "licence": "Apache-2.0",
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write(train(Path(sys.argv[1] if len(sys.argv) > 1 else "build/extractor")))
