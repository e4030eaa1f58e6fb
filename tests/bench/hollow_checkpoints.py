"""Model folders whose weights are holes: exact configs and file headers, no bytes on the disk.

What only reads headers, as `hbxt plan --target` does, cannot tell them from published ones.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

from checkpoints import Checkpoint, write_configs

__all__ = ["hollow_checkpoint"]

_BYTES = 2  # of a bfloat16


def hollow_checkpoint(
    folder: Path, *, transformer: str, text_encoder: str = "tiny", vae: str = "tiny"
) -> Path:
    """The folder of a checkpoint of these sizes in `folder`, made if it is not there."""
    which = Checkpoint(transformer=transformer, text_encoder=text_encoder, vae=vae)
    model = folder / f"{transformer}-{text_encoder}-{vae}"
    if (model / "model_index.json").is_file():
        return model
    for name, shapes in which.shapes().items():
        header, end = {}, 0
        for tensor, shape in shapes.items():
            n_bytes = _BYTES * math.prod(shape)
            header[tensor] = {
                "dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + n_bytes],
            }  # fmt: skip
            end += n_bytes
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        path = model / name / f"{stem}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    write_configs(model, which)
    (model / "generation_config.json").unlink()  # clips of the published size
    return model
