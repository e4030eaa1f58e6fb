"""Blocks that are traced once and repeated: the bytes of a whole trace, or a whole trace."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from hbxt_compress.torchvision_ops import mend_torchvision

mend_torchvision()

import numpy as np  # noqa: E402
import onnx_ir as ir  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import UMT5Config, UMT5EncoderModel  # noqa: E402

from hbxt_compress.formats import FORMATS, WeightFormat  # noqa: E402
from hbxt_compress.formats.activations import ACTIVATIONS  # noqa: E402
from hbxt_compress.graph.alike import BlocksDiffer  # noqa: E402
from hbxt_compress.graph.capture import ComponentGraphs, GraphSpec, TensorSpec, capture  # noqa: E402
from hbxt_compress.graph.export import export_component  # noqa: E402
from hbxt_compress.graph.ops import Linear  # noqa: E402
from hbxt_compress.graph.repeat import Blocks, n_traced  # noqa: E402
from hbxt_compress.graph.unread import Unread  # noqa: E402
from hbxt_compress.layers import LayerName  # noqa: E402
from hbxt_compress.models import family_of  # noqa: E402
from hbxt_compress.models.wan_graph import text_encoder_graphs  # noqa: E402
from hbxt_compress.source import BUILTIN, locate  # noqa: E402

_WHOLE = "all blocks are traced"


@pytest.fixture(autouse=True)
def _told(caplog) -> None:
    caplog.set_level(logging.INFO, logger="hbxt_compress.graph.capture")


def _whole(graphs: ComponentGraphs) -> ComponentGraphs:
    specs = {n: dataclasses.replace(one, blocks=None) for n, one in graphs.graphs.items()}
    return dataclasses.replace(graphs, graphs=specs)


def _require_same_files(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == ["config.json", "model.onnx", "model.onnx.data"]
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.timeout(240)  # ten seconds of one core, which it may have to share
def test_the_reference_transformer_is_repeated_to_the_bytes_of_a_whole_trace(
    tmp_path: Path, caplog
) -> None:
    source = locate(BUILTIN)
    family = family_of(source)
    stored = family.weights(source, "transformer")
    planned: dict[LayerName, tuple[WeightFormat, Mapping[str, Tensor]]] = {}
    activations: dict[LayerName, str] = {}
    for layer in family.layers(source):
        if layer.component != "transformer" or layer.block is None or layer.kind != "linear":
            continue
        weight_OI = stored.tensor(f"{layer.name.split('/', 1)[1]}.weight").float()
        # a value that lowering adds lends its name to a constant: it must be counted alike
        if layer.block % 2:
            fmt = FORMATS["int4-g128"]
            planned[layer.name] = (
                fmt,
                fmt.encode(weight_OI, weight_OI.unflatten(1, (-1, 128)).abs().amax(2) / 7),
            )
            continue
        activations[layer.name] = "int8-tensor"
        codes = FORMATS["int8-channel"].encode(weight_OI, weight_OI.abs().amax(1) / 127)
        more = ACTIVATIONS["int8-tensor"].payload(torch.ones(weight_OI.shape[1]))
        scale_I = torch.full((weight_OI.shape[1],), 0.5, dtype=torch.float16)
        planned[layer.name] = FORMATS["int8-channel"], {**codes, **more, "input_scale": scale_I}
    assert {name.split(".")[1] for name in planned} == {"0", "1", "2", "3", "4", "5"}
    graphs = family.graphs(source, "transformer", family.skeleton(source, "transformer"))
    for name, component in (("repeated", graphs), ("whole", _whole(graphs))):
        export_component(
            tmp_path / name, component, planned,
            precision=16, activations=activations, read=stored.tensor,
        )  # fmt: skip
    assert _WHOLE not in caplog.text
    _require_same_files(tmp_path / "repeated", tmp_path / "whole")


@pytest.mark.parametrize(("text_length", "repeated"), [(96, True), (16, False)])
def test_a_text_encoder_is_repeated_where_no_table_is_folded(
    text_length: int, repeated: bool, tmp_path: Path, caplog
) -> None:
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=50, d_model=64, d_kv=16, d_ff=64, num_layers=6, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    graphs = text_encoder_graphs(UMT5EncoderModel(config).eval(), text_length=text_length)
    export_component(tmp_path / "repeated", graphs, {}, precision=16)
    assert (_WHOLE not in caplog.text) is repeated
    assert repeated or "the optimizer looked at" in caplog.text
    export_component(tmp_path / "whole", _whole(graphs), {}, precision=16)
    _require_same_files(tmp_path / "repeated", tmp_path / "whole")


class _Block(nn.Module):
    def __init__(self, index: int, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(index)
        weight = torch.randn(width, width, generator=generator) / width**0.5
        self.linear = Linear(f"net/steps.{index}.linear", nn.Parameter(weight), None)
        self.register_buffer("shift", torch.ones(width))
        self.factor, self.gate = 2.0, nn.Parameter(torch.ones(width))
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        # the first node uses nothing of the block's, the ramp is a large constant of each block
        h = self.linear(torch.sin(x) * self.gate) * self.factor + self.shift
        return x + h * torch.arange(x.shape[-1], dtype=torch.float32)


class _Chain(nn.Module):
    def __init__(self, n_blocks: int, width: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.steps = nn.ModuleList(_Block(i, width) for i in range(n_blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.model.steps:
            x = block(x)
        return x * 3.0


class _Skipping(_Chain):
    def forward(self, x: Tensor) -> Tensor:
        before = x
        for block in self.model.steps:
            x, before = block(x) + before, x
        return x


class _Collecting(_Chain):
    def forward(self, x: Tensor) -> Tensor:
        total = x
        for block in self.model.steps:
            x = block(x)
            total = total * x
        return total + x


def _graph(module: nn.Module, width: int) -> GraphSpec:
    return GraphSpec(
        module=module,
        inputs={"x": TensorSpec(shape=(1, 4, width))},
        outputs=["y"],
        reference=lambda x: (x,),
        blocks="steps",
    )


def _described(model: ir.Model) -> list[object]:
    constants = [(v.name, v.const_value.tobytes()) for v in model.graph.initializers.values()]
    nodes = [
        (
            node.op_type,
            [value and value.name for value in node.inputs],
            [(value.name, str(value.shape)) for value in node.outputs],
            {name: str(attribute.value) for name, attribute in node.attributes.items()},
        )
        for node in model.graph
    ]
    return [constants, nodes]


def test_a_repeated_graph_is_the_whole_one_by_name_order_and_content(caplog) -> None:
    spec = _graph(_Chain(6, 1100), 1100)
    repeated = capture(spec)
    assert _WHOLE not in caplog.text
    assert list(spec.module.model.steps._modules) == ["0", "1", "2", "3", "4", "5"]
    whole = capture(dataclasses.replace(spec, blocks=None))
    assert sum(node.op_type == "Linear" for node in whole.graph) == 6
    assert _described(repeated) == _described(whole)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("setting", "blocks 1 and 3: they are set otherwise"),
        ("buffer", "blocks 1 and 4 have other buffers"),
        ("shape", "blocks 1 and 2 have parameters of other shapes"),
        ("module", "blocks 1 and 3 are made of other modules"),
    ],
)
def test_blocks_that_differ_are_noticed_before_anything_is_traced(change: str, reason: str) -> None:
    chain = _Chain(6, 8)
    blocks = chain.model.steps
    if change == "setting":
        blocks[3].factor = 2.5
    elif change == "buffer":
        blocks[4].shift[5] = 0.0
    elif change == "shape":
        blocks[2].gate = nn.Parameter(torch.ones(1))
    elif change == "module":
        blocks[3].more = nn.Identity()
    with pytest.raises(BlocksDiffer, match=reason):
        Blocks(chain, "model.steps")


def test_few_blocks_are_not_cut() -> None:
    assert [n_traced(n) for n in (0, 1, 4, 5, 30)] == [0, 1, 4, 3, 3]


class _LastIsOther(_Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cos(x) if self.index == 5 else x)


class _ByItsGate(_Block):
    """A gate of one number: what is in it decides how the optimizer simplifies the block."""

    def __init__(self, index: int, width: int) -> None:
        super().__init__(index, width)
        self.gate = nn.Parameter(torch.tensor(1.0 if index == 3 else 0.5))


@pytest.mark.parametrize(
    ("chain", "block", "reason"),
    [
        (_Skipping, _Block, "nodes of a block"),
        (_Collecting, _Block, "differ"),
        (_Chain, _LastIsOther, "differ"),
        (_Chain, _ByItsGate, "the optimizer looked at .*gate"),
    ],
)
def test_what_only_a_trace_shows_is_traced_whole(
    chain: type[_Chain], block: type[_Block], reason: str, caplog
) -> None:
    module = chain(6, 8)
    module.model.steps = nn.ModuleList(block(i, 8) for i in range(6))
    spec = _graph(module, 8)
    model = capture(spec)
    assert re.search(f"{_WHOLE}: .*{reason}", caplog.text)
    assert _described(model) == _described(capture(dataclasses.replace(spec, blocks=None)))


def test_stand_ins_tell_who_compared_them_and_what_was_made_of_them() -> None:
    unread = Unread()
    like = [
        ir.LazyTensor(lambda: ir.Tensor(np.ones(3, "f4")), ir.DataType.FLOAT, ir.Shape([3]), name=n)
        for n in ("read", "compared", "made", "other")
    ]
    read, compared, made, other = (unread.tensor(one) for one in like)
    assert read.numpy().shape == (3,)
    assert read.tobytes() != other.tobytes()
    graph = ir.Graph([], [], nodes=[], name="g")

    def add(name: str, content: ir.TensorProtocol) -> None:
        graph.register_initializer(ir.Value(name=name, const_value=content))

    add("read", read)
    assert unread.used(graph) == []
    assert not (compared.numpy() == 1.0).any()
    assert unread.used(graph) == ["compared"]
    add("folded", ir.Tensor(made.numpy().reshape(3, 1).copy()))
    assert unread.used(graph) == ["compared", "folded"]
    other.numpy().item(0)
    assert unread.used(graph) == ["compared", "folded", "other"]
