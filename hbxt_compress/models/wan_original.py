"""The names that Wan's own code gives a transformer's tensors, by those that diffusers gives them.

Checkpoints of Wan, of what was trained with Wan's code (Hummingbird-XT) and most LoRAs have them.
Only names differ: no tensor is transposed, split or joined.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

__all__ = ["original_name"]

_BLOCK: Final = re.compile(r"(blocks\.\d+\.)(.+)")
_OUTSIDE: Final = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
_ATTENTIONS: Final = {"attn1": "self_attn", "attn2": "cross_attn"}
_PROJECTIONS: Final = {
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm_q": "norm_q", "norm_k": "norm_k",
}  # fmt: skip
_IN_A_BLOCK: Final = {
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm2": "norm3",  # of the three norms the one with weights, which diffusers counts as second
    "scale_shift_table": "modulation",
} | {
    f"{attention}.{projection}": f"{own}.{short}"
    for attention, own in _ATTENTIONS.items()
    for projection, short in _PROJECTIONS.items()
}


def original_name(name: str) -> str:
    """`blocks.0.attn1.to_q.weight` -> `blocks.0.self_attn.q.weight`; itself if it has no other."""
    block = _BLOCK.fullmatch(name)
    if block is None:
        return _renamed(name, _OUTSIDE)
    return block[1] + _renamed(block[2], _IN_A_BLOCK)


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for ours, own in table.items():
        if name == ours or name.startswith(f"{ours}."):
            return own + name.removeprefix(ours)
    return name
