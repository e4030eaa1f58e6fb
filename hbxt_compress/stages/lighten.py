"""Lighten: a student folder whose latents a light decoder turns into frames.

All files are those of the model it started as, `vae/` among them: its encoder makes the same
latents. `decoder/` is new. A killed run goes on from its last checkpoint, and learns what it would
have learnt.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from hbxt_compress.algorithms import AnyDecoder
from hbxt_compress.algorithms.light_decoder import Lightened
from hbxt_compress.algorithms.training import Diverged
from hbxt_compress.errors import CalibrationError
from hbxt_compress.lightened import FOLDER, new_decoder, write_decoder
from hbxt_compress.machine import Machine
from hbxt_compress.models.light_decoder import LightDecoder
from hbxt_compress.source import Source
from hbxt_compress.stages.checkpoints import Checkpoints
from hbxt_compress.stages.distill import STUDENT
from hbxt_compress.store import Entry, Work
from hbxt_compress.views import Views

__all__ = ["FACTS", "VERSION", "lighten"]

VERSION = 1
FACTS = ("torch",)
log = logging.getLogger(__name__)


def lighten(work: Work, source: Source, views: Entry, how: AnyDecoder, on: Machine) -> None:
    """Writes `student/`, a whole model folder, `lightened.json` and `training.jsonl`.

    source: the model whose decoder the views are of. Rank 0 does it alone.

    Raises:
        CalibrationError: no such decoder suits this model, or a loss is not finite.
    """
    if not work.ranks.leads:
        return
    watch = Checkpoints(work.scratch)
    try:
        decoder = new_decoder(source, how).to(on.device)
        learnt = how.lighten(decoder, Views(views.folder), watch)
    except (ValueError, Diverged) as error:
        raise CalibrationError(f"lighten: {error}") from None
    told = ", ".join(f"{name} {value:.4g}" for name, value in learnt.measured.items())
    log.info("lighten: %s", told)
    lines = "".join(f"{json.dumps(one)}\n" for one in watch.curve)
    work.piece("training.jsonl", lambda path: _write(path, lines))
    shown = json.dumps(dict(learnt.measured), indent=1) + "\n"
    work.piece("lightened.json", lambda path: _write(path, shown))
    work.piece(STUDENT, lambda path: _write_student(path, source, decoder, learnt))


def _write_student(folder: Path, source: Source, decoder: LightDecoder, learnt: Lightened) -> None:
    for name in source.files:
        if not name.startswith(f"{FOLDER}/"):  # one that was there before is replaced
            copy = folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.folder / name, copy)
    for name, path in source.licences.items():
        shutil.copyfile(path, folder / name)
    write_decoder(folder / FOLDER, decoder, learnt.weights)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
