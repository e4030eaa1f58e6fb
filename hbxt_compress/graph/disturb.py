"""Disturb: a model that differs from another by rounding alone, to see what that does to clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

__all__ = ["by_an_ulp"]


def by_an_ulp(folder: Path, seed: int) -> int:
    """Moves every float32 weight of the graphs in a folder by one ulp, up or down at random.

    Weights that graphs share in a file are moved once. Returns how many numbers were moved.
    """
    rng, moved, n = np.random.default_rng(seed), set[tuple[Path, int]](), 0
    for path in sorted(folder.rglob("*.onnx")):
        model = onnx.load(str(path), load_external_data=False)
        for tensor in model.graph.initializer:
            kept = tensor.data_location == onnx.TensorProto.EXTERNAL
            if tensor.data_type != onnx.TensorProto.FLOAT or not kept:
                continue
            where = {entry.key: entry.value for entry in tensor.external_data}
            place = path.parent / where["location"], int(where.get("offset", 0))
            if place in moved:
                continue
            moved.add(place)
            count = int(np.prod(tensor.dims, dtype=np.int64))
            values = np.memmap(place[0], np.float32, "r+", offset=place[1], shape=(count,))
            values[:] = np.nextafter(
                values, rng.choice([-np.inf, np.inf], count).astype(np.float32)
            )
            values.flush()
            n += count
    return n
