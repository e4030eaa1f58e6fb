"""Weights moved by an ulp: each of them, by one, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hbxt_compress.graph.disturb import by_an_ulp


def _graph(path: Path, weights: dict[str, np.ndarray]) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    node = helper.make_node("Identity", ["x"], ["y"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    model = helper.make_model(helper.make_graph([node], "g", [x], [y], tensors))
    onnx.save_model(
        model, str(path), save_as_external_data=True, all_tensors_to_one_file=True,
        location="model.onnx.data", size_threshold=16,
    )  # fmt: skip


def _read(path: Path) -> dict[str, np.ndarray]:
    model = onnx.load(str(path))
    return {one.name: numpy_helper.to_array(one).copy() for one in model.graph.initializer}


def test_every_float32_weight_moves_by_one_ulp_and_no_other_number_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(64, 33)).astype(np.float32),
        "half": rng.normal(size=(64,)).astype(np.float16),
        "codes": rng.integers(0, 255, 64, dtype=np.uint8),
    }
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        _graph(tmp_path / name / "model.onnx", weights)
    assert by_an_ulp(tmp_path / "a", seed=1) == 64 * 33
    by_an_ulp(tmp_path / "b", seed=1)
    moved = _read(tmp_path / "a" / "model.onnx")
    assert np.array_equal(moved["half"], weights["half"])
    assert np.array_equal(moved["codes"], weights["codes"])
    bits = moved["w"].view(np.int32).astype(np.int64) - weights["w"].view(np.int32)
    assert set(np.unique(bits)) == {-1, 1}
    assert 0.4 < (bits > 0).mean() < 0.6
    assert np.array_equal(_read(tmp_path / "b" / "model.onnx")["w"], moved["w"])
    by_an_ulp(tmp_path / "b", seed=2)
    assert not np.array_equal(_read(tmp_path / "b" / "model.onnx")["w"], moved["w"])


def test_weights_that_graphs_share_move_once(tmp_path: Path) -> None:
    weights = {"w": np.ones(64, dtype=np.float32)}
    _graph(tmp_path / "model.onnx", weights)
    (tmp_path / "other.onnx").write_bytes((tmp_path / "model.onnx").read_bytes())
    assert by_an_ulp(tmp_path, seed=0) == 64
    bits = _read(tmp_path / "other.onnx")["w"].view(np.int32) - np.float32(1).view(np.int32)
    assert set(np.unique(bits)) == {-1, 1}
