"""What is foretold of ONNX Runtime's memory, against a process that runs the graph."""

from __future__ import annotations

import sys
from pathlib import Path

import fit
import numpy as np
import onnx_ir as ir
import pytest
from hollow_checkpoints import hollow_checkpoint
from onnx_ir import DataType

from hbxt_compress.fit.cpu import BASE_BYTES, on_cpu
from hbxt_compress.graph.external import write_models
from hbxt_compress.models import family_of
from hbxt_compress.source import locate

_TOKENS, _WIDTH, _HIDDEN = 1024, 1024, 8192


def _value(name: str, *shape: int, dtype: DataType = DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _mlp(stored: DataType, *, biased: bool = True) -> ir.Model:
    """Two wide products with an activation between; weights of 33 MB each in float32."""
    x, y = _value("x", 1, _TOKENS, _WIDTH), _value("y", 1, _TOKENS, _WIDTH)
    h, a, g = (_value(name, 1, _TOKENS, _HIDDEN) for name in ("h", "a", "g"))
    nodes, weights = [], []
    for name, shape in (("up", (_WIDTH, _HIDDEN)), ("down", (_HIDDEN, _WIDTH))):
        weight = _value(name, *shape, dtype=stored)
        weight.const_value = ir.LazyTensor(lambda: pytest.fail("read"), stored, ir.Shape(shape))
        wide = weight
        if stored != DataType.FLOAT:
            wide = _value(f"{name}.float", *shape)
            nodes.append(ir.node("Cast", [weight], {"to": int(DataType.FLOAT)}, outputs=[wide]))
        weights.append((weight, wide))
    bias = _value("bias", _HIDDEN)
    bias.const_value = ir.tensor(np.ones(_HIDDEN, np.float32), name="bias")
    nodes += [
        ir.node("MatMul", [x, weights[0][1]], outputs=[h]),
        *([ir.node("Add", [h, bias], outputs=[a])] if biased else []),
        ir.node("FastGelu", [a if biased else h], domain="com.microsoft", outputs=[g]),
        ir.node("MatMul", [g, weights[1][1]], outputs=[y]),
    ]
    kept = [*(one for one, _ in weights), *([bias] if biased else [])]
    graph = ir.Graph(
        [x], [y], nodes=nodes, initializers=kept, name="mlp",
        opset_imports={"": 18, "com.microsoft": 1},
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's own count in /proc")
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("stored", [DataType.FLOAT, DataType.FLOAT16])
def test_memory_is_as_foretold(stored: DataType, biased: bool, tmp_path: Path) -> None:
    model = _mlp(stored, biased=biased)
    foretold = on_cpu(model)
    weights = 2 * 4 * _WIDTH * _HIDDEN  # float16 is cast when it is opened
    assert foretold.weight_bytes == weights + 4 * _HIDDEN * biased
    most = 2 * 4 * _TOKENS * _HIDDEN  # into and out of FastGelu
    assert most <= foretold.value_bytes <= most + 3 * 4 * _TOKENS * _WIDTH
    fit.hollow(model)
    write_models(tmp_path, {"model.onnx": model})
    measured = fit.peak_of(tmp_path / "model.onnx")
    assert BASE_BYTES + foretold.n_bytes == pytest.approx(measured, rel=0.1)


def test_random_contents_differ_by_name_and_fit_their_type() -> None:
    model = _mlp(DataType.FLOAT16)
    fit.hollow(model)
    up, down = (model.graph.initializers[name].const_value for name in ("up", "down"))
    assert up is not None
    assert down is not None
    one, other = up.numpy(), down.numpy()
    assert one.shape == (_WIDTH, _HIDDEN)
    assert one.dtype == np.float16
    assert np.isfinite(one).all()
    assert not np.array_equal(one.flatten()[:100], other.flatten()[:100])


def test_hollow_folders_read_as_published_ones(tmp_path: Path) -> None:
    folder = hollow_checkpoint(tmp_path, transformer="5B", text_encoder="umt5-xxl", vae="wan2.2")
    source = locate(str(folder), hashed=False)
    family = family_of(source)
    assert family.parameters(source)["transformer"] == 4_999_787_712
    assert str(family.geometry(source)) == "704x1280x121"
    assert family.tokens(source, family.geometry(source)) == 27_280
    assert family.text_length(source) == 512
    assert sum(512 * path.stat().st_blocks for path in folder.rglob("*.safetensors")) < 1_000_000
    small = hollow_checkpoint(tmp_path, transformer="1.3B", vae="wan2.1")
    assert str(family.geometry(locate(str(small), hashed=False))) == "480x832x81"
