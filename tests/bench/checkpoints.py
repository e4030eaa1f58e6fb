"""Folders in the exact layout and shapes of published Wan models, their weights random.

    python tests/bench/checkpoints.py build/bench/checkpoints/5B --transformer 5B

A folder has the components that its caller asks for: a transformer of published size beside a text
encoder and a VAE of toy size measures the transformer alone. It loads as the published one does;
clips are small, so that a step of it ends.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hbxt_compress.torchvision_ops import mend_torchvision

mend_torchvision()

import torch  # noqa: E402
from diffusers import AutoencoderKLWan, WanTransformer3DModel  # noqa: E402
from random_weights import Drawer, write_weights  # noqa: E402
from torch import nn  # noqa: E402
from transformers import UMT5Config, UMT5EncoderModel  # noqa: E402

from hbxt_compress.source import BUILTIN, locate  # noqa: E402

__all__ = [
    "CHECKPOINTS",
    "TEXT_ENCODERS",
    "TRANSFORMERS",
    "VAES",
    "Checkpoint",
    "write_checkpoint",
    "write_configs",
]

_VERSION = 1  # of the numbers and the layout: part of the stamp
_STAMP = ".stamp"  # no .json: what lies beside weights as JSON is hashed as part of the model
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Transformer:
    """What differs between the transformers. flow_shift: of the sampler that is published."""

    heads: int
    head_dim: int = 128
    ffn: int
    layers: int
    channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    flow_shift: float = 3.0


TRANSFORMERS = {
    "tiny": _Transformer(heads=2, head_dim=64, ffn=256, layers=2, text_dim=128, freq_dim=64),
    "0.1B": _Transformer(heads=12, ffn=8960, layers=2),
    "0.3B": _Transformer(heads=12, ffn=8960, layers=6),
    "1.3B": _Transformer(heads=12, ffn=8960, layers=30),
    "5B": _Transformer(heads=24, ffn=14336, layers=30, channels=48, flow_shift=5.0),
}
"""1.3B is Wan2.1-T2V-1.3B, 0.1B and 0.3B are as wide with fewer blocks; 5B is Wan2.2-TI2V-5B."""

TEXT_ENCODERS: Mapping[str, Mapping[str, int]] = {
    "tiny": {"d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4, "vocab_size": 32},
    "umt5-xxl": {
        "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
        "vocab_size": 256384,
    },
}  # fmt: skip
"""A width that is not given is the transformer's text_dim."""

VAES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {},
    "wan2.1": {
        "base_dim": 96, "decoder_base_dim": None, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
        "attn_scales": [], "temperal_downsample": [False, True, True], "is_residual": False,
        "in_channels": 3, "out_channels": 3, "patch_size": None,
        "scale_factor_temporal": 4, "scale_factor_spatial": 8,
    },
    "wan2.2": {
        "base_dim": 160, "decoder_base_dim": 256, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
        "attn_scales": [], "temperal_downsample": [False, True, True], "is_residual": True,
        "in_channels": 12, "out_channels": 12, "patch_size": 2,
        "scale_factor_temporal": 4, "scale_factor_spatial": 16,
    },
}  # fmt: skip
"""What differs from the built-in model's; channels of latents are the transformer's."""

_GENERATION = {
    "height": 64, "width": 64, "num_frames": 5, "fps": 8,
    "num_inference_steps": 4, "guidance_scale": 5.0, "max_sequence_length": 16,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Which folder: sizes by name (of TRANSFORMERS, TEXT_ENCODERS and VAES), and the seed."""

    transformer: str
    text_encoder: str = "tiny"
    vae: str = "tiny"
    seed: int = 0

    def modules(self) -> dict[str, nn.Module]:
        """Subfolder -> module on the meta device: shapes without memory.

        Raises:
            ValueError: a size that is not in the tables, or a text encoder of another width than
                the transformer takes.
        """
        size = _look_up(TRANSFORMERS, self.transformer, "transformer")
        text = {"d_model": size.text_dim, **_look_up(TEXT_ENCODERS, self.text_encoder, "text")}
        if text["d_model"] != size.text_dim:
            raise ValueError(
                f"text encoder {self.text_encoder} gives {text['d_model']} features, transformer "
                f"{self.transformer} takes {size.text_dim}: choose two that fit"
            )
        vae = locate(BUILTIN, hashed=False).config("vae/config.json")
        vae |= _look_up(VAES, self.vae, "vae") | {
            "z_dim": size.channels,
            "latents_mean": [0.0] * size.channels,
            "latents_std": [1.0] * size.channels,
        }
        config = UMT5Config(
            **text, feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=0, eos_token_id=1
        )
        with torch.device("meta"):
            return {
                "transformer": WanTransformer3DModel(
                    patch_size=(1, 2, 2), num_attention_heads=size.heads,
                    attention_head_dim=size.head_dim, in_channels=size.channels,
                    out_channels=size.channels, text_dim=size.text_dim, freq_dim=size.freq_dim,
                    ffn_dim=size.ffn, num_layers=size.layers,
                ),
                "text_encoder": UMT5EncoderModel(config),
                "vae": AutoencoderKLWan.from_config(vae),
            }  # fmt: skip

    def shapes(self) -> dict[str, Shapes]:
        """Subfolder -> tensor name -> shape, tied tensors once, in the module's order."""
        return {
            folder: {name: tuple(one.shape) for name, one in module.named_parameters()}
            for folder, module in self.modules().items()
        }

    @property
    def stamp(self) -> str:
        """Changes when any byte of the folder would."""
        sizes = {
            folder: {k: list(v) for k, v in own.items()} for folder, own in self.shapes().items()
        }
        about = [_VERSION, self.seed, sizes, _GENERATION, self._flow_shift, torch.__version__]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    @property
    def _flow_shift(self) -> float:
        return TRANSFORMERS[self.transformer].flow_shift


CHECKPOINTS = {
    **{name: Checkpoint(transformer=name) for name in TRANSFORMERS},
    "TI2V-5B": Checkpoint(transformer="5B", text_encoder="umt5-xxl", vae="wan2.2"),
}
"""Folders by name: a transformer beside toys, or the whole of Wan2.2-TI2V-5B."""


def write_checkpoint(folder: Path, which: Checkpoint, *, shard_bytes: int = 5 * 10**9) -> Path:
    """The folder, written unless it is there already with the same stamp; another is replaced.

    Raises:
        ValueError: as `Checkpoint.modules`; or the folder holds something else than a checkpoint.
        OSError: the disk has too little room, said before anything is written.
    """
    stamp = folder / _STAMP
    wanted = f"{which.stamp}-{shard_bytes}"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return folder
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder}: holds other things than a checkpoint; name another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shapes, drawer = which.shapes(), Drawer(which.seed)
    _check_room(folder, 2 * sum(math.prod(s) for own in shapes.values() for s in own.values()))
    write_configs(folder, which)
    for name, own in shapes.items():
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        write_weights(folder / name, stem, own, drawer, prefix=f"{name}/", shard_bytes=shard_bytes)
    stamp.write_text(wanted, encoding="utf-8")
    return folder


def write_configs(folder: Path, which: Checkpoint) -> None:
    """All of a folder but weights and stamp."""
    builtin = locate(BUILTIN, hashed=False)
    index = builtin.config("model_index.json")
    index["expand_timesteps"] = TRANSFORMERS[which.transformer].channels == 48  # Wan2.2-TI2V
    scheduler = builtin.config("scheduler/scheduler_config.json")
    scheduler["flow_shift"] = which._flow_shift
    shutil.copytree(builtin.folder / "tokenizer", folder / "tokenizer")
    _write_json(folder / "model_index.json", index)
    _write_json(folder / "generation_config.json", _GENERATION)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    for name, module in which.modules().items():
        _write_json(folder / name / "config.json", _config(module))


def _config(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, UMT5EncoderModel):
        given: dict[str, Any] = module.config.to_diff_dict()
        return given | {"architectures": ["UMT5EncoderModel"], "dtype": "bfloat16"}
    document: dict[str, Any] = json.loads(module.to_json_string())  # type: ignore[operator]
    return document


def _write_json(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _look_up(table: Mapping[str, Any], name: str, kind: str) -> Any:
    if name not in table:
        raise ValueError(f"no {kind} of size {name!r}; there are {', '.join(table)}")
    return table[name]


def _check_room(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < 1.02 * n_bytes:
        raise OSError(
            f"{folder}: needs {n_bytes / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB left; "
            "make room or choose another folder"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--transformer", choices=TRANSFORMERS, default="0.3B")
    parser.add_argument("--text-encoder", choices=TEXT_ENCODERS, default="tiny")
    parser.add_argument("--vae", choices=VAES, default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    which = Checkpoint(
        transformer=asked.transformer,
        text_encoder=asked.text_encoder,
        vae=asked.vae,
        seed=asked.seed,
    )
    write_checkpoint(asked.folder, which)


if __name__ == "__main__":
    main()
