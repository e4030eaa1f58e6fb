"""Distill: a student folder in diffusers' layout, with the sampler that it is to run on.

What a student does not change is copied from the model it started as; `sampler.json` beside
`model_index.json` says how it denoises, and goes before the folder's own scheduler. A killed run
goes on from its last checkpoint, and learns what it would have learnt. Ranks train together.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hbxt_compress.algorithms import AnyDistiller
from hbxt_compress.algorithms.pupil import Distilled, Pupil
from hbxt_compress.algorithms.sharding import shard
from hbxt_compress.algorithms.training import Diverged
from hbxt_compress.errors import CalibrationError
from hbxt_compress.lessons import Lessons
from hbxt_compress.machine import Machine
from hbxt_compress.models import family_of
from hbxt_compress.ranks import ALONE, Ranks
from hbxt_compress.sampler import STUDENTS_SAMPLER
from hbxt_compress.source import Source
from hbxt_compress.stages.checkpoints import Checkpoints
from hbxt_compress.stages.full_model import FullModel
from hbxt_compress.store import Entry, Work

__all__ = ["AT_ONCE", "FACTS", "STUDENT", "VERSION", "distill"]

VERSION = 1
FACTS = ("torch", "diffusers", "transformers")
STUDENT = "student"
AT_ONCE = 16
_EVENTS, _SAMPLES = "tensorboard", "samples"
_EVENT_FILE = "events.out.tfevents.0"
_TRAINED = "transformer"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
log = logging.getLogger(__name__)


def distill(
    work: Work, source: Source, teacher: Source, lessons: Entry, how: AnyDistiller, on: Machine
) -> None:
    """Writes `student/`, a whole model folder, and `distilled.json` with what was measured.

    source: the model to start as. teacher, lessons: the original, and what it made of noise. Where
    weights are trained `training.jsonl` has every step's losses, `tensorboard/` the same for
    TensorBoard, and `samples/` a sheet of held-out clips for each judgement, each clip of the
    student above the teacher's. All ranks train; what trains nothing rank 0 does alone.

    Raises:
        CalibrationError: this model cannot be distilled so, or a loss is not finite.
        RankLost: another rank is gone.
    """
    together = any(one.trained for one in how.networks)
    if not together and not work.ranks.leads:
        return
    ranks, device = work.ranks if together else ALONE, torch.device(on.device)
    taught = Lessons(lessons.folder)
    watch = Checkpoints(work.scratch, ranks, partial(_decoded, teacher, device))
    pupil = _pupil(source, teacher, taught, device, ranks)
    try:
        student = how.distill(pupil, taught, watch)
    except (ValueError, Diverged) as error:
        raise CalibrationError(f"distill: {error}") from None
    except RuntimeError as error:  # torch tells that a connection broke, not who is gone
        if (lost := ranks.lost()) is None:
            raise
        raise lost from error
    if not work.ranks.leads:
        return
    told = ", ".join(f"{name} {value:.4g}" for name, value in student.measured.items())
    log.info("distill: %s", told)
    if watch.curve:
        lines = "".join(f"{json.dumps(one)}\n" for one in watch.curve)
        work.piece("training.jsonl", lambda path: _write(path, lines))
        work.piece(_EVENTS, lambda path: watch.events.copy(path / _EVENT_FILE))
    if sheets := dict(watch.sheets):
        work.piece(_SAMPLES, lambda path: _write_sheets(path, sheets))
    shown = json.dumps(dict(student.measured), indent=1) + "\n"
    work.piece("distilled.json", lambda path: _write(path, shown))
    work.piece(STUDENT, lambda path: _write_student(path, source, student))


def _pupil(
    source: Source, teacher: Source, taught: Lessons, device: torch.device, ranks: Ranks
) -> Pupil:
    own, none = FullModel(source, device, reads=False), taught.none_1LD
    teachers = family_of(teacher).sampler(teacher)

    @cache  # only training asks it anything
    def original() -> FullModel:
        found = FullModel(teacher, device, reads=False)
        for chain in found.chains.values() if ranks.world > 1 else ():
            shard(chain.module, ranks)
        return found

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
        ranks=ranks,
    )


@torch.no_grad()
def _decoded(source: Source, device: torch.device, latents: Tensor) -> Tensor:
    family = family_of(source)  # read each time: a sheet is rare, and training needs the memory
    vae = family.load(source, "vae_decoder").to(device)
    return family.decode(source, vae, latents.to(device))


def _write_sheets(folder: Path, sheets: Mapping[int, bytes]) -> None:
    folder.mkdir()
    for step, png in sheets.items():
        (folder / f"step-{step:06d}.png").write_bytes(png)


def _write_student(folder: Path, source: Source, student: Distilled) -> None:
    trained = source.folder / _TRAINED if student.weights else None
    for name in source.files:
        path = source.folder / name
        weights = path.parent == trained and path.name.endswith((".safetensors", ".index.json"))
        if not weights:
            copy = folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    for name, path in source.licences.items():
        shutil.copyfile(path, folder / name)
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
