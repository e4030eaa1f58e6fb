"""Prediction: seconds, memory and disk of a whole run, and whether this machine has as much."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hbxt_compress.costs.counting import count
from hbxt_compress.costs.distilling import distilling_costs, lightening_costs
from hbxt_compress.costs.probing import probe_cost
from hbxt_compress.costs.ranging import ranges_cost
from hbxt_compress.costs.shown import Forwards, ShownModel, whole
from hbxt_compress.costs.stages import (
    REFERENCE_CALLS,
    StageCost,
    compiling_s,
    export_cost,
    noise_cost,
    publish_cost,
    quantize_cost,
    read_cost,
    refine_cost,
    trajectory_cost,
)
from hbxt_compress.costs.work import Rates, Work
from hbxt_compress.errors import PlanError, listing
from hbxt_compress.graph.repeat import n_traced
from hbxt_compress.models import Family, family_of
from hbxt_compress.plan import Choice, Plan, open_choices
from hbxt_compress.prompts import PromptSet, load_prompts
from hbxt_compress.recipe import Recipe
from hbxt_compress.source import Source

__all__ = [
    "Prediction",
    "StagePrediction",
    "free_bytes",
    "free_memory",
    "is_small",
    "predict",
    "require_room",
    "stage_costs",
]

_SMALL_BYTES = 500_000_000  # of a model's files: it fits wherever Python and torch do
_SMALL_SHARE = 20  # of memory and disk that such a model may take
_SMALL_NUMBERS = 1 << 28  # of what calibration shows it, between two blocks of 1024 features
_FEATURES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePrediction:
    """seconds: None if the machine's rates are unknown. disk_bytes: that stay when it is done."""

    stage: str
    seconds: float | None
    peak_rss_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a run will take, stage by stage in its order.

    most_disk_bytes: what lies on the disk at most while it runs. machine: whose rates these are.
    """

    stages: tuple[StagePrediction, ...]
    most_disk_bytes: int
    machine: str | None = None

    @property
    def seconds(self) -> float | None:
        """In all; None if the machine's rates are unknown."""
        known = [one.seconds for one in self.stages if one.seconds is not None]
        return sum(known) if len(known) == len(self.stages) else None

    @property
    def peak_rss_bytes(self) -> int:
        return max((one.peak_rss_bytes for one in self.stages), default=0)

    @property
    def disk_bytes(self) -> int:
        """That the store, and the copy in --out, hold in the end."""
        return sum(one.disk_bytes for one in self.stages)

    def to_json(self) -> dict[str, object]:
        """Plain JSON values: the totals, the machine and the stages."""
        return {
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "disk_bytes": self.disk_bytes,
            "most_disk_bytes": self.most_disk_bytes,
            "machine": self.machine,
            "stages": [asdict(one) for one in self.stages],
        }


def predict(costs: Sequence[StageCost], rates: Rates | None, done: Collection[str]) -> Prediction:
    """The prediction for costs in the order of their stages, but for those that are done."""
    stages, kept, most, compiled = [], 0.0, 0.0, set[tuple[object, ...]]()
    n_compiled = 0
    for cost in (one for one in costs if one.stage not in done):
        seconds = None
        if rates is not None:
            new = cost.searches - compiled
            before = compiling_s(n_compiled, cached=rates.is_compiled)
            n_compiled += len(new)
            compiled |= new
            extra = compiling_s(n_compiled, cached=rates.is_compiled) - before
            work = cost.work + Work.of(call=extra * REFERENCE_CALLS)
            seconds = work.seconds(rates)
        most = max(most, kept + cost.kept_bytes + cost.scratch_bytes)
        kept += cost.kept_bytes
        stages.append(
            StagePrediction(
                stage=cost.stage,
                seconds=seconds,
                peak_rss_bytes=int(cost.peak_bytes),
                disk_bytes=int(cost.kept_bytes),
            )
        )
    return Prediction(
        stages=tuple(stages),
        most_disk_bytes=int(most),
        machine=None if rates is None else rates.machine,
    )


def stage_costs(
    recipe: Recipe, plan: Plan, source: Source, prompts: PromptSet | None, *, copied: bool,
    known_bytes: float = 0.0,
) -> list[StageCost]:  # fmt: skip
    """What each stage of a recipe takes with a model; nothing but file headers is read.

    plan: with what calibration shows, if anything is calibrated; prompts: the same. copied: there
    is an --out. known_bytes: of files that need not be hashed again.
    """
    family = family_of(source)
    family.tokens(source, family.geometry(source))  # a size that it cannot take is refused
    costs = [read_cost(source, os.cpu_count() or 1, known_bytes)]
    costs += distilling_costs(family, source, recipe.distill)
    costs += lightening_costs(family, source, recipe.decoder)
    model = None
    learnt = (0, 0)
    if prompts is not None and plan.shown is not None:
        model = ShownModel(family, source, prompts, plan.shown)
        n, held_out = plan.shown.n, plan.shown.n_held_out
        learnt = min(prompts.statistics or n, n - held_out), held_out
        if plan.shown.clips:
            vae = family.weights(source, "vae")
            parameters = sum(math.prod(vae.shape(one)) for one in vae.names)
            costs.append(noise_cost(model, n, plan.shown.n_states, parameters))
        else:
            costs.append(trajectory_cost(model, n, plan.shown.n_states))
        if recipe.budget is not None:
            choices: Sequence[Choice] = open_choices(recipe, family.layers(source))
            costs.append(probe_cost(model, choices, n))
    if plan.quantized:
        costs.append(quantize_cost(recipe, plan, model, learnt, family, source))
        if plan.refine and model is not None:
            n_learnt = plan.shown.n - learnt[1] if plan.shown is not None else 0
            own = (n_learnt, learnt[1])
            costs.append(refine_cost(plan, model, own, costs[-1].kept_bytes))
    for component in sorted(plan.half & family.doubtful):
        n = (
            len(load_prompts(recipe.calibration).prompts)
            if prompts is None
            else len(prompts.prompts)
        )
        costs.append(ranges_cost(family, source, component, n))
    costs.append(export_cost(plan, family, source, *_graph_calls(source)))
    if copied:
        costs.append(publish_cost(costs[-1].kept_bytes))
    return costs


def is_small(plan: Plan, source: Source) -> bool:
    """Whether a run is so small beside memory and disk that nothing needs to be counted."""
    size = sum(size for size, _ in source.stamps.values())
    shown = plan.shown
    numbers = 0 if shown is None else 2 * shown.n * shown.n_states * shown.n_tokens * _FEATURES
    room = free_memory()
    return (
        size < _SMALL_BYTES
        and numbers < _SMALL_NUMBERS
        and (room is None or room > _SMALL_SHARE * size + 1.5e9)
    )


def require_room(
    told: Prediction, store: Path, out: Path | None, artifact_bytes: int, *, name: str
) -> None:
    """Raises PlanError, with the numbers, if memory or a disk has less than a run needs."""
    problems = []
    memory = free_memory()
    if memory is not None and told.peak_rss_bytes > memory:
        worst = max(told.stages, key=lambda one: one.peak_rss_bytes)
        problems.append(
            f"memory: {_gb(told.peak_rss_bytes)} at the peak of {worst.stage}, {_gb(memory)} are "
            "available: end other programs, or calibrate on fewer or smaller clips"
        )
    needs = {store: told.most_disk_bytes}
    if out is not None:
        if _device(out) == _device(store):
            needs[store] = max(needs[store], told.disk_bytes)
        else:
            needs = {store: told.most_disk_bytes - artifact_bytes, out: artifact_bytes}
    for path, n_bytes in needs.items():
        if n_bytes > (free := free_bytes(path)):
            option = "--out" if path == out else "--store"
            problems.append(
                f"disk: {_gb(n_bytes)} for {path}, {_gb(free)} are free: make room, or name "
                f"another disk with {option}"
            )
    if problems:
        raise PlanError(
            f"recipe {name} needs more than this machine has:\n{listing(problems)}\n"
            "`hbxt plan --predict` tells it by stage; --force goes on all the same"
        )


def free_memory() -> int | None:
    """Bytes that programs could have now; None where the system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def free_bytes(path: Path) -> int:
    """Free bytes of the disk where a path lies or will lie."""
    return shutil.disk_usage(_there(path)).free


def _graph_calls(source: Source) -> tuple[dict[str, int], dict[str, int]]:
    """Operations of each component's graphs, and how many of them are traced.

    A decoder has a graph for the first frame, one more.
    """
    family, found, traced = family_of(source), dict[str, int](), dict[str, int]()
    latent = family.latent_shape(source)
    forwards, depths = Forwards(family, source, latent), dict[str, set[int]]()
    for spec in family.layers(source):
        if spec.block is not None:
            depths.setdefault(spec.component, set()).add(spec.block)
    for component in family.components(source):
        if component in family.chained:
            passes, n_blocks = forwards.passes(component), len(depths[component])
            for n, calls in ((n_blocks, found), (n_traced(n_blocks), traced)):
                calls[component] = sum(one.n_calls * times for one, times in whole(passes, n))
            continue
        module = family.skeleton(source, component).to("meta")
        latents = torch.zeros(1, latent[0], 2, *latent[2:], device="meta")
        found[component] = traced[component] = _decoded_calls(family, source, module, latents)
    return found, traced


def _decoded_calls(family: Family, source: Source, module: nn.Module, latents: Tensor) -> int:
    return count(lambda: family.decode(source, module, latents))[1].n_calls


def _there(path: Path) -> Path:
    return next(one for one in (path, *path.absolute().parents) if one.exists())


def _device(path: Path) -> int:
    return _there(path).stat().st_dev


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB"
