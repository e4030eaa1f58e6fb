"""Distill: a student folder in diffusers' layout, with the sampler that it is to run on.

What a student does not change is copied from the model it started as; `sampler.json` beside
`model_index.json` says how it denoises, and goes before the folder's own scheduler. A killed run
goes on from its last checkpoint, and learns what it would have learnt.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hbxt_compress import disk
from hbxt_compress.algorithms import AnyDistiller
from hbxt_compress.algorithms.pupil import Distilled, Pupil
from hbxt_compress.algorithms.training import Diverged
from hbxt_compress.errors import CalibrationError
from hbxt_compress.lessons import Lessons
from hbxt_compress.machine import Machine
from hbxt_compress.models import family_of
from hbxt_compress.sampler import STUDENTS_SAMPLER
from hbxt_compress.source import Source
from hbxt_compress.stages.full_model import FullModel
from hbxt_compress.store import Entry, Work

__all__ = ["AT_ONCE", "FACTS", "STUDENT", "VERSION", "Checkpoints", "distill"]

VERSION = 1
FACTS = ("torch", "diffusers", "transformers")
STUDENT = "student"
AT_ONCE = 16
_TRAINED = "transformer"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
log = logging.getLogger(__name__)


def distill(
    work: Work, source: Source, teacher: Source, lessons: Entry, how: AnyDistiller, on: Machine
) -> None:
    """Writes `student/`, a whole model folder, and `distilled.json` with what was measured.

    source: the model to start as. teacher, lessons: the original, and what it made of noise. Where
    weights are trained `training.jsonl` has every step's losses. Rank 0 does it alone.

    Raises:
        CalibrationError: this model cannot be distilled so, or a loss is not finite.
    """
    if not work.ranks.leads:
        return
    taught, watch = Lessons(lessons.folder), Checkpoints(work.scratch)
    pupil = _pupil(source, teacher, taught, torch.device(on.device))
    try:
        student = how.distill(pupil, taught, watch)
    except (ValueError, Diverged) as error:
        raise CalibrationError(f"distill: {error}") from None
    told = ", ".join(f"{name} {value:.4g}" for name, value in student.measured.items())
    log.info("distill: %s", told)
    if watch.curve:
        lines = "".join(f"{json.dumps(one)}\n" for one in watch.curve)
        work.piece("training.jsonl", lambda path: _write(path, lines))
    shown = json.dumps(dict(student.measured), indent=1) + "\n"
    work.piece("distilled.json", lambda path: _write(path, shown))
    work.piece(STUDENT, lambda path: _write_student(path, source, student))


def _pupil(source: Source, teacher: Source, taught: Lessons, device: torch.device) -> Pupil:
    own, none = FullModel(source, device), taught.none_1LD
    teachers = family_of(teacher).sampler(teacher)
    original = cache(lambda: FullModel(teacher, device))  # only training asks it anything
    experts = [one for one in own.chains if one.startswith(_TRAINED)]
    chain = own.chains[_TRAINED]

    def velocity(x: Tensor, level: float | Tensor, text: Tensor) -> Tensor:
        timestep = level * own.sampler.n_train_timesteps
        guidance = own.sampler.guidance_at(float(torch.as_tensor(timestep).detach()))
        parts = zip(x.split(AT_ONCE), text.split(AT_ONCE), strict=True)
        return torch.cat([own.velocity(a, timestep, guidance, b, none).cpu() for a, b in parts])

    @torch.no_grad()
    def answer(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return original().velocity(x, t, teachers.guidance, text, none)

    return Pupil(
        module=chain.module if len(experts) == 1 else None,
        call=chain.call,
        velocity=velocity,
        teacher=answer,
        original=lambda: family_of(teacher).load(teacher, _TRAINED).to(device),
        compile=own.compile,
        device=device,
        sampler=own.sampler,
        teachers=teachers,
    )


def _write_student(folder: Path, source: Source, student: Distilled) -> None:
    trained = source.folder / _TRAINED if student.weights else None
    for name in source.files:
        path = source.folder / name
        weights = path.parent == trained and path.name.endswith((".safetensors", ".index.json"))
        if not weights:
            copy = folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    if student.weights:
        stored = family_of(source).weights(source, _TRAINED)
        tensors = {
            name: student.weights[name].detach().to("cpu", _DTYPES[stored.dtype(name)]).contiguous()
            if name in student.weights
            else stored.tensor(name).to(_DTYPES[stored.dtype(name)])
            for name in stored.names
        }
        save_file(tensors, folder / _TRAINED / _WEIGHTS, metadata={"format": "pt"})
    _write(folder / STUDENTS_SAMPLER, json.dumps(student.sampler.to_json(), indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


class Checkpoints:
    """Checkpoints in a folder that survives kills, and the losses so far."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.curve: list[dict[str, float]] = []

    def searched(self, done: int, most: int, error_db: float) -> None:
        told = f"{done} sets of levels tried, error {error_db:.2f} dB"
        log.info("distill: %s", told, extra={"progress": (done, most, "distill: search")})

    def step(self, done: int, total: int, values: Mapping[str, float]) -> None:
        self.curve.append({"step": done, **values})
        told = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        log.info("distill: %s", told, extra={"progress": (done, total, "distill")})

    def judged(self, done: int, score: float) -> None:
        self.curve.append({"step": done, "held_out": score})
        log.info("distill: step %d, held-out score %.4g", done, score)

    def save(self, name: str, state: Mapping[str, Tensor]) -> None:
        if name == "state":
            disk.write_text(self._path("curve"), json.dumps(self.curve))
        unfinished = self._path(name).with_suffix(".tmp")
        save_file({key: one.detach().cpu().contiguous() for key, one in state.items()}, unfinished)
        disk.put(unfinished, self._path(name))

    def load(self, name: str) -> Mapping[str, Tensor] | None:
        if not self._path(name).exists():
            return None
        state = load_file(self._path(name))
        if name == "state" and not self.curve:
            curve = json.loads(self._path("curve").read_text(encoding="utf-8"))
            self.curve = [one for one in curve if one["step"] <= int(state["done"])]
        return state

    def keep_batch(self, step: int, batch: Mapping[str, Tensor]) -> str:
        path = self._path(f"batch-{step}")
        save_file({key: one.detach().cpu().contiguous() for key, one in batch.items()}, path)
        return str(path)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.checkpoint"
