"""One step of a large artifact's transformer on ONNX Runtime, against torch block by block.

    python tests/bench/scale_parity.py ARTIFACT QUANTIZED --model CHECKPOINT

QUANTIZED: the folder of the result of `quantize` in the store that the artifact was made from. The
weights in it are put into one block of the source after the other, in float32, so neither side
holds the model in memory as torch would. Prints the relative difference and the peak of memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from torch import Tensor

from hbxt_compress.graph.capture import DummyInputs
from hbxt_compress.graph.parity import run_graph
from hbxt_compress.models import family_of
from hbxt_compress.quantized import QuantizedModel
from hbxt_compress.source import locate
from hbxt_compress.stages.walk import set_weights

_COMPONENT = "transformer"


@torch.no_grad()
def streamed(checkpoint: Path, quantized: Path, inputs: tuple[Tensor, ...]) -> Tensor:
    """The velocity of the quantized model, with one block in memory at a time."""
    source = locate(str(checkpoint), hashed=False)
    chain = family_of(source).streamed(source, _COMPONENT, torch.device("cpu"))
    chain.is_large = False  # in float32, as the graph computes
    rounded = QuantizedModel.open(quantized).weights
    carry = chain.head(*inputs)
    for k in range(len(chain.blocks)):
        chain.enter(k)
        prefix = f"{_COMPONENT}/blocks.{k}."
        own = {name: weight for name, weight in rounded.items() if name.startswith(prefix)}
        set_weights(chain.module, _COMPONENT, own)
        carry = chain.block(k, carry)
        chain.leave(k)
    return chain.tail(carry, *inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("quantized", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    asked = parser.parse_args()
    source = locate(str(asked.model), hashed=False)
    family = family_of(source)
    graphs = family.graphs(source, _COMPONENT, family.skeleton(source, _COMPONENT)).graphs
    (name,) = graphs
    inputs = DummyInputs(graphs[name].inputs).all()
    began = time.perf_counter()
    (got, *_) = run_graph(asked.artifact / _COMPONENT / name, inputs)
    graph_s = time.perf_counter() - began
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    expected = streamed(asked.model, asked.quantized, tuple(inputs.values()))
    difference = float((got - expected).abs().max() / expected.abs().max())
    found = {
        "relative_difference": difference,
        "inputs": {key: list(value.shape) for key, value in inputs.items()},
        "seconds_to_load_and_run": graph_s,
        "peak_rss_bytes": peak,
    }
    print(json.dumps(found, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
