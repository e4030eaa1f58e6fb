"""This project's recipes in the bench: their artifacts, judged as the runtime opens them.

The bench compares the transformer's blocks, so the text encoder stays as it is: its rules are taken
out of each recipe. What a recipe stores is counted against the artifact that quantizes nothing:
everything its transformer holds more or less than that one's belongs to the blocks' weights.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import torch
import yaml
from torch import Tensor

from hbxt_compress.library import find
from hbxt_compress.machine import Machine
from hbxt_compress.pipeline import compress
from hbxt_compress.recipe import load_recipe
from hbxt_compress.runtime.session import open_session
from hbxt_compress.source import BUILTIN
from hbxt_compress.store import Store

__all__ = ["OWN", "graph_velocity", "make"]

# not w4a16-budget: its bytes are of the whole artifact, too few if the text encoder keeps 16 bit
OWN = ("w4a16-fast", "w4a16", "w8a16", "w8a8", "w8a8-static")
_TEXT_ENCODER = ("text_encoder/encoder", "text_encoder/shared")
_NIBBLES = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
_DTYPE = onnx.helper.tensor_dtype_to_np_dtype


def make(recipe: str, out: Path, n_weights: int) -> dict[str, object]:
    """Makes the artifact `own/<recipe>/artifact` in a process of its own; the row it begins.

    Raises:
        RuntimeError: the process failed.
    """
    document = yaml.safe_load(find("recipes", recipe).read_text(encoding="utf-8"))
    document["rules"] = [r for r in document["rules"] if not r["match"].startswith(_TEXT_ENCODER)]
    folder = out / "own" / recipe
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / f"{recipe}.yaml"
    written.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    shutil.rmtree(folder / "store", ignore_errors=True)  # so that the time is that of the work
    began = time.perf_counter()
    where = ("--store", str(folder / "store"), "--out", str(folder / "artifact"))
    command = [sys.executable, "-m", "hbxt_compress", "quantize", str(written), *where]
    with (folder / "log.txt").open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError((folder / "log.txt").read_text()[-400:])
    seconds = time.perf_counter() - began
    baseline = compress(load_recipe("fp16"), BUILTIN, Store(out / "store"), machine=Machine())
    more = _stored(folder / "artifact") - _stored(baseline)
    return {
        "tool": "hbxt_compress",
        "version": _version(folder / "artifact"),
        "method": recipe,
        "settings": {"recipe": document, "seconds": "calibration and export included"},
        "bits_per_weight": 16 + 8 * more / n_weights,
        "seconds": seconds,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
    }


def graph_velocity(artifact: Path, calls: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The velocities N C T H W of an artifact's transformer, run with the options it asks for."""
    config = json.loads((artifact / "manifest.json").read_text())["session"]
    session = open_session(artifact / "transformer/model.onnx", "cpu", config=config)
    names = ("hidden_states", "timestep", "encoder_hidden_states")
    found = []
    for call in zip(*calls, strict=True):
        inputs = {name: one[None].numpy() for name, one in zip(names, call, strict=True)}
        found.append(session.run(inputs)["out_hidden_states"])
    return torch.from_numpy(np.concatenate(found))


def _stored(artifact: Path) -> int:
    """Bytes of every initializer of the transformer's graph."""
    model = onnx.load(artifact / "transformer/model.onnx", load_external_data=False)
    return sum(_bytes(one) for one in model.graph.initializer)


def _bytes(tensor: onnx.TensorProto) -> int:
    bits = 4 if tensor.data_type in _NIBBLES else 8 * _DTYPE(tensor.data_type).itemsize
    return -(-int(np.prod(tensor.dims)) * bits // 8)


def _version(artifact: Path) -> str:
    made_with = json.loads((artifact / "manifest.json").read_text())["made_with"]
    return str(made_with["hbxt-compress"])
