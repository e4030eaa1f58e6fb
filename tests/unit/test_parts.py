"""Feed-forward layers in parts: the same numbers, one part at a time, and only where that is so."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from hbxt_compress.graph.parts import feed_forward_in_parts

S, D, F = 10, 8, 24
DRAWN = np.random.default_rng(0)
WEIGHTS = {
    "w1": DRAWN.standard_normal((D, F), dtype=np.float32),
    "b1": DRAWN.standard_normal(F, dtype=np.float32),
    "w2": DRAWN.standard_normal((F, D), dtype=np.float32),
    "b2": DRAWN.standard_normal((1, 1, D), dtype=np.float32),
}


def node(op_type: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    domain = "com.microsoft" if op_type == "FastGelu" else ""
    return helper.make_node(op_type, inputs.split(), [output], domain=domain, **attributes)


WHOLE = [
    node("Relu", "x", "start"),
    node("MatMul", "start w1", "h"),
    node("Add", "b1 h", "hb"),
    node("FastGelu", "hb", "g"),
    node("MatMul", "g w2", "m"),
    node("Add", "m b2", "y"),
    node("Mul", "y x", "out"),
]


def model(nodes: list[onnx.NodeProto], *, outputs: tuple[str, ...] = ("out",)) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, S, D))]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(
        nodes, "g", ends, infos, [numpy_helper.from_array(v, k) for k, v in WEIGHTS.items()]
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    found = {}
    every = onnx.ModelProto()
    every.CopyFrom(made)  # ONNX infers no shape behind a contrib operator: all are run for
    del every.graph.output[:]
    names = [one.output[0] for one in nodes]
    every.graph.output.extend(
        helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names
    )
    for name, value in zip(names, run(every), strict=True):
        found[name] = helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape)
    del made.graph.output[:]
    made.graph.output.extend(found[name] for name in outputs)
    made.graph.value_info.extend(v for k, v in found.items() if k not in outputs)
    return made


def run(one: onnx.ModelProto) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(one.SerializeToString(), options)
    x = np.random.default_rng(1).standard_normal((1, S, D), dtype=np.float32)
    return session.run(None, {"x": x})


def divided(one: onnx.ModelProto, **options: int) -> onnx.ModelProto:
    edited = ir.from_proto(one)
    feed_forward_in_parts(edited, **options)
    result = ir.to_proto(edited)
    onnx.checker.check_model(result)
    return result


def operators(one: onnx.ModelProto) -> Counter[str]:
    return Counter(n.op_type for n in one.graph.node)


def widest(one: onnx.ModelProto) -> int:
    """Tokens of the largest value that is F wide."""
    infos = (*one.graph.value_info, *one.graph.output)
    shapes = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in infos]
    return max(shape[1] for shape in shapes if len(shape) == 3 and shape[-1] == F)


@pytest.mark.parametrize(("least", "most", "n_parts"), [(2, 4, 4), (3, 8, 3), (5, 9, 2), (1, 9, 9)])
def test_each_part_passes_by_itself_and_the_whole_is_the_same(
    least: int, most: int, n_parts: int
) -> None:
    before = model(WHOLE)
    after = divided(before, least=least, most=most)
    found = operators(after)
    assert (found["Split"], found["Concat"], found["FastGelu"]) == (1, 1, n_parts)
    assert (found["MatMul"], found["Add"]) == (2 * n_parts, 2 * n_parts)
    assert (found["Relu"], found["Mul"]) == (1, 1)
    assert widest(before) == S
    assert widest(after) == -(-S // n_parts)
    np.testing.assert_allclose(run(after)[0], run(before)[0], rtol=1e-5, atol=1e-5)


def test_few_tokens_stay_together() -> None:
    before = model(WHOLE)
    for options in ({}, {"least": 6}, {"least": 1, "most": 1}):
        assert divided(before, **options) == divided(before, least=S)
        assert operators(divided(before, **options)) == operators(before)


def changed(at: int, *nodes: onnx.NodeProto) -> list[onnx.NodeProto]:
    whole = copy.deepcopy(WHOLE)
    whole[at : at + 1] = nodes
    return whole


@pytest.mark.parametrize(
    "nodes",
    [
        changed(3, node("Relu", "hb", "g")),
        changed(3, node("FastGelu", "hb", "e"), node("Mul", "e hb", "g")),
        changed(2, node("Add", "b1 h", "a"), node("Softmax", "a", "hb", axis=1)),
        changed(4, node("Softmax", "g", "s", axis=1), node("MatMul", "s w2", "m")),
        [node("Relu", "x", "start"), node("FastGelu", "start", "out")],
    ],
    ids=["no gelu", "gated", "over tokens before", "over tokens behind", "no products"],
)
def test_what_is_otherwise_stays_whole(nodes: list[onnx.NodeProto]) -> None:
    before = model(nodes)
    after = divided(before, least=2)
    assert operators(after) == operators(before)
    np.testing.assert_array_equal(run(after)[0], run(before)[0])


@pytest.mark.parametrize("seen", ["h", "hb", "g", "m"])
def test_what_somebody_else_looks_at_is_still_there(seen: str) -> None:
    before = model(WHOLE, outputs=("out", seen))
    after = divided(before, least=2)
    for got, expected in zip(run(after), run(before), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "half"),
    [("fp16", True), ("int4-g128", False), ("int4-g128", True), ("int8-channel", False)],
)
def test_a_transformer_in_parts_computes_what_the_whole_does(
    name: str, half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hbxt_compress.torchvision_ops import mend_torchvision

    mend_torchvision()
    import torch
    from diffusers import WanTransformer3DModel

    from hbxt_compress.algorithms.scales import search_scales
    from hbxt_compress.formats import FORMATS
    from hbxt_compress.graph import passes
    from hbxt_compress.graph.capture import DummyInputs
    from hbxt_compress.graph.export import export_component
    from hbxt_compress.graph.parity import run_graph
    from hbxt_compress.layers import LayerName
    from hbxt_compress.models.wan_graph import transformer_graphs

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, in_channels=4,
        out_channels=4, text_dim=32, freq_dim=64, ffn_dim=256, num_layers=1,
    ).eval()  # fmt: skip
    weights = {}
    for path, layer in transformer.named_modules():
        if name != "fp16" and ".ffn." in path and isinstance(layer, torch.nn.Linear):
            weight = layer.weight.detach()
            if name == "int4-g128":
                grid = search_scales(weight, FORMATS[name])
                levels = grid.levels(weight)
                payload = FORMATS[name].store(levels, grid.scales_OG, grid.zeros_OG)
            else:
                payload = FORMATS[name].encode(weight, weight.abs().amax(1) / 127)
            weights[LayerName(f"transformer/{path}")] = (FORMATS[name], payload)
    component = transformer_graphs(transformer, latent_shape=(4, 5, 16, 16), text_length=8)
    for folder, least in (("whole", 1000), ("parts", 100)):
        monkeypatch.setattr(
            passes,
            "feed_forward_in_parts",
            lambda graph, least=least: feed_forward_in_parts(graph, least=least),
        )
        export_component(tmp_path / folder, component, weights, precision=16, half=half)
    inputs = DummyInputs(component.graphs["model.onnx"].inputs, 3).all()
    (whole,) = run_graph(tmp_path / "whole" / "model.onnx", inputs)
    (parts,) = run_graph(tmp_path / "parts" / "model.onnx", inputs)
    assert (parts - whole).norm() <= 1e-5 * whole.norm()
    found = {
        folder: operators(onnx.load(tmp_path / folder / "model.onnx", load_external_data=False))
        for folder in ("whole", "parts")
    }
    n_more = 0 if name == "int8-channel" else 2  # 320 tokens: three parts
    assert found["parts"]["FastGelu"] - found["whole"]["FastGelu"] == n_more
    sizes = [(tmp_path / f / "model.onnx.data").stat().st_size for f in ("whole", "parts")]
    assert sizes[0] == sizes[1]
