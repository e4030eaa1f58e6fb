"""Refine: tune a quantized model against the original.

Writes what `quantize` writes, one file a component, so that export takes either. A killed run goes
on from the last checkpoint.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hbxt_compress import disk
from hbxt_compress.algorithms import SAMPLER_REFINERS, AnyRefiner
from hbxt_compress.algorithms.example import Example
from hbxt_compress.chain import Chain
from hbxt_compress.errors import CalibrationError
from hbxt_compress.layers import LayerName
from hbxt_compress.machine import Machine
from hbxt_compress.models import family_of
from hbxt_compress.quantized import QuantizedModel, QuantizedWeight, save_block
from hbxt_compress.sampler import SamplerSpec
from hbxt_compress.source import Source
from hbxt_compress.stages.batches import text_batches, transformer_batches
from hbxt_compress.stages.side_by_side import Batch
from hbxt_compress.stages.student import free_parameters, make_student, tuned
from hbxt_compress.stages.tables import use_tables
from hbxt_compress.store import Entry, Work
from hbxt_compress.trajectories import load_trajectories

__all__ = ["FACTS", "VERSION", "refine"]

VERSION = 3
FACTS = ("torch", "diffusers", "transformers")
log = logging.getLogger(__name__)


def refine(
    work: Work,
    source: Source,
    quantized: Entry,
    trajectories: Entry,
    n_held_out: int,
    how: Sequence[AnyRefiner],
    on: Machine,
) -> None:
    """Writes `<component>.safetensors` for every component with quantized weights or floats.

    Where the solver is refitted, `<component>.sampler.json` has `corrections` and `notes`. Rank 0
    does it alone.

    Raises:
        CalibrationError: no observed step of a component, or no held-out prompt.
    """
    if not work.ranks.leads:
        return
    model = QuantizedModel.load(quantized.folder)
    family, device = family_of(source), torch.device(on.device)
    observed = load_trajectories(trajectories.folder)
    sampler = family.sampler(source)
    texts: dict[int, tuple[Tensor, Tensor]] = {}
    for component in family.components(source):
        own = {n: w for n, w in model.weights.items() if n.startswith(f"{component}/")}
        if component not in family.chained:
            _pass_on(work, component, own)
            continue
        module = family.load(source, component).to(device)
        student = make_student(module, component, own).to(device)
        use_tables(student, component, own, family.weights(source, component).second_names)
        full, half = (family.chain(source, component, one) for one in (module, student))
        if component == "text_encoder":
            for i, batch in text_batches(observed, n_held_out):
                shown = batch.to(device)
                with torch.no_grad():
                    texts[i] = full.whole(*shown.full).cpu(), half.whole(*shown.half).cpu()
            _pass_on(work, component, own)
            continue
        second = component == "transformer_2"
        shown_all = transformer_batches(observed, texts, n_held_out, sampler, second=second)
        batches = [batch.to(device) for batch in shown_all]
        make = partial(_refined, work, component, full, half, batches, how, sampler)
        work.piece(f"{component}.safetensors", make)
        disk.remove(work.scratch)  # its checkpoints
    log.info("refine: done", extra={"progress": (1, 1, "refine")})


def _pass_on(work: Work, component: str, weights: Mapping[LayerName, QuantizedWeight]) -> None:
    """Keeps a component's weights as they are."""
    if weights:
        work.piece(f"{component}.safetensors", lambda path: save_block(path, weights))


def _refined(
    work: Work,
    component: str,
    full: Chain,
    half: Chain,
    batches: Sequence[Batch],
    how: Sequence[AnyRefiner],
    sampler: SamplerSpec,
    path: Path,
) -> None:
    """Writes one component, tuned by every refiner in turn; the solver is fitted to the result."""
    sides: dict[bool, list[Example]] = {True: [], False: []}
    for held_out, example in _examples(full, batches, sampler):
        sides[held_out].append(example)
    if not (sides[False] and sides[True]):
        raise CalibrationError(
            f"{component}: tuning needs observed steps of its own, prompts to learn from and held-"
            "out ones to judge by; observe steps of both experts and hold out a prompt"
        )
    solvers = tuple(SAMPLER_REFINERS.values())
    for i, refiner in enumerate(one for one in how if not isinstance(one, solvers)):
        checkpoint = _Checkpoints(work.scratch / f"{component}.{i}.checkpoint")
        before, after = refiner.tune(
            half.module,
            half.call,
            free_parameters(half.module, codes=refiner.code_rate > 0),
            sides[False],
            sides[True],
            checkpoint,
        )
        log.info("refine: %s: guided velocity error %.4g, was %.4g", component, after, before)
    for refiner in (one for one in how if isinstance(one, solvers)):
        try:
            fit = refiner.tune(half.module, half.call, sides[False], sides[True])
        except ValueError as error:
            raise CalibrationError(f"{component}: {error}") from None
        log.info("refine: %s: guided error %.4g, was %.4g", component, fit.after, fit.before)
        text = json.dumps({"corrections": fit.corrections, "notes": dict(fit.notes)}, indent=1)
        text += "\n"
        work.piece(f"{component}.sampler.json", partial(_write, text))
    save_block(path, *tuned(half.module, component))


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


@torch.no_grad()
def _examples(
    full: Chain, batches: Sequence[Batch], sampler: SamplerSpec
) -> Iterator[tuple[bool, Example]]:
    """(held out, example) of every state, its guidance branches in one example of a batch's size.

    With guidance, batches come in pairs: the branch with the prompt, then the one without.
    """
    waiting = iter(batches)
    for batch in waiting:
        guidance = sampler.guidance_at(float(batch.full[1][0]))
        branches = [batch] if guidance == 1 else [batch, next(waiting)]
        targets = [full.whole(*one.full) for one in branches]
        n = max(1, len(targets[0]) // len(branches))
        parts = [
            list(zip(*(t.split(n) for t in (*one.half, target)), strict=True))
            for one, target in zip(branches, targets, strict=True)
        ]
        for states in zip(*parts, strict=True):
            *inputs, target = (torch.cat(tensors) for tensors in zip(*states, strict=True))
            yield (
                batch.held_out,
                Example(inputs=tuple(inputs), target=target, weight=1.0, guidance=guidance),
            )


@dataclass(frozen=True, slots=True)
class _Checkpoints:
    path: Path

    def step(self, done: int, total: int, loss: float) -> None:
        log.info("refine: loss %.3g", loss, extra={"progress": (done, total, "refine")})

    def save(self, state: Mapping[str, Tensor]) -> None:
        unfinished = self.path.with_suffix(".tmp")
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, unfinished)
        disk.put(unfinished, self.path)

    def load(self) -> Mapping[str, Tensor] | None:
        return load_file(self.path) if self.path.exists() else None
