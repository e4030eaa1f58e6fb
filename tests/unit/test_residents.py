"""What a clip takes in memory: the heaviest of the graphs, not all of them together."""

from __future__ import annotations

import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from hbxt_compress.runtime import Runtime, generate
from tests.fake_artifact import SAMPLER, make_artifact, rewrite_manifest

PROMPT = "a red circle moving left"
WIDTH, DEPTH = 512, 48
MB = 4 * WIDTH * WIDTH * DEPTH / 1e6  # 50 of one graph, in matrices that the C library would keep
GRAPHS = (
    "text_encoder/model.onnx",
    "transformer/model.onnx",
    "transformer_2/model.onnx",
    "vae_decoder/model_first.onnx",
    "vae_decoder/model.onnx",
)
# Prints the peak of the process in MB, after a clip or with nothing but one graph.
_PEAK = """
import sys
from dataclasses import replace
from pathlib import Path
from hbxt_compress.runtime.generate import Runtime
folder, what, prompt = sys.argv[1:]
options = {"provider": "cpu", "n_threads": 1, "verify": False, "keep": what == "all"}
with Runtime.open(Path(folder), **options) as runtime:
    if what == "one":
        runtime.encode(prompt)
    else:
        *_, _ = runtime.stream(prompt)
status = Path("/proc/self/status").read_text()
print(int(status.split("VmHWM:")[1].split()[0]) / 1e3)
"""


def weigh(file: Path) -> None:
    """Adds to a graph's output what DEPTH matrices make of a row of zeros.

    They are zeros but for one number, so that they take no room on the disk: ONNX Runtime keeps
    equal matrices once.
    """
    model = onnx.load(file, load_external_data=False)
    data = file.with_name("model.onnx.data")
    given, out = model.graph.input[0], model.graph.output[0].name
    (last,) = (node for node in model.graph.node if out in node.output)
    last.output[0] = "light"
    row = helper.make_tensor("row", TensorProto.FLOAT, (1, WIDTH), np.zeros(WIDTH, np.float32))
    model.graph.initializer.append(row)
    nodes = [
        helper.make_node("Cast", [given.name], ["as_float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["as_float"], ["number"], keepdims=0),
        helper.make_node("Mul", ["row", "number"], ["h0"]),
    ]
    for i in range(DEPTH):
        start, size = data.stat().st_size, 4 * WIDTH * WIDTH
        with data.open("r+b") as content:
            content.truncate(start + size)
            content.seek(start)
            content.write(np.float32(i + 1).tobytes())
        extent = {"location": data.name, "offset": start, "length": size}
        tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=(WIDTH, WIDTH))
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in extent.items():
            tensor.external_data.add(key=key, value=str(value))
        model.graph.initializer.append(tensor)
        nodes.append(helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"]))
    nodes.append(helper.make_node("ReduceMean", [f"h{DEPTH}"], ["nothing"], keepdims=0))
    nodes.append(helper.make_node("Add", ["light", "nothing"], [out]))
    model.graph.node.extend(nodes)
    file.write_bytes(model.SerializeToString())


def peak(folder: Path, what: str) -> float:
    """MB of a process that opens what it needs for a "clip", or "one" graph, or keeps "all"."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(folder), what, PROMPT],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout)


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of two experts whose five graphs weigh 50 MB each."""

    folder = make_artifact(
        tmp_path_factory.mktemp("residents") / "heavy",
        sampler=replace(SAMPLER, boundary=0.875),
    )
    for graph in GRAPHS:
        weigh(folder / graph)
    rewrite_manifest(folder, session={})
    return folder


def test_the_peak_of_a_clip_is_that_of_one_graph(heavy: Path) -> None:
    alone = peak(heavy, "one")
    assert peak(heavy, "clip") < alone + 0.4 * MB
    assert peak(heavy, "all") > alone + 3.5 * MB  # so it is the weights that are measured


def test_a_graph_is_freed_though_its_session_is_still_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, graphs, n_given_back = [], [], []
    real = generate.open_session

    def holding(*arguments: object, **options: object) -> object:
        held.append(real(*arguments, **options))
        graphs.append(weakref.ref(held[-1]._inner))
        return held[-1]

    monkeypatch.setattr(generate, "open_session", holding)
    monkeypatch.setattr(generate, "give_back", lambda: n_given_back.append(len(graphs)))
    folder = make_artifact(tmp_path / "artifact")
    with Runtime.open(folder, provider="cpu", n_threads=1) as runtime:
        n_open = [sum(one() is not None for one in graphs) for _ in runtime.stream(PROMPT)]
        assert n_open == [1] * 9
    assert [one() for one in graphs] == [None] * 4
    assert n_given_back == [1, 2, 3, 4]
