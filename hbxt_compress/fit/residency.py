"""Residency: what of a compressed model is in memory when, and whether a target has room for it.

A clip is made in stages: the text encoder, the transformer (its two guidance passes run one after
the other and share memory; a second expert is a stage of its own), the VAE decoder's first frame
and its later ones. One graph is open at a time, or all of them stay. A compiled graph keeps the
memory of its values as long as it is open, so those that stay count in full.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, Literal

import onnx_ir as ir

from hbxt_compress.fit.cards import CPU, Room
from hbxt_compress.fit.constants import kept_on_gpu, stored_bytes
from hbxt_compress.fit.cpu import on_cpu
from hbxt_compress.fit.liveness import liveness
from hbxt_compress.fit.roofline import Amounts, amounts, scores_bytes
from hbxt_compress.graph.table import default_runtime, table

__all__ = ["Loading", "Residency", "Stage", "fuses_attention", "measure_stage", "measure_stages"]

Loading = Literal["all kept", "one after the other"]
_SWITCH: Final = "MIGRAPHX_MLIR_USE_SPECIFIC_OPS"
_SCORES_TWICE: Final = 2  # the scores and their softmax


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One graph on a target. stored_bytes: of weights in its file.

    weight_bytes: of weights as the runtime keeps them. value_bytes: of what is alive while it runs,
    the worst at the node `at`, of which working_bytes are what that node needs inside. done: what
    one run does, for an estimate of time.
    """

    component: str
    file: str
    stored_bytes: int
    weight_bytes: int
    value_bytes: int
    working_bytes: int
    at: str
    done: tuple[Amounts, ...] = ()

    @property
    def n_bytes(self) -> int:
        return self.weight_bytes + self.value_bytes

    @property
    def name(self) -> str:
        return f"{self.component}, first frame" if "first" in self.file else self.component


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency:
    """A model on a target. base_bytes: of the process, whatever it runs (0 on a card)."""

    stages: tuple[Stage, ...]
    loading: Loading
    base_bytes: int = 0

    def peak(self, stage: Stage) -> int:
        """Bytes in use while a stage runs."""
        if self.loading == "all kept":
            return self.base_bytes + sum(one.n_bytes for one in self.stages)
        return self.base_bytes + stage.n_bytes

    @property
    def peak_bytes(self) -> int:
        return max(self.peak(stage) for stage in self.stages)

    @property
    def worst(self) -> Stage:
        """The stage that takes most by itself."""
        return max(self.stages, key=lambda one: one.n_bytes)

    def fits(self, room: Room) -> bool:
        return self.peak_bytes <= room.usable_bytes


def fuses_attention(target: str) -> bool:
    """Whether attention's scores stay out of memory on a card, as the runtime sets it up there."""
    told = table(default_runtime(target))
    switched = set(told.environment(target).get(_SWITCH, "").split(","))
    return not any(
        rule.when.unless.get(_SWITCH, "") not in switched
        and any(fnmatchcase(target, one) for one in rule.when.gpus)
        for rule in told.rules
        if _SWITCH in rule.when.unless
    )


def measure_stage(
    component: str, file: str, model: ir.Model, target: str, *, fused: bool | None = None
) -> Stage:
    """What a graph takes on a target. fused: attention; None: as the runtime has it there."""
    if target == CPU:
        found = on_cpu(model)
        return Stage(
            component=component,
            file=file,
            stored_bytes=stored_bytes(model),
            weight_bytes=found.weight_bytes,
            value_bytes=found.n_bytes - found.weight_bytes,
            working_bytes=found.working_bytes,
            at=found.at,
        )
    fused = fuses_attention(target) if fused is None else fused
    kept = kept_on_gpu(model)

    def inside(node: ir.Node) -> int:
        scores = node.op_type == "MultiHeadAttention" and not fused
        return _SCORES_TWICE * scores_bytes(node) if scores else 0

    alive = liveness(model, constants=kept.constants, working=inside)
    return Stage(
        component=component,
        file=file,
        stored_bytes=stored_bytes(model),
        weight_bytes=kept.n_bytes,
        value_bytes=alive.peak_bytes,
        working_bytes=alive.working_bytes,
        at=alive.at,
        done=amounts(model, kept.constants, kept.sizes, fused=fused),
    )


def measure_stages(
    component: str, graphs: Mapping[str, ir.Model], target: str
) -> tuple[Stage, ...]:
    """A stage for each graph of a component, in the order they run."""
    files = sorted(graphs, key=lambda name: "first" not in name)
    return tuple(measure_stage(component, file, graphs[file], target) for file in files)
