"""Lora: what a file of low-rank (and full) differences adds to the weights of a model.

    W' = W + scale * alpha / rank * B A        Hu et al. 2021, arXiv 2106.09685

in float32, rounded once to the dtype of W. Names are diffusers', peft's, those of the authors' own
code, or kohya's with underscores. `diff` adds to a whole tensor and `diff_b` to a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from torch import Tensor

from hbxt_compress import disk
from hbxt_compress.checkpoint import Checkpoint, Stored, bare
from hbxt_compress.errors import SourceError, listing
from hbxt_compress.json_text import parse_json

__all__ = ["Lora"]

_Kind = Literal["down", "up", "alpha", "diff", "bias"]
_ENDINGS: Final[Mapping[str, _Kind]] = {
    ".lora_A.weight": "down", ".lora_A.default.weight": "down", ".lora_down.weight": "down",
    ".lora_B.weight": "up", ".lora_B.default.weight": "up", ".lora_up.weight": "up",
    ".lora_B.bias": "bias", ".lora_B.default.bias": "bias",
    ".alpha": "alpha", ".diff": "diff", ".diff_b": "bias",
}  # fmt: skip
_KOHYA: Final = "lora_unet_"
_UNLIKE: Final = ("use_dora", "use_rslora", "alpha_pattern")  # they change what a layer gets
_BESIDE: Final = ("adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A LoRA file whose every tensor has found its place.

    alpha: of layers that give none themselves; None: their rank, so that B A is added as it is.
    """

    checkpoint: Checkpoint
    scale: float
    alpha: float | None = None
    _parts: Mapping[str, Mapping[_Kind, Stored]] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        path: Path,
        scale: float,
        shapes: Mapping[str, tuple[int, ...]],
        spellings: Mapping[str, str],
    ) -> Lora:
        """The LoRA at a path, for tensors of these names and shapes.

        spellings: other names -> those names.

        Raises:
            SourceError: damaged, half a pair, or keys that match no layer; all are named.
        """
        checkpoint = Checkpoint.open(path)
        parts, problems = _sorted(checkpoint, shapes, spellings)
        for name, part in parts.items():
            problems += [f"{name}: {one}" for one in _misfits(part, shapes[name])]
        if not (parts or problems):
            problems = ["it holds no tensors"]
        if problems:
            raise SourceError(f"{path}: cannot be added to this transformer:\n{listing(problems)}")
        return cls(checkpoint=checkpoint, scale=scale, alpha=_default_alpha(path), _parts=parts)

    @property
    def names(self) -> frozenset[str]:
        """Of the tensors that it changes."""
        return frozenset(self._parts)

    def added(self, name: str, weight: Tensor) -> Tensor:
        """A float32 tensor with its difference added; the tensor itself if it has none there."""
        part = self._parts.get(name)
        if part is None:
            return weight
        if "down" in part:
            down_RI = part["down"].read().float().flatten(1)
            up_OR = part["up"].read().float().flatten(1)
            rank = down_RI.shape[0]
            alpha = rank if self.alpha is None else self.alpha
            if "alpha" in part:
                alpha = float(part["alpha"].read())
            weight = weight + (up_OR @ down_RI).view(weight.shape) * (self.scale * alpha / rank)
        for kind in ("diff", "bias"):
            if kind in part:
                weight = weight + part[kind].read().float().view(weight.shape) * self.scale
        return weight


def _sorted(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], spellings: Mapping[str, str]
) -> tuple[dict[str, dict[_Kind, Stored]], list[str]]:
    """What is there for each tensor, and what is there for none."""
    known = dict(spellings)
    for spelt, name in spellings.items():
        stem, dot, last = spelt.rpartition(".")
        known[f"{_KOHYA}{stem.replace('.', '_')}{dot}{last}"] = name
    parts: dict[str, dict[_Kind, Stored]] = {}
    problems = []
    for key, stored in checkpoint.tensors.items():
        ending = next((one for one in _ENDINGS if key.endswith(one)), None)
        if ending is None:
            problems.append(f"{key}: no part of a LoRA that is known here")
            continue
        kind, layer = _ENDINGS[ending], bare(key.removesuffix(ending))
        wanted = (f"{layer}.bias",) if kind == "bias" else (f"{layer}.weight", layer)
        found = next((known[one] for one in wanted if one in known), None)
        if found is None:
            problems.append(f"{key}: the transformer has no {wanted[0]}")
        elif kind in parts.setdefault(found, {}):
            problems.append(f"{key}: a second one for {found}")
        else:
            parts[found][kind] = stored
    return parts, problems


def _misfits(part: Mapping[_Kind, Stored], shape: tuple[int, ...]) -> list[str]:
    """What is wrong with the parts for a tensor of this shape."""
    found = []
    down, up = part.get("down"), part.get("up")
    if (down is None) != (up is None):
        found.append(f"half a pair, only lora_{'A' if up is None else 'B'}")
    elif down is not None and up is not None:
        product = (*up.shape[:1], *down.shape[1:])
        ones = all(n == 1 for n in up.shape[2:])
        if not down.shape[:1] or not down.shape[0]:
            found.append("a pair of rank 0")
        elif len(shape) < 2 or product != shape or up.shape[1:2] != down.shape[:1] or not ones:
            found.append(f"{list(up.shape)} times {list(down.shape)} does not make {list(shape)}")
    elif "alpha" in part:
        found.append("an alpha without lora_A and lora_B")
    if "alpha" in part and part["alpha"].shape not in ((), (1,)):
        found.append(f"alpha has shape {list(part['alpha'].shape)}, expected one number")
    found += [
        f"a difference of shape {list(part[kind].shape)}, expected {list(shape)}"
        for kind in ("diff", "bias")
        if kind in part and part[kind].shape != shape
    ]
    return found


def _default_alpha(path: Path) -> float | None:
    """The alpha that stands beside the tensors: in diffusers' metadata or in peft's own file."""
    config: dict[str, object] = {}
    if path.name == _BESIDE[0] and (beside := path.with_name(_BESIDE[1])).is_file():
        config = _object(beside, beside.read_bytes())
    elif path.suffix == ".safetensors":
        with disk.reading(path), path.open("rb") as file:
            header = parse_json(file.read(int.from_bytes(file.read(8), "little")))
        told = header.get("__metadata__", {})
        if not isinstance(told, dict) or not all(isinstance(one, str) for one in told.values()):
            raise SourceError(f"{path}: its __metadata__ is not text by name; save it again")
        text = told.get("lora_adapter_metadata", "{}")
        config = {key.removeprefix("transformer."): v for key, v in _object(path, text).items()}
    if unlike := [f"{key}: {config[key]!r}" for key in _UNLIKE if config.get(key)]:
        raise SourceError(f"{path}: its configuration asks for what is not merged here:\n"
                          + listing(unlike))  # fmt: skip
    alpha = config.get("lora_alpha")
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
        raise SourceError(f"{path}: lora_alpha is {alpha!r}, expected a number")
    return alpha


def _object(path: Path, text: str | bytes) -> dict[str, object]:
    try:
        document = parse_json(text)
    except ValueError as error:
        raise SourceError(f"{path}: its configuration is not valid JSON ({error})") from None
    if not isinstance(document, dict):
        raise SourceError(f"{path}: its configuration is not a JSON object")
    return document
