"""Parity: how far a graph on disk is from the torch model it came from, on random inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from hbxt_compress.errors import ExportError, listing
from hbxt_compress.graph.capture import ComponentGraphs, DummyInputs, GraphSpec

__all__ = ["SESSION_OPTIONS", "Parity", "measure_parity", "require_parity", "run_graph"]

# ONNX Runtime turns DequantizeLinear + MatMul into an 8-bit kernel whose default rounds activations
# to 8 bit; level 1 computes in float32.
SESSION_OPTIONS: Mapping[str, str] = {"session.qdq_matmulnbits_accuracy_level": "1"}

_QUIET = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """Largest absolute difference over the outputs, and the largest absolute expected value."""

    max_abs: float
    largest: float

    @property
    def relative(self) -> float:
        """The difference in units of the largest value, or of 1 where that is smaller."""
        return self.max_abs / max(1.0, self.largest)


def run_graph(file: Path, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """All outputs of a graph on ONNX Runtime's CPU provider, in order."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    for key, value in SESSION_OPTIONS.items():
        options.add_session_config_entry(key, value)
    # heeded only where integer products would saturate, as in runtime/session.py
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    return [torch.from_numpy(output) for output in session.run(None, feeds)]


@torch.no_grad()
def measure_parity(file: Path, spec: GraphSpec, *, seed: int = 0) -> Parity:
    """The difference between a graph and its spec's reference on random inputs."""
    inputs = DummyInputs(spec.inputs, seed).all()
    expected = spec.reference(*inputs.values())
    # A reference may give the first outputs only.
    got = run_graph(file, inputs)[: len(expected)]
    pairs = list(zip(got, expected, strict=True))
    return Parity(
        max_abs=max(float((g - e).abs().max()) for g, e in pairs),
        largest=max(float(e.abs().max()) for e in expected),
    )


def require_parity(folder: Path, component: ComponentGraphs, *, tolerance: float) -> None:
    """Raises ExportError if a graph differs by more than the tolerance, or is not a number."""
    problems = []
    for name, spec in component.graphs.items():
        parity = measure_parity(folder / name, spec)
        if not parity.relative <= tolerance:
            problems.append(
                f"{name}: differs by {parity.max_abs:.3g} where values reach {parity.largest:.3g} "
                f"(relative {parity.relative:.3g}, allowed {tolerance:g})"
            )
    if problems:
        raise ExportError(
            f"{component.component}: the graphs do not compute what the model does\n"
            + listing(problems)
            + "\nExport at full precision to see whether the format or the graph is at fault."
        )
