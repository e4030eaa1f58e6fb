"""What lies where in a Wan model's folder, and the modules that its files describe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from hbxt_compress.errors import SourceError, listing
from hbxt_compress.models.light_decoder import CLASS_NAME, LightDecoder
from hbxt_compress.models.wan_config import config_of
from hbxt_compress.source import Header, Source, read_headers
from hbxt_compress.weights import Weights

__all__ = ["CLASSES", "empty", "folder_of", "headers_of", "require_agreement", "vae_factors"]

CLASSES: Final = {
    "text_encoder": UMT5EncoderModel,
    "transformer": WanTransformer3DModel,
    "transformer_2": WanTransformer3DModel,
    "vae_decoder": AutoencoderKLWan,
    "vae": AutoencoderKLWan,
}
# what the classes of diffusers and transformers end with where a config makes no sense to them
_UNFIT: Final = (
    TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, ArithmeticError,
    AssertionError, UnboundLocalError, StrictDataclassError,
)  # fmt: skip
_LIGHT: Final = "decoder"  # the folder of a decoder that goes before the VAE's own


def folder_of(source: Source, component: str) -> str:
    """The folder that holds a component."""
    if component != "vae_decoder":
        return component
    return _LIGHT if f"{_LIGHT}/config.json" in source.files else "vae"


def empty(source: Source, component: str) -> nn.Module:
    """The module that config.json describes: parameters on the meta device, buffers real."""
    folder = folder_of(source, component)
    config = config_of(source, f"{folder}/config.json")
    if folder == _LIGHT:
        return _light(source, config)
    kind = CLASSES[component]
    listed = config.get("architectures")
    named = listed[0] if isinstance(listed, list) and listed else None
    found = config.get("_class_name") or named
    if found != kind.__name__:
        raise SourceError(
            f"{source.folder / folder / 'config.json'}: describes {found}, expected {kind.__name__}"
        )
    try:
        with torch.device("meta"):
            if kind is UMT5EncoderModel:
                return UMT5EncoderModel(UMT5Config(**config))
            module = kind.from_config(config)
    except _UNFIT as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise SourceError(
            f"{source.folder / folder / 'config.json'}: describes no {kind.__name__}: {reason}"
        ) from error
    if isinstance(module, WanTransformer3DModel):  # its tables are computed, no file has them
        rope = module.rope
        module.rope = WanRotaryPosEmbed(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
    return module


def _light(source: Source, config: Mapping[str, Any]) -> LightDecoder:
    """The decoder of `decoder/`, without values, if it takes the VAE's latents."""
    path, (time, space) = source.folder / _LIGHT / "config.json", vae_factors(source)
    if config.get("_class_name") != CLASS_NAME:
        raise SourceError(f"{path}: describes {config.get('_class_name')}, expected {CLASS_NAME}")
    try:
        with torch.device("meta"):
            decoder = LightDecoder.from_config(config)
    except _UNFIT as error:
        raise SourceError(f"{path}: describes no decoder: {error}") from None
    made_for = (decoder.z_dim, decoder.factor_in_time, decoder.factor_in_space)
    found = (config_of(source, "vae/config.json", "z_dim")["z_dim"], time, space)
    if made_for != found:
        raise SourceError(
            f"{path}: made for latents of {made_for[0]} channels, {made_for[1]} frames and "
            f"{made_for[2]} pixels a side; the VAE's have {found[0]}, {found[1]} and {found[2]}"
        )
    return decoder


def require_agreement(module: nn.Module, weights: Weights) -> None:
    """Raises SourceError unless the files hold just the tensors that the module has."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    names = set(weights.names)
    problems = [f"missing: {name}" for name in expected if name not in names]
    problems += [f"unexpected: {name}" for name in weights.names if name not in expected]
    problems += [
        f"{name}: has shape {list(weights.shape(name))}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in names and weights.shape(name) != shape
    ]
    if problems:
        raise SourceError(
            f"{weights.folder}: weights and config.json disagree:\n{listing(problems)}"
        )


def vae_factors(source: Source) -> tuple[int, int]:
    """Frames of a clip to one of latents, and pixels to one along height and width."""
    vae = config_of(source, "vae/config.json")
    return vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)


def headers_of(source: Source, component: str) -> dict[str, Header]:
    """The tensors of a component that inference needs, by name."""
    folder = folder_of(source, component)
    headers = read_headers(source.folder / folder)
    if folder == "vae":
        return {
            name: h
            for name, h in headers.items()
            if name.startswith(("decoder.", "post_quant_conv."))
        }
    if (
        component == "text_encoder"
    ):  # a tied copy of the embedding that some checkpoints store twice
        headers.pop("encoder.embed_tokens.weight", None)
    return headers
