"""What the JSON files of a Wan folder must say: types and ranges, all offenders at once.

The ranges are far beyond every real model: they keep a damaged file from asking for a billion
blocks. Keys that stand in no table are the business of diffusers and transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from hbxt_compress.errors import SourceError, listing
from hbxt_compress.source import Source

__all__ = ["config_of"]


@dataclass(frozen=True, slots=True)
class _Rule:
    """Numbers within a range; length: a list of as many, 0 of any number, None: one number."""

    least: float
    most: float
    whole: bool = True
    length: int | None = None
    optional: bool = False

    def problem(self, value: object) -> str | None:
        """What is wrong with a value."""
        if value is None and self.optional:
            return None
        values = [value] if self.length is None else value
        kinds = (int,) if self.whole else (int, float)
        if (
            isinstance(values, list)
            and self.length in (None, 0, len(values))
            and all(type(one) in kinds and self.least <= one <= self.most for one in values)
        ):
            return None
        what = "whole number" if self.whole else "number"
        wanted = f"a {what}" if self.length is None else f"a list of {self.length or ''} {what}s"
        return f"{value!r:.80} is not {wanted} in {self.least:g}..{self.most:g}"


_SIZE: Final = _Rule(1, 1 << 20)
_NONE_OR_SIZE: Final = _Rule(1, 1 << 20, optional=True)
_DEPTH: Final = _Rule(1, 1000)
_TRANSFORMER: Final = {
    "patch_size": _Rule(1, 64, length=3),
    "num_layers": _DEPTH,
    "num_attention_heads": _Rule(1, 1024),
    "attention_head_dim": _Rule(1, 4096),
    **dict.fromkeys(("in_channels", "out_channels", "text_dim", "freq_dim", "ffn_dim"), _SIZE),
    **dict.fromkeys(("added_kv_proj_dim", "image_dim", "pos_embed_seq_len"), _NONE_OR_SIZE),
    "rope_max_seq_len": _Rule(1, 1 << 16),
}
_RULES: Final[Mapping[str, Mapping[str, _Rule]]] = {
    "model_index.json": {"boundary_ratio": _Rule(0, 1, whole=False, optional=True)},
    "transformer/config.json": _TRANSFORMER,
    "transformer_2/config.json": _TRANSFORMER,
    "text_encoder/config.json": {
        **dict.fromkeys(("d_model", "d_kv", "d_ff"), _SIZE),
        "num_layers": _DEPTH,
        "num_heads": _Rule(1, 1024),
        "vocab_size": _Rule(1, 1 << 24),
        "relative_attention_num_buckets": _Rule(1, 1 << 16),
        "relative_attention_max_distance": _Rule(1, 1 << 20),
    },
    "vae/config.json": {
        "z_dim": _Rule(1, 1024),
        **dict.fromkeys(("latents_mean", "latents_std"), _Rule(-1e4, 1e4, False, 0)),
        **dict.fromkeys(("scale_factor_temporal", "scale_factor_spatial"), _Rule(1, 256)),
        **dict.fromkeys(("base_dim", "in_channels", "out_channels"), _Rule(1, 1 << 16)),
        **dict.fromkeys(("decoder_base_dim", "patch_size"), _NONE_OR_SIZE),
        "dim_mult": _Rule(1, 64, length=0),
        "num_res_blocks": _Rule(1, 64),
    },
    "generation_config.json": {
        **dict.fromkeys(("height", "width"), _Rule(1, 1 << 14)),
        "num_frames": _Rule(1, 1 << 16),
        "fps": _Rule(0.01, 1000, whole=False),
        "num_inference_steps": _Rule(1, 1000),
        "guidance_scale": _Rule(1, 1000, whole=False),
        "guidance_scale_2": _Rule(1, 1000, whole=False, optional=True),
        "max_sequence_length": _Rule(1, 1 << 16),
    },
}


def config_of(source: Source, name: str, *needed: str) -> dict[str, Any]:
    """A JSON file of the folder, its numbers in range.

    Raises:
        SourceError: it is missing or broken, lacks a key that is needed, or says what cannot be.
    """
    document = source.config(name)
    if problems := list(_problems(document, _RULES.get(name, {}), needed)):
        raise SourceError(f"{source.folder / name}: describes no model:\n{listing(problems)}")
    return document


def _problems(
    document: Mapping[str, Any], rules: Mapping[str, _Rule], needed: tuple[str, ...]
) -> Iterator[str]:
    yield from (f"{key}: missing" for key in needed if key not in document)
    for key, rule in rules.items():
        if key in document and (problem := rule.problem(document[key])):
            yield f"{key}: {problem}"
