"""Distill: a student folder in diffusers' layout, with the sampler that it is to run on.

What a student does not change is copied from the model it started as; `sampler.json` beside
`model_index.json` says how it denoises, and goes before the folder's own scheduler.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

import torch
from torch import Tensor

from hbxt_compress.algorithms import AnyDistiller
from hbxt_compress.algorithms.few_steps import Path as TeacherPath
from hbxt_compress.errors import CalibrationError
from hbxt_compress.lessons import Lessons
from hbxt_compress.machine import Machine
from hbxt_compress.sampler import STUDENTS_SAMPLER, SamplerSpec
from hbxt_compress.source import Source
from hbxt_compress.stages.full_model import FullModel
from hbxt_compress.store import Entry, Work

__all__ = ["FACTS", "STUDENT", "VERSION", "distill"]

VERSION = 1
FACTS = ("torch", "diffusers", "transformers")
STUDENT = "student"
_AT_ONCE = 16
log = logging.getLogger(__name__)


def distill(work: Work, source: Source, lessons: Entry, how: AnyDistiller, on: Machine) -> None:
    """Writes `student/`, a whole model folder, and `distilled.json` with what was measured.

    source: the model to start as. lessons: what the original made of noise. Rank 0 does it alone.
    """
    if not work.ranks.leads:
        return
    model, taught = FullModel(source, torch.device(on.device)), Lessons(lessons.folder)
    log.info("distill: %s", type(how).__name__)
    rows = range(len(taught))
    path = TeacherPath(
        states_NKCTHW=torch.stack(
            [taught.states(rows, [k] * len(rows)) for k in range(len(taught.levels_K))], dim=1
        ),
        levels_K=taught.levels_K,
        text_NLD=taught.text(rows),
    )

    def velocity(x: Tensor, level: float, text: Tensor) -> Tensor:
        timestep = level * model.sampler.n_train_timesteps
        guidance = model.sampler.guidance_at(timestep)
        parts = zip(x.split(_AT_ONCE), text.split(_AT_ONCE), strict=True)
        return torch.cat(
            [model.velocity(a, timestep, guidance, b, taught.none_1LD).cpu() for a, b in parts]
        )

    sampler, found = how.fit(velocity, path, model.sampler, lambda text: log.info("%s", text))
    if not all(map(math.isfinite, found.errors)):
        raise CalibrationError("few_steps: latents of the fitted solver are not finite")
    shown = {
        "error_db": 10 * math.log10(found.errors[0]),
        "held_out_error_db": 10 * math.log10(found.errors[1]),
        "energy": found.energy,
    }
    log.info("distill: error on held-out clips %.2f dB", shown["held_out_error_db"])
    work.piece("distilled.json", lambda path: _write_json(path, shown))
    work.piece(STUDENT, lambda path: _write_student(path, source, sampler))


def _write_student(folder: Path, source: Source, sampler: SamplerSpec) -> None:
    for name in source.files:
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.folder / name, copy)
    _write_json(folder / STUDENTS_SAMPLER, sampler.to_json())


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
