"""Graphs against the torch models they come from, and files against each other."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from hbxt_compress.errors import ExportError
from hbxt_compress.formats import FORMATS
from hbxt_compress.graph.builder import ByRows
from hbxt_compress.graph.capture import ComponentGraphs, DummyInputs, GraphSpec, TensorSpec
from hbxt_compress.graph.export import export_component
from hbxt_compress.graph.external import ALIGNMENT, component_bytes, write_models
from hbxt_compress.graph.ops import Linear
from hbxt_compress.graph.parity import measure_parity, require_parity, run_graph
from hbxt_compress.layers import LayerName


class _Doubled(nn.Module):
    """Two linears, the second wide enough for the data file's aligned part."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Module()
        for name, shape in (("small", (128, 128)), ("wide", (2176, 128))):
            weight = nn.Parameter(torch.randn(shape, generator=generator))
            bias = nn.Parameter(torch.randn(shape[0], generator=generator))
            self.model.add_module(name, Linear(f"net/{name}", weight, bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.wide(self.model.small(x))

    def reference(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        for layer in (self.model.small, self.model.wide):
            x = x @ layer.weight.T + layer.bias
        return (x,)


@pytest.fixture
def net() -> tuple[_Doubled, ComponentGraphs]:
    module = _Doubled()
    graph = GraphSpec(
        module=module,
        inputs={"x": TensorSpec(shape=(1, 4, 128))},
        outputs=["y"],
        reference=module.reference,
    )
    return module, ComponentGraphs(
        component="net", graphs={"model.onnx": graph}, config={"b": 1, "a": "x"}
    )


def test_two_exports_give_the_same_bytes_and_no_trace_of_this_machine(net, tmp_path: Path) -> None:
    _, component = net
    for name in ("one", "two"):
        export_component(tmp_path / name, component, {}, precision=16, facts={"size": "128"})
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["config.json", "model.onnx", "model.onnx.data"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    graph = (tmp_path / "one" / "model.onnx").read_bytes()
    for trace in (b"pkg.", b".py", str(Path.cwd()).encode(), b"hbxt::"):
        assert trace not in graph
    proto = onnx.load(tmp_path / "one" / "model.onnx", load_external_data=False)
    assert {p.key: p.value for p in proto.metadata_props} == {"component": "net", "size": "128"}
    assert (tmp_path / "one" / "config.json").read_text().startswith('{\n  "a": "x"')


def test_weights_lie_in_one_file_at_the_declared_places(net, tmp_path: Path) -> None:
    module, component = net
    export_component(tmp_path, component, {}, precision=32)
    proto = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    external = {t.name: t for t in proto.graph.initializer if t.external_data}
    assert {"small.weight", "wide.weight", "wide.bias"} <= set(external)
    for tensor in external.values():
        keys = [entry.key for entry in tensor.external_data]
        assert keys == ["location", "offset", "length"]
        assert tensor.external_data[0].value == "model.onnx.data"
    data = (tmp_path / "model.onnx.data").read_bytes()
    offset, length = (int(e.value) for e in external["wide.weight"].external_data[1:])
    assert length == 4 * 2176 * 128 > 1024 * 1024
    assert offset % ALIGNMENT == 0
    stored = torch.frombuffer(bytearray(data[offset : offset + length]), dtype=torch.float32)
    assert torch.equal(stored.reshape(128, 2176).T, module.model.wide.weight)
    assert component_bytes(tmp_path) == len(data) + (tmp_path / "model.onnx").stat().st_size


def test_sixteen_bits_halve_the_file_and_only_round_the_weights(net, tmp_path: Path) -> None:
    module, component = net
    export_component(tmp_path / "32", component, {}, precision=32)
    export_component(tmp_path / "16", component, {}, precision=16)
    assert (
        measure_parity(tmp_path / "32" / "model.onnx", component.graphs["model.onnx"]).relative
        < 1e-6
    )
    sizes = [(tmp_path / name / "model.onnx.data").stat().st_size for name in ("16", "32")]
    assert 0.45 < sizes[0] / sizes[1] < 0.6
    x = DummyInputs({"x": TensorSpec(shape=(1, 4, 128))}).all()
    (got,) = run_graph(tmp_path / "16" / "model.onnx", x)
    expected = x["x"]
    for layer in (module.model.small, module.model.wide):
        expected = expected @ layer.weight.half().float().T + layer.bias
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_equal_contents_are_written_once_and_without_a_copy(tmp_path: Path) -> None:
    large, other = np.arange(1 << 21, dtype=np.float32), np.arange(300, dtype=np.float32)
    parts = ByRows(n_rows=1 << 21, n_at_once=1 << 16, part=lambda a, b: ir.Tensor(large[a:b]))
    shape = ir.Shape(large.shape)
    contents = {
        "a": ir.Tensor(large),
        "b": ir.Tensor(other),
        "c": ir.LazyTensor(parts, ir.DataType.FLOAT, shape),
        "d": ir.Tensor(other[::-1]),
        "e": ir.Tensor(np.append(large[:-1], np.float32(7.0))),
    }
    graph = ir.Graph([], [], nodes=[], name="main", opset_imports={"": 18})
    for name, content in contents.items():
        value = ir.Value(
            name=name, shape=content.shape, type=ir.TensorType(content.dtype), const_value=content
        )
        graph.register_initializer(value)
    tracemalloc.start()
    try:
        write_models(tmp_path, {"model.onnx": ir.Model(graph, ir_version=10)})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < large.nbytes // 4
    places = {
        tensor.name: tuple(entry.value for entry in tensor.external_data)
        for tensor in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
    }
    assert places["a"] == places["c"] == ("model.onnx.data", "0", str(large.nbytes))
    assert places["b"][1:] == (str(large.nbytes), "1200")
    assert places["d"][1:] == (str(large.nbytes + 1216), "1200")
    data = (tmp_path / "model.onnx.data").read_bytes()
    expected = large.tobytes() + other.tobytes() + bytes(16) + other[::-1].tobytes()
    assert data[: len(expected)] == expected
    # its start is that of "a", its last number is not
    offset, length = (int(entry) for entry in places["e"][1:])
    assert offset >= len(expected)
    assert data[offset : offset + length] == contents["e"].tobytes()
    assert len(data) == offset + length


def test_a_weight_beyond_float16_is_refused_by_name(net, tmp_path: Path) -> None:
    module, component = net
    with torch.no_grad():
        module.model.wide.weight[3, 5] = 70000.0
    with pytest.raises(ExportError, match=r"net/wide.*70000.*65504"):
        export_component(tmp_path, component, {}, precision=16)
    kept = {LayerName("net/wide"): (FORMATS["fp32"], {})}
    export_component(tmp_path, component, kept, precision=16)
    assert measure_parity(tmp_path / "model.onnx", component.graphs["model.onnx"]).relative < 1e-3


def test_a_planned_layer_that_the_graph_lacks_is_named(net, tmp_path: Path) -> None:
    module, component = net
    fmt = FORMATS["int8-channel"]
    payload = fmt.encode(module.model.small.weight.detach(), torch.full((128,), 0.05))
    with pytest.raises(ExportError, match="net/smal"):
        export_component(tmp_path, component, {LayerName("net/smal"): (fmt, payload)}, precision=16)


def test_a_graph_that_computes_something_else_fails_parity(net, tmp_path: Path) -> None:
    module, component = net
    export_component(tmp_path, component, {}, precision=32)
    require_parity(tmp_path, component, tolerance=1e-5)
    with torch.no_grad():
        module.model.small.bias += 1.0
    with pytest.raises(ExportError, match=r"model\.onnx: differs by"):
        require_parity(tmp_path, component, tolerance=1e-5)
