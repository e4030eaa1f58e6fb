"""ONNX Runtime's MatMulNBitsQuantizer on the exported graph, made float16 by its own converter.

GPTQ runs the float32 graph (float16 is slow on CPUs) and the result is converted. It is called
below the MatMulNBitsQuantizer class, which forgets nodes_to_exclude for this algorithm and then
stops at the patch embedding, whose 48 inputs are no multiple of the block. It runs the whole graph
for every sample and every input of a layer, so it gets as many samples as it takes by default, 128,
evenly spread over ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import host
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from onnxruntime.quantization.neural_compressor import gptq_quantize
from onnxruntime.transformers.float16 import convert_float_to_float16
from safetensors.numpy import load_file

_BLOCKS = "blocks."
_N_SAMPLES = 128


def _block_quantizer(case: host.Case, algorithm: Any, block: int, **options: Any) -> host.Outcome:
    model = convert_float_to_float16(onnx.load(case.graph), keep_io_types=True)
    # k_quant takes its block from the quantizer, the others from their own configuration
    sized = {} if algorithm is nbits.KQuantWeightOnlyQuantConfig else {"block_size": block}
    quantizer = nbits.MatMulNBitsQuantizer(
        model,
        block_size=block,
        nodes_to_exclude=[name for name in _matmuls(model) if _BLOCKS not in name],
        algo_config=algorithm(**sized, **options),
    )
    with case.clock:
        quantizer.process()
    return _outcome(quantizer.model.model, block_size=block, **options)


def _gptq(case: host.Case, block: int, scheme: str, **options: Any) -> host.Outcome:
    model = onnx.load(case.graph)
    found = load_file(case.inputs / "calibration.safetensors")
    names = ("hidden_states", "timestep", "encoder_hidden_states")
    rows = zip(found["latents"], found["timestep"], found["text"], strict=True)
    samples = [
        ({name: one[None] for name, one in zip(names, row, strict=True)}, None) for row in rows
    ]
    samples = [samples[i] for i in np.linspace(0, len(samples) - 1, _N_SAMPLES).round().astype(int)]
    asked = {"bits": 4, "group_size": block, "scheme": scheme}
    config = {name: asked if _BLOCKS in name else "fp32" for name in _matmuls(model)}
    with case.clock:
        done = gptq_quantize(model, samples, weight_config=config, n_samples=-1, **options)
    half = convert_float_to_float16(done.model, keep_io_types=True)
    return _outcome(half, block_size=block, scheme=scheme, **options)


def _matmuls(model: onnx.ModelProto) -> list[str]:
    return [node.name for node in model.graph.node if node.op_type == "MatMul"]


def _outcome(model: onnx.ModelProto, **settings: Any) -> host.Outcome:
    weights, stored = {}, {}
    for name, kind, size, weight in _decoded(model):
        weights[name] = weight
        stored[kind] = stored.get(kind, 0) + size
    return host.Outcome(weights, stored, settings)


def _decoded(model: onnx.ModelProto) -> Iterator[tuple[str, str, int, np.ndarray]]:
    """Name, kind, bytes and weight (out, in) of every tensor; the runtime itself decodes."""
    tensors = {one.name: one for one in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        held = [numpy_helper.to_array(tensors[name]) for name in node.input[1:] if name in tensors]
        weight = _multiply_by_identity(node, held)
        name = node.input[1].split(".weight")[0]
        for kind, array in zip(("codes", "scales", "zero_points"), held, strict=False):
            yield name, kind, array.nbytes, weight


def _multiply_by_identity(node: onnx.NodeProto, held: list[np.ndarray]) -> np.ndarray:
    sizes = {a.name: a.i for a in node.attribute if a.name in ("K", "N", "bits", "block_size")}
    held = [a.astype(np.float32) if a.dtype == np.float16 else a for a in held]
    names = [f"t{i}" for i in range(len(held))]
    alone = helper.make_node("MatMulNBits", ["x", *names], ["y"], domain="com.microsoft", **sizes)
    eye = np.eye(sizes["K"], dtype=np.float32)
    graph = helper.make_graph(
        [alone],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, eye.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [sizes["K"], sizes["N"]])],
        [numpy_helper.from_array(a, name) for a, name in zip(held, names, strict=True)],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": eye})[0].T


_DEFAULT = nbits.DefaultWeightOnlyQuantConfig
METHODS = {
    "DEFAULT g128": partial(_block_quantizer, algorithm=_DEFAULT, block=128),
    "DEFAULT g64": partial(_block_quantizer, algorithm=_DEFAULT, block=64),
    "DEFAULT symmetric g128": partial(
        _block_quantizer, algorithm=_DEFAULT, block=128, is_symmetric=True
    ),
    "DEFAULT symmetric g64": partial(
        _block_quantizer, algorithm=_DEFAULT, block=64, is_symmetric=True
    ),
    "k_quant g128": partial(
        _block_quantizer, algorithm=nbits.KQuantWeightOnlyQuantConfig, block=128
    ),
    "k_quant g64": partial(_block_quantizer, algorithm=nbits.KQuantWeightOnlyQuantConfig, block=64),
    "HQQ g128": partial(_block_quantizer, algorithm=nbits.HQQWeightOnlyQuantConfig, block=128),
    "GPTQ g128": partial(_gptq, block=128, scheme="asym"),
    "GPTQ mse g64": partial(_gptq, block=64, scheme="asym", mse=True),
}

if __name__ == "__main__":
    host.run("onnxruntime", METHODS)
