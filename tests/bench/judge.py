"""How far a set of weights is from full precision: velocities on held-out states, and whole clips.

Every tool is judged by the same code, from nothing but its effective weights: they are put into the
torch module for the velocities, and into a copy of the model folder that the project exports as it
stands (recipe fp32) for the clips.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calibration_inputs import velocity
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hbxt_compress.artifact import Artifact
from hbxt_compress.clips import ClipSet
from hbxt_compress.machine import Machine
from hbxt_compress.metrics import METRICS, Metric, PairMetric, SetMetric, Unavailable, WeightFiles
from hbxt_compress.metrics.statistics import bootstrap_interval
from hbxt_compress.models import family_of
from hbxt_compress.pipeline import compress
from hbxt_compress.recipe import load_recipe
from hbxt_compress.source import BUILTIN, locate
from hbxt_compress.stages.sample import sample
from hbxt_compress.store import Store
from hbxt_compress.suite import load_suite

__all__ = ["ClipJudge", "VelocityJudge", "artifact", "linears"]

_CLIP_METRICS = {"psnr_db": "psnr", "lpips": "lpips_squeeze", "frechet": "fd_content"}
# A few clips go another way than in full precision: 32 of them could not rank the best methods.
_SUITE, _N_CLIPS, _N_STEPS = "reference", 64, 25


def linears(model: str = BUILTIN) -> dict[str, Tensor]:
    """The weights that are compared, float32 (out, in) by name: every Linear of the blocks."""
    source = locate(model, hashed=False)
    transformer = family_of(source).load(source, "transformer")
    return {
        name: module.weight
        for name, module in transformer.named_modules()
        if name.startswith("blocks.") and isinstance(module, nn.Linear)
    }


def artifact(store: Path, model: str, machine: Machine) -> Path:
    """The fp32 artifact of a model folder; found in the store if it was made before."""
    return compress(load_recipe("fp32"), model, Store(store), machine=machine)


class VelocityJudge:
    """Velocity SQNR on the held-out states."""

    def __init__(self, held_out: Path, model: str = BUILTIN) -> None:
        source = locate(model, hashed=False)
        self.transformer = family_of(source).load(source, "transformer")
        found = load_file(held_out)
        self.calls = found["latents"], found["timestep"], found["text"]
        self.v, self.guidance = found["v"], float(found["guidance"])

    def judge(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """The SQNR of the torch module with these weights."""
        before: dict[str, Tensor] = {}
        for name, weight in weights.items():
            own = self.transformer.get_submodule(name).get_parameter("weight")
            before[name], own.data = own.data, weight
        try:
            return self.compare(velocity(self.transformer, *self.calls))
        finally:
            for name, weight in before.items():
                self.transformer.get_submodule(name).get_parameter("weight").data = weight

    def compare(self, v: Tensor) -> dict[str, float]:
        """The SQNR over both guidance branches, and of the velocity they are combined to."""
        return {
            "velocity_sqnr_db": _sqnr_db(self.v, v),
            "guided_velocity_sqnr_db": _sqnr_db(self._guided(self.v), self._guided(v)),
        }

    def _guided(self, v: Tensor) -> Tensor:
        cond, uncond = v[0::2], v[1::2]
        return uncond + self.guidance * (cond - uncond)


def _sqnr_db(wanted: Tensor, got: Tensor) -> float:
    """10 log10 of the energy of `wanted` over that of the difference, summed in float64."""
    error = (got.double() - wanted.double()).square().sum()
    return float(10 * torch.log10(wanted.double().square().sum() / error))


class ClipJudge:
    """Clips of 64 prompts that nobody tuned on against those of the full-precision model."""

    def __init__(self, folder: Path, machine: Machine, model: str = BUILTIN) -> None:
        self.folder, self.store, self.machine = folder, Store(folder / "store"), machine
        self.model = model
        self.suite = load_suite(_SUITE)
        self.metrics: dict[str, Metric | None] = {}
        for key, name in _CLIP_METRICS.items():
            try:
                self.metrics[key] = METRICS[name].load(WeightFiles.from_environment())
            except Unavailable:  # no network for LPIPS here: the column stays empty
                self.metrics[key] = None
        self.reference = self._clips(artifact(folder / "store", model, machine))

    def judge_weights(self, name: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """As `judge`, for the model with these weights."""
        return self.judge(artifact(self.folder / "store", self._copy(name, weights), self.machine))

    def judge(self, artifact: Path) -> dict[str, Any]:
        """Mean PSNR and LPIPS over the clips, and the Frechet distance between both sets.

        The means also with their 95 % interval over clips, under `<name>_interval`.
        """
        clips = self._clips(artifact)
        values: dict[str, Any] = {}
        for key, metric in self.metrics.items():
            if metric is None:
                values[key] = None
            elif isinstance(metric, PairMetric):
                pairs = zip(self.reference.clips, clips.clips, strict=True)
                each = [metric.compare(*pair) for pair in pairs]
                values[key] = float(np.mean(each))
                values[f"{key}_interval"] = bootstrap_interval(each, seed=0)
            elif isinstance(metric, SetMetric):
                values[key] = metric.measure(self.reference.clips, clips.clips)
        return values

    def _clips(self, artifact: Path) -> ClipSet:
        entry = self.store.result(
            sample,
            artifact=Artifact.open(artifact),
            items=self.suite.items()[:_N_CLIPS],
            n_steps=_N_STEPS,
            on=self.machine,
        )
        return ClipSet.load(entry.folder)

    def _copy(self, name: str, weights: Mapping[str, Tensor]) -> str:
        """The model's folder with these weights in the transformer, all of it in float32."""
        source, copy = locate(self.model, hashed=False).folder, self.folder / "models" / name
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(source, copy)
        path = next((copy / "transformer").glob("*.safetensors"))
        state = {key: one.float() for key, one in load_file(path).items()}
        for layer, weight in weights.items():
            state[f"{layer}.weight"] = weight.contiguous()
        save_file(state, path)
        return str(copy)
