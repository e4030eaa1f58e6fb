"""Convolutions over frames that are exported over pixels, against torch's Conv3d."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from hbxt_compress.errors import ExportError
from hbxt_compress.formats import FORMATS
from hbxt_compress.graph.capture import ComponentGraphs, DummyInputs, GraphSpec, TensorSpec
from hbxt_compress.graph.check import check_targets
from hbxt_compress.graph.export import export_component
from hbxt_compress.graph.ops import convolve_frames
from hbxt_compress.graph.parity import measure_parity, run_graph
from hbxt_compress.layers import LayerName

_CHANNELS, _SIZE = 5, (6, 7)
_KERNELS = ((3, 3, 3), (3, 1, 1), (1, 3, 3), (1, 1, 1), (2, 3, 1))


class _Net(nn.Module):
    def __init__(
        self, kernel: tuple[int, ...], n_frames: int, *, bias: bool = True, first: bool = False
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shape = (4, _CHANNELS, *kernel)
        self.model = nn.Module()
        self.model.conv = nn.Module()
        self.model.conv.weight = nn.Parameter(0.1 * torch.randn(shape, generator=generator))
        self.model.conv.bias = nn.Parameter(torch.randn(4, generator=generator)) if bias else None
        self.padding = ((kernel[1] - 1) // 2, (kernel[2] - 1) // 2)
        self.n_before, self.n_frames, self.first = kernel[0] - 1, n_frames, first

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        conv = self.model.conv
        return convolve_frames(x, conv.weight, conv.bias, padding=self.padding, before=before)

    def with_weight(self, weight: Tensor, x: Tensor, before: Tensor | None = None) -> Tensor:
        if before is None:
            before = x.new_zeros(self.n_before, *x.shape[1:])
        out = nn.functional.conv3d(
            torch.cat([before, x]).transpose(0, 1)[None],
            weight,
            self.model.conv.bias,
            padding=(0, *self.padding),
        )
        return out[0].transpose(0, 1)

    def graphs(self) -> ComponentGraphs:
        n_channels = self.model.conv.weight.shape[1]
        inputs = {"x": TensorSpec(shape=(self.n_frames, n_channels, *_SIZE))}
        if self.n_before and not self.first:
            inputs["before"] = TensorSpec(shape=(self.n_before, n_channels, *_SIZE))
        spec = GraphSpec(
            module=self,
            inputs=inputs,
            outputs=["y"],
            reference=lambda *frames: (self.with_weight(self.model.conv.weight, *frames),),
        )
        return ComponentGraphs(component="net", graphs={"model.onnx": spec})


@pytest.mark.parametrize("kernel", _KERNELS, ids=str)
@pytest.mark.parametrize("n_frames", [1, 2, 4])
def test_it_is_a_convolution_over_pixels_that_equals_torch(
    kernel: tuple[int, ...], n_frames: int, tmp_path: Path
) -> None:
    net = _Net(kernel, n_frames, bias=n_frames != 2)
    export_component(tmp_path, net.graphs(), {}, precision=32)
    nodes = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node
    assert {len(node.input) for node in nodes if node.op_type == "Conv"} == {3}  # each has a bias
    assert measure_parity(tmp_path / "model.onnx", net.graphs().graphs["model.onnx"]).max_abs < 1e-5
    graph = onnx.load(tmp_path / "model.onnx").graph
    stored = {t.name: list(t.dims) for t in graph.initializer if t.name.endswith(".weight")}
    names = ["conv"] if kernel[0] == 1 else [f"conv.{i}" for i in range(kernel[0])]
    assert stored == {f"{name}.weight": [4, _CHANNELS, *kernel[1:]] for name in names}
    judged = {one.target: one.runtimes for one in check_targets(tmp_path, ("gfx1151", "gfx1201"))}
    for found in (judged["gfx1151"]["hip"], judged["gfx1201"]["directml"]):
        assert {node.verdict for node in found.nodes if node.op == "Conv"} == {"runs"}


def test_the_first_frame_of_a_clip_needs_one_convolution(tmp_path: Path) -> None:
    net = _Net((3, 3, 3), 1, first=True)
    export_component(tmp_path, net.graphs(), {}, precision=32)
    assert measure_parity(tmp_path / "model.onnx", net.graphs().graphs["model.onnx"]).max_abs < 1e-5
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [node.op_type for node in graph.node] == ["Conv"]
    assert [t.name for t in graph.initializer] == ["conv.2.weight", "conv.bias"]


def test_several_frames_without_those_before_are_refused() -> None:
    x, weight = torch.zeros(2, _CHANNELS, *_SIZE), torch.zeros(4, _CHANNELS, 3, 3, 3)
    with pytest.raises(ValueError, match="2 frames need the 2 before them"):
        convolve_frames(x, weight, None, padding=(1, 1))


def test_no_weight_of_it_is_mistaken_for_another_in_eight_or_sixteen_bit(tmp_path: Path) -> None:
    net, fmt = _Net((3, 3, 3), 4), FORMATS["int8-channel"]
    weight = net.model.conv.weight.data
    payload = fmt.encode(weight, weight.flatten(1).abs().amax(1) / 127)
    rounded = {"eight": fmt.decode(payload).reshape(weight.shape), "sixteen": weight.half().float()}
    planned = {"eight": {LayerName("net/conv"): (fmt, payload)}, "sixteen": {}}
    inputs = DummyInputs(net.graphs().graphs["model.onnx"].inputs, 1).all()
    for name, expected in rounded.items():
        export_component(tmp_path / name, net.graphs(), planned[name], precision=16)
        (got,) = run_graph(tmp_path / name / "model.onnx", inputs)
        assert (got - net.with_weight(expected, *inputs.values())).abs().max() < 1e-5
        assert (got - net.with_weight(weight, *inputs.values())).abs().max() > 1e-4


def test_a_weight_of_one_number_a_row_keeps_its_scales(tmp_path: Path) -> None:
    """Codes and scales are equally many then; only the codes are dealt out."""
    net, fmt = _Net((1, 1, 1), 2), FORMATS["int8-channel"]
    weight = net.model.conv.weight.data = net.model.conv.weight.data[:, :1]
    payload = fmt.encode(weight, weight.flatten(1).abs().amax(1) / 127)
    planned = {LayerName("net/conv"): (fmt, payload)}
    export_component(tmp_path, net.graphs(), planned, precision=32)
    inputs = DummyInputs(net.graphs().graphs["model.onnx"].inputs).all()
    (got,) = run_graph(tmp_path / "model.onnx", inputs)
    expected = net.with_weight(fmt.decode(payload).reshape(weight.shape), *inputs.values())
    assert (got - expected).abs().max() < 1e-5


def test_a_weight_beyond_float16_is_refused_by_its_name(tmp_path: Path) -> None:
    net = _Net((3, 3, 3), 4)
    net.model.conv.weight.data[1, 2, 0, 1, 1] = 1e5
    with pytest.raises(ExportError, match=r"net/conv: cannot be stored as fp16"):
        export_component(tmp_path, net.graphs(), {}, precision=16)


def test_a_weight_of_several_frames_is_read_once(tmp_path: Path) -> None:
    net = _Net((3, 3, 3), 4)
    net.model.conv.weight = nn.Parameter(torch.randn(64, 8, 3, 3, 3))
    net.model.conv.bias = None
    asked: Counter[str] = Counter()

    def read(name: str) -> Tensor:
        asked[name] += 1
        return net.get_parameter(f"model.{name}").detach()

    with pytest.MonkeyPatch.context() as patch:  # so that this is a large weight
        patch.setattr("hbxt_compress.graph.capture._SMALL", 1 << 12)
        export_component(tmp_path, net.graphs(), {}, precision=32, read=read)
    assert asked["conv.weight"] == 1
