"""Checkpoints of a training, its curve, and what it has learnt so far as pictures.

All of it lies in a folder that survives kills; a run that goes on forgets what came after the
checkpoint that it goes on from. Of several ranks the first one writes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hbxt_compress import disk
from hbxt_compress.clips import contact_sheet, to_uint8
from hbxt_compress.ranks import ALONE, Ranks
from hbxt_compress.render.events import EventFile

__all__ = ["Checkpoints"]

_SAMPLES = "samples"  # the tag: each row a clip, the student's above the teacher's
_N_FRAMES = 4
_MOST_PX = 320  # of a frame in a sheet
Decode = Callable[[Tensor], Tensor]
log = logging.getLogger(__name__)


class _Stored(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")
        self._names = dict.fromkeys(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Checkpoints:
    """A Watch (algorithms/training.py). curve: every step's values and every judgement's.

    decode: frames 1 C T H W in -1..1 of latents 1 C T H W; None: no samples are shown.
    """

    def __init__(self, folder: Path, ranks: Ranks = ALONE, decode: Decode | None = None) -> None:
        self.ranks, self._folder, self._decode = ranks, folder, decode
        self.curve: list[dict[str, float]] = []
        self.events = EventFile(self._path("events.out.tfevents.0"))

    @property
    def sheets(self) -> Iterator[tuple[int, bytes]]:
        """(step, PNG) of all judgements so far."""
        for one in self.events.events():
            if isinstance(one.value, bytes):
                yield one.step, one.value

    def searched(self, done: int, most: int, error_db: float) -> None:
        told = f"{done} sets of levels tried, error {error_db:.2f} dB"
        log.info("distill: %s", told, extra={"progress": (done, most, "distill: search")})

    def step(self, done: int, total: int, values: Mapping[str, float]) -> None:
        self._note(done, values)
        told = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        log.info("distill: %s", told, extra={"progress": (done, total, "distill")})

    def judged(self, done: int, score: float) -> None:
        self._note(done, {"held_out": score})
        log.info("distill: step %d, held-out score %.4g", done, score)

    def samples(self, done: int, students: Tensor, teachers: Tensor) -> None:
        """Adds a sheet: of each clip frames of the student, and below them the teacher's."""
        if self._decode is None or not self.ranks.leads:
            return
        clips = [
            _frames(self._decode(one[i : i + 1]))
            for i in range(len(students))
            for one in (students, teachers)
        ]
        path = self._folder / "sheet.png"
        contact_sheet(path, clips, n_columns=min(_N_FRAMES, len(clips[0])))
        self.events.image(done, _SAMPLES, path.read_bytes())
        path.unlink()

    def save(self, name: str, state: Mapping[str, Tensor]) -> None:
        if name == "state":
            disk.write_text(self._path("curve"), json.dumps(self.curve))
        unfinished = self._path(name).with_suffix(".tmp")
        save_file({key: one.detach().cpu().contiguous() for key, one in state.items()}, unfinished)
        disk.put(unfinished, self._path(name))

    def load(self, name: str) -> Mapping[str, Tensor] | None:
        found = _Stored(self._path(name)) if self._path(name).exists() else None
        if name == "state" and not self.curve:
            done = -1 if found is None else int(found["done"])
            if found is not None:
                curve = json.loads(self._path("curve").read_text(encoding="utf-8"))
                self.curve = [one for one in curve if one["step"] <= done]
            if self.ranks.leads:
                self.events.rewind(done)
        return found

    def keep_batch(self, step: int, batch: Mapping[str, Tensor]) -> str:
        """Where it lies; of several ranks each keeps its own."""
        several = self.ranks.world > 1
        path = self._path(f"batch-{step}" + (f".{self.ranks.rank}" if several else ""))
        save_file({key: one.detach().cpu().contiguous() for key, one in batch.items()}, path)
        return str(self._path(f"batch-{step}.*") if several else path)

    def _note(self, done: int, values: Mapping[str, float]) -> None:
        self.curve.append({"step": done, **values})
        if self.ranks.leads:
            for name, value in values.items():
                self.events.scalar(done, name, value)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.checkpoint"


def _frames(frames_1CTHW: Tensor) -> np.ndarray:
    """uint8 T H W 3, as small as a sheet needs."""
    frames = frames_1CTHW[0].transpose(0, 1).float()
    if (times := -(-max(frames.shape[-2:]) // _MOST_PX)) > 1:
        frames = F.avg_pool2d(frames, times)
    with torch.no_grad():
        return to_uint8(frames.permute(0, 2, 3, 1).cpu().numpy())
