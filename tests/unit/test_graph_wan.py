"""The Wan family's graphs on micro models with random weights, against diffusers in torch."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from hbxt_compress.torchvision_ops import mend_torchvision

mend_torchvision()

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import WanTransformer3DModel  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import UMT5Config, UMT5EncoderModel  # noqa: E402

from hbxt_compress.errors import ExportError  # noqa: E402
from hbxt_compress.formats import FORMATS, WeightFormat  # noqa: E402
from hbxt_compress.formats.int4 import Int4  # noqa: E402
from hbxt_compress.graph.capture import ComponentGraphs, DummyInputs  # noqa: E402
from hbxt_compress.graph.export import export_component  # noqa: E402
from hbxt_compress.graph.parity import require_parity, run_graph  # noqa: E402
from hbxt_compress.layers import LayerName  # noqa: E402
from hbxt_compress.models.wan_graph import text_encoder_graphs, transformer_graphs  # noqa: E402
from hbxt_compress.models.wan_vae_graph import vae_decoder_graphs  # noqa: E402
from tests.small_vaes import bucket_of, small_vae, uneven  # noqa: E402

_LATENT = (4, 3, 8, 8)
_TEXT = 16


@pytest.fixture(scope="module")
def transformer() -> WanTransformer3DModel:
    torch.manual_seed(0)
    module = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, in_channels=4,
        out_channels=4, text_dim=32, freq_dim=64, ffn_dim=256, num_layers=2,
    )  # fmt: skip
    return uneven(module)


@pytest.fixture(scope="module")
def encoder() -> UMT5EncoderModel:
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=200, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return uneven(UMT5EncoderModel(config))


@pytest.fixture(scope="module")
def denoiser(transformer, tmp_path_factory) -> tuple[Path, ComponentGraphs]:
    folder = tmp_path_factory.mktemp("transformer")
    component = transformer_graphs(transformer, latent_shape=_LATENT, text_length=_TEXT)
    export_component(folder, component, {}, precision=32)
    return folder, component


def _operators(file: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(file, load_external_data=False).graph.node)


def test_the_transformer_equals_torch_and_per_token_timesteps(denoiser, transformer) -> None:
    folder, component = denoiser
    require_parity(folder, component, tolerance=1e-5)
    inputs = DummyInputs(component.graphs["model.onnx"].inputs, 3).all()
    for timestep in (0.0, 437.5, 999.0):
        inputs["timestep"] = torch.tensor([timestep])
        (got,) = run_graph(folder / "model.onnx", inputs)
        n_tokens = 3 * 4 * 4
        with torch.no_grad():
            per_token = transformer(
                inputs["hidden_states"],
                inputs["timestep"][:, None].expand(1, n_tokens),
                inputs["encoder_hidden_states"],
                return_dict=False,
            )[0]
        assert got.shape == (1, *_LATENT)
        assert (got - per_token).abs().max() <= 1e-4


def test_the_transformer_is_made_of_the_intended_nodes(denoiser) -> None:
    folder, _ = denoiser
    operators = _operators(folder / "model.onnx")
    assert operators["MultiHeadAttention"] == 4
    assert operators["MatMul"] == 2 * 10 + 7
    assert operators["FastGelu"] == 3
    assert operators["LayerNormalization"] == 2 * 3 + 1
    assert not {"Softmax", "Erf", "Tanh", "ScatterND", "Conv", "Cast", "Expand"} & set(operators)
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    names = {t.name for t in proto.graph.initializer}
    assert {"blocks.1.attn1.to_q.weight", "patch_embedding.weight", "rope.cos"} <= names
    assert proto.ir_version == 10
    assert {(o.domain, o.version) for o in proto.opset_import} == {("", 18), ("com.microsoft", 1)}


def test_onnx_runtime_computes_each_norm_of_the_transformer_in_one_pass(
    denoiser, tmp_path: Path
) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(denoiser[0] / "model.onnx", options)
    operators = _operators(tmp_path / "optimized.onnx")
    assert operators["SimplifiedLayerNormalization"] == 2 * 4  # of queries and keys
    assert operators["LayerNormalization"] + operators["SkipLayerNormalization"] == 2 * 3 + 1
    assert not {"ReduceMean", "Pow", "Sqrt", "Div"} & set(operators)


@pytest.mark.parametrize("name", ["int4-g128", "int8-channel"])
def test_a_quantized_transformer_equals_torch_with_decoded_weights(
    name: str, transformer, tmp_path: Path
) -> None:
    fmt = FORMATS[name]
    rounded = copy.deepcopy(transformer)
    weights = _round_blocks(rounded, fmt, "transformer")
    assert len(weights) == 20
    component = transformer_graphs(transformer, latent_shape=_LATENT, text_length=_TEXT)
    export_component(tmp_path, component, weights, precision=32)
    inputs = DummyInputs(component.graphs["model.onnx"].inputs, 4).all()
    (got,) = run_graph(tmp_path / "model.onnx", inputs)
    with torch.no_grad():
        expected = rounded(*inputs.values(), return_dict=False)[0]
        unrounded = transformer(*inputs.values(), return_dict=False)[0]
    assert (got - expected).norm() <= 2e-5 * expected.norm()
    assert (unrounded - expected).norm() > 2e-4 * expected.norm()
    operators = _operators(tmp_path / "model.onnx")
    kind = "MatMulNBits" if name.startswith("int4") else "DequantizeLinear"
    assert operators[kind] == 20


def _round_blocks(
    module: nn.Module, fmt: WeightFormat, component: str
) -> Mapping[LayerName, tuple[WeightFormat, Mapping[str, Tensor]]]:
    """Rounds every linear of the blocks in place; their payloads by layer."""
    weights = {}
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and path.startswith("blocks."):
            weight = layer.weight.data
            if isinstance(fmt, Int4):
                scales = weight.unflatten(1, (-1, fmt.group)).abs().amax(2) / -8
            else:
                scales = weight.abs().amax(1) / 127
            payload = fmt.encode(weight, scales.half())
            layer.weight.data = fmt.decode(payload)
            weights[LayerName(f"{component}/{path}")] = (fmt, payload)
    return weights


def test_the_exported_module_is_left_as_it_was(transformer) -> None:
    before = {name: type(module).__name__ for name, module in transformer.named_modules()}
    component = transformer_graphs(transformer, latent_shape=_LATENT, text_length=_TEXT)
    assert before == {name: type(m).__name__ for name, m in transformer.named_modules()}
    copied = dict(component.graphs["model.onnx"].module.model.named_parameters())
    assert all(copied[name] is parameter for name, parameter in transformer.named_parameters())


def test_an_image_to_video_transformer_is_refused() -> None:
    module = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=8, ffn_dim=8, num_layers=1, image_dim=16, added_kv_proj_dim=32,
    )  # fmt: skip
    with pytest.raises(ExportError, match="image-to-video"):
        transformer_graphs(module, latent_shape=_LATENT, text_length=_TEXT)


def test_the_text_encoder_equals_torch_under_padding(encoder, tmp_path: Path) -> None:
    component = text_encoder_graphs(encoder, text_length=_TEXT)
    for precision in (32, 16):
        export_component(tmp_path / str(precision), component, {}, precision=precision)
    inputs = DummyInputs(component.graphs["model.onnx"].inputs, 5).all()
    for n_tokens in (1, 9, _TEXT):
        inputs["attention_mask"] = (torch.arange(_TEXT) < n_tokens).long()[None]
        (got,) = run_graph(tmp_path / "32" / "model.onnx", inputs)
        (half,) = run_graph(tmp_path / "16" / "model.onnx", inputs)
        with torch.no_grad():
            expected = encoder(**inputs)[0]
        assert (got - expected).abs().max() <= 1e-4
        assert 0 < (half - expected).abs().max() <= 2e-2
    operators = _operators(tmp_path / "32" / "model.onnx")
    assert operators["MultiHeadAttention"] == 2
    assert not {"Softmax", "Log", "Where", "Range"} & set(operators)


def test_a_large_table_stays_in_sixteen_bit_behind_its_gather(encoder, tmp_path: Path) -> None:
    component = text_encoder_graphs(encoder, text_length=_TEXT)
    export_component(tmp_path, component, {}, precision=16)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    (gather,) = [n for n in graph.node if n.op_type == "Gather" and n.input[0] == "shared.weight"]
    table = next(t for t in graph.initializer if t.name == "shared.weight")
    assert table.data_type == onnx.TensorProto.FLOAT16
    assert [n.op_type for n in graph.node if gather.output[0] in n.input] == ["Cast"]


def test_both_vae_steps_share_one_copy_of_the_weights(tmp_path: Path) -> None:
    vae = small_vae(residual=True)
    component = vae_decoder_graphs(vae, bucket_of(vae))
    export_component(tmp_path, component, {}, precision=16)
    places = []
    for name in ("model_first.onnx", "model.onnx"):
        graph = onnx.load(tmp_path / name, load_external_data=False).graph
        places.append(
            {
                t.name: [e.value for e in t.external_data]
                for t in graph.initializer
                if t.external_data and t.name.endswith(".weight")
            }
        )
    shared = set(places[0]) & set(places[1])
    assert len(shared) > 10
    assert all(places[0][name] == places[1][name] for name in shared)
    n_weights = sum(
        p.numel() for p in (*vae.decoder.parameters(), *vae.post_quant_conv.parameters())
    )
    assert (tmp_path / "model.onnx.data").stat().st_size < 2.2 * n_weights
    # Zero caches are made by one node each, not stored.
    assert _operators(tmp_path / "model_first.onnx")["Expand"] >= 2
