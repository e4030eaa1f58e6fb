"""A step of the transformer never holds every token by every token, nor much more than it must."""

from __future__ import annotations

from pathlib import Path

from hbxt_compress.torchvision_ops import mend_torchvision

mend_torchvision()

import onnx  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import WanTransformer3DModel  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from step_memory import largest_bytes, live_bytes, measure, weight_bytes  # noqa: E402

from hbxt_compress.graph.export import export_component  # noqa: E402
from hbxt_compress.models.wan_graph import transformer_graphs  # noqa: E402

N = 4096
SCORES = 4 * N * N  # 67 MB of one head
SLACK = 25e6  # what a process takes for threads and code, whatever the graph


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer of 4096 tokens, so narrow that all its values are less than SCORES."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, in_channels=4,
        out_channels=4, text_dim=32, freq_dim=64, ffn_dim=256, num_layers=2,
    ).eval()  # fmt: skip
    component = transformer_graphs(transformer, latent_shape=(4, 16, 32, 32), text_length=8)
    folder = tmp_path_factory.mktemp("step") / "transformer"
    export_component(folder, component, {}, precision=32)
    return folder / "model.onnx"


def test_a_step_holds_weights_and_live_values_and_no_scores(graph: Path) -> None:
    model = onnx.load(graph, load_external_data=False)
    assert 1.3 * (weight_bytes(model) + live_bytes(model)) + SLACK < SCORES
    assert largest_bytes(model) < SCORES / 8
    found = measure(graph)
    assert found.step < 1.3 * (found.weights + found.live) + SLACK


def test_scores_would_be_noticed(tmp_path: Path) -> None:
    """The same measure on attention of one head that is put together from products."""
    weight = numpy_helper.from_array(torch.randn(64, 64).numpy(), "w")
    shapes = {"x": (1, N, 64), "t": (1, 64, N), "s": (1, N, N), "p": (1, N, N), "out": (1, N, 64)}
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["x", "t"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"]),
        helper.make_node("MatMul", ["p", "x"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["out"]),
    ]
    shapes["a"] = shapes["out"]
    infos = {k: helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in shapes.items()}
    between = [infos[name] for name in ("t", "s", "p", "a")]
    made = helper.make_graph(nodes, "g", [infos["x"]], [infos["out"]], [weight], value_info=between)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "model.onnx")
    assert largest_bytes(model) == SCORES
    assert live_bytes(model) == 2 * SCORES + 4 * N * 64
    assert measure(tmp_path / "model.onnx").step > SCORES  # which the bound above is less than


def test_live_values_by_hand() -> None:
    """a: 4 kB from the start, b: 8 kB, c: b in another shape, d: 2 kB; w does not count."""
    infos = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in {"a": (1000,), "b": (2, 1000), "c": (2000,), "d": (500,)}.items()
    }
    shape = numpy_helper.from_array(torch.tensor([2000]).numpy(), "shape")
    w = numpy_helper.from_array(torch.zeros(3, 1000, dtype=torch.float16).numpy(), "w")
    nodes = [
        helper.make_node("Some", ["a", "w"], ["b"]),  # a and b: 12 kB
        helper.make_node("Reshape", ["b", "shape"], ["c"]),  # b is c, a is still read
        helper.make_node("Other", ["a", "c"], ["d"]),  # all: 14 kB
        helper.make_node("Last", ["d"], ["e"]),  # d and e
    ]
    infos["e"] = helper.make_tensor_value_info("e", TensorProto.INT64, (500,))
    graph = helper.make_graph(
        nodes, "g", [infos["a"]], [infos["e"]], [shape, w], value_info=list(infos.values())[1:4]
    )
    model = helper.make_model(graph)
    assert live_bytes(model) == 14_000
    assert largest_bytes(model) == 8_000
    assert weight_bytes(model) == 8 + 12_000  # float16 counts as the float32 it becomes
