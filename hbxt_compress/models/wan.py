"""The Wan family: Wan2.1 (1.3B, 14B), Wan2.2 TI2V-5B and A14B, and folders of the same classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from hbxt_compress.chain import Chain
from hbxt_compress.errors import ArtifactError, SourceError, listing
from hbxt_compress.geometry import Geometry
from hbxt_compress.graph.capture import ComponentGraphs, GraphSpec
from hbxt_compress.layers import Depth, LayerKind, LayerName, LayerSpec, Pair
from hbxt_compress.manifest import Bucket
from hbxt_compress.models.light_decoder import LightDecoder
from hbxt_compress.models.light_decoder_graph import light_decoder_graphs
from hbxt_compress.models.wan_config import config_of
from hbxt_compress.models.wan_folder import (
    CLASSES,
    empty,
    folder_of,
    headers_of,
    require_agreement,
    vae_factors,
)
from hbxt_compress.models.wan_graph import text_encoder_graphs, transformer_graphs
from hbxt_compress.models.wan_original import original_name
from hbxt_compress.models.wan_vae_graph import vae_decoder_graphs
from hbxt_compress.sampler import STUDENTS_SAMPLER, SamplerSpec
from hbxt_compress.source import Header, Source
from hbxt_compress.tile import Tile
from hbxt_compress.weights import Weights

__all__ = ["Wan"]

_BLOCK_PREFIX: Final = {
    "text_encoder": "encoder.block.",
    "transformer": "blocks.",
    "transformer_2": "blocks.",
}
_COUNT: Final = "num_layers"
_TILE, _OVERLAP = 256, 64  # pixels
_DEPTHS: Final = {
    "text_encoder": Depth(
        prefix=_BLOCK_PREFIX["text_encoder"],
        count=_COUNT,
        tables=("shared.weight", "encoder.embed_tokens.weight"),
        rows="vocab_size",
    ),
    "transformer": Depth(prefix=_BLOCK_PREFIX["transformer"], count=_COUNT),
    "transformer_2": Depth(prefix=_BLOCK_PREFIX["transformer_2"], count=_COUNT),
}


class Wan:
    """WanPipeline folders. The VAE's encoder serves calibration only and is not exported.

    A folder `decoder/`, see light_decoder.py, goes before the decoder in `vae/`. `vae` names the
    whole VAE for those that load it; it is no component.
    """

    name = "wan"
    pipelines = frozenset({"WanPipeline"})
    chained = frozenset(_BLOCK_PREFIX)
    doubtful = frozenset({"text_encoder"})
    depths: Mapping[str, Depth] = _DEPTHS

    def components(self, source: Source) -> tuple[str, ...]:
        index = config_of(source, "model_index.json")
        experts = ["transformer"] + ["transformer_2"] * (
            _class_of(index, "transformer_2") is not None
        )
        found = ("text_encoder", *experts, "vae_decoder")
        problems = []
        for component in found:
            listed = "vae" if component == "vae_decoder" else component
            entry = _class_of(index, listed)
            expected = CLASSES[component].__name__
            if entry != expected:
                problems.append(f"{listed}: is {entry}, expected {expected}")
        if problems:
            raise SourceError(
                f"{source.folder / 'model_index.json'}: not a Wan model\n" + listing(problems)
            )
        return found

    def layers(self, source: Source) -> tuple[LayerSpec, ...]:
        return tuple(
            LayerSpec(
                name=LayerName(f"{component}/{name.removesuffix('.weight')}"),
                kind=_kind(name, header),
                shape=header.shape,
                dtype=header.dtype,
                block=_block(component, name),
            )
            for component in self.components(source)
            for name, header in sorted(
                headers_of(source, component).items(), key=lambda item: _natural(item[0])
            )
            if name.endswith(".weight") and len(header.shape) >= 2
        )

    def parameters(self, source: Source) -> Mapping[str, int]:
        return {
            component: sum(math.prod(h.shape) for h in headers_of(source, component).values())
            for component in self.components(source)
        }

    def geometry(self, source: Source) -> Geometry:
        chosen = _generation(source)
        z_dim = config_of(source, "vae/config.json").get("z_dim", 16)
        height, width, frames, fps = (704, 1280, 121, 24.0) if z_dim == 48 else (480, 832, 81, 16.0)
        return Geometry(
            height=int(chosen.get("height", height)),
            width=int(chosen.get("width", width)),
            n_frames=int(chosen.get("num_frames", frames)),
            fps=float(chosen.get("fps", fps)),
        )

    def text_length(self, source: Source) -> int:
        return int(_generation(source).get("max_sequence_length", 512))

    def sampler(self, source: Source) -> SamplerSpec:
        if STUDENTS_SAMPLER in source.files:
            try:
                return SamplerSpec.from_json(source.config(STUDENTS_SAMPLER))
            except ArtifactError as error:
                raise SourceError(f"{source.folder / STUDENTS_SAMPLER}: {error}") from None
        chosen = _generation(source)
        guidance = float(chosen.get("guidance_scale", 5.0))
        second = chosen.get("guidance_scale_2")
        name = "scheduler/scheduler_config.json"
        config, index = config_of(source, name), config_of(source, "model_index.json")
        try:
            return SamplerSpec.from_diffusers(
                config,
                n_steps=int(chosen.get("num_inference_steps", 50)),
                guidance=guidance,
                guidance_2=None if second is None else float(second),
                boundary=index.get("boundary_ratio"),
            )
        except SourceError as error:
            raise SourceError(f"{source.folder / name}: {error}") from None

    def latent_shape(
        self, source: Source, clip: Geometry | None = None
    ) -> tuple[int, int, int, int]:
        """C T H W of the latents for a clip, or for this source's geometry."""
        clip = clip or self.geometry(source)
        time, space = vae_factors(source)
        return (
            config_of(source, "vae/config.json", "z_dim")["z_dim"],
            (clip.n_frames - 1) // time + 1,
            clip.height // space,
            clip.width // space,
        )

    def tokens(self, source: Source, clip: Geometry) -> int:
        config = config_of(source, "transformer/config.json", "patch_size")
        _, rows, columns = config["patch_size"]
        time, space = vae_factors(source)
        most = config.get("rope_max_seq_len", 1024)
        sides = (
            ("n_frames", clip.n_frames, time, 1),
            ("height", clip.height, space * rows, 0),
            ("width", clip.width, space * columns, 0),
        )
        n_tokens, problems = 1, []
        for name, size, unit, more in sides:
            n, rest = divmod(size - more, unit)
            nearest = [str(k * unit + more) for k in (n, n + 1) if k * unit + more > 0]
            if rest:
                rule = f"a multiple of {unit}{f' and {more} more' if more else ''}"
                problems.append(f"{name} {size}: must be {rule}, {' or '.join(nearest)}")
            elif n + more > most:
                problems.append(f"{name} {size}: is {n + more} tokens in a row, of at most {most}")
            n_tokens *= n + more
        if problems:
            raise SourceError(
                f"{source.folder}: cannot take such clips:\n{listing(problems)}\n"
                "so say patch_size in transformer/config.json and scale factors in vae/config.json"
            )
        return n_tokens

    def latent_statistics(self, source: Source) -> tuple[tuple[float, ...], tuple[float, ...]]:
        names = ("latents_mean", "latents_std")
        vae = config_of(source, "vae/config.json", "z_dim", *names)
        if {len(vae[name]) for name in names} != {vae["z_dim"]}:
            raise SourceError(
                f"{source.folder / 'vae/config.json'}: has {len(vae['latents_mean'])} latents_mean "
                f"and {len(vae['latents_std'])} latents_std for {vae['z_dim']} channels"
            )
        return tuple(vae["latents_mean"]), tuple(vae["latents_std"])

    def buckets(self, source: Source, clips: Sequence[Geometry] = ()) -> tuple[Bucket, ...]:
        found: list[Bucket] = []
        for clip in clips or (self.geometry(source),):
            self.tokens(source, clip)
            size = f"_{clip.height}x{clip.width}" if found else ""
            alike = [b for b in found if b.latent_shape[2:] == self.latent_shape(source, clip)[2:]]
            found.append(
                Bucket(
                    geometry=clip,
                    latent_shape=self.latent_shape(source, clip),
                    transformer=f"model_{clip}.onnx" if found else "model.onnx",
                    first=alike[0].first if alike else f"model_first{size}.onnx",
                    next=alike[0].next if alike else f"model{size}.onnx",
                    tile=Tile.within((clip.height, clip.width), _TILE, _OVERLAP),
                )
            )
        return tuple(found)

    def graphs(
        self,
        source: Source,
        component: str,
        module: nn.Module,
        clips: Sequence[Geometry] = (),
    ) -> ComponentGraphs:
        length = self.text_length(source)
        if component == "text_encoder":
            return text_encoder_graphs(module, text_length=length)
        graphs: dict[str, GraphSpec] = {}
        for bucket in self.buckets(source, clips):
            if component == "vae_decoder" and isinstance(module, LightDecoder):
                one = light_decoder_graphs(module, bucket)
            elif component == "vae_decoder":
                one = vae_decoder_graphs(module, bucket)
            else:
                one = transformer_graphs(
                    module,
                    latent_shape=bucket.latent_shape,
                    text_length=length,
                    component=component,
                    file=bucket.transformer,
                )
            graphs.update(one.graphs)
        return replace(one, graphs=graphs)

    def chain(self, source: Source, component: str, module: nn.Module) -> Chain:
        """text_encoder(ids, mask) -> hidden, 0 at padding; transformer(latents, t, text) -> v."""
        return Chain(module, *_in_pieces(component))

    def streamed(self, source: Source, component: str, device: torch.device) -> Chain:
        skeleton, weights = self.skeleton(source, component), self.weights(source, component)
        return Chain(skeleton, *_in_pieces(component), weights, device)

    def decode(self, source: Source, module: nn.Module, latents_BCTHW: Tensor) -> Tensor:
        """The frames, B C T H W in -1..1, that a loaded VAE makes of a sampler's latents."""
        mean, std = self._statistics(source)
        latents_BCTHW = latents_BCTHW * std.to(latents_BCTHW) + mean.to(latents_BCTHW)
        if isinstance(module, LightDecoder):
            return module(latents_BCTHW).clamp(-1, 1)
        return module.decode(latents_BCTHW, return_dict=False)[0]  # type: ignore[operator]

    def encode(self, source: Source, module: nn.Module, frames_BCTHW: Tensor) -> Tensor:
        """The latents that a loaded VAE's encoder holds likeliest, in the sampler's units."""
        mean, std = self._statistics(source)
        likeliest = module.encode(frames_BCTHW).latent_dist.mode()  # type: ignore[operator]
        return (likeliest - mean.to(likeliest)) / std.to(likeliest)

    def _statistics(self, source: Source) -> tuple[Tensor, Tensor]:
        """Mean and deviation by latent channel, to be broadcast over B C T H W."""
        mean, std = (torch.tensor(s).view(1, -1, 1, 1, 1) for s in self.latent_statistics(source))
        return mean, std

    def pairs(self, source: Source, component: str, block: int) -> tuple[Pair, ...]:
        """Value and output projections of attentions, head by head; the halves of plain MLPs."""
        if component == "text_encoder":  # its MLP is gated: three weights share the features
            attention = f"encoder.block.{block}.layer.0.SelfAttention"
            n_heads = config_of(source, "text_encoder/config.json", "num_heads")["num_heads"]
            return (
                Pair(
                    first=f"{attention}.v", second=f"{attention}.o", joint="heads", n_heads=n_heads
                ),
            )
        heads = "num_attention_heads"
        n_heads = config_of(source, f"{component}/config.json", heads)[heads]
        at = f"blocks.{block}"
        return (
            *(
                Pair(
                    first=f"{at}.{attention}.to_v",
                    second=f"{at}.{attention}.to_out.0",
                    joint="heads",
                    n_heads=n_heads,
                )
                for attention in ("attn1", "attn2")
            ),
            Pair(first=f"{at}.ffn.net.0.proj", second=f"{at}.ffn.net.2", joint="hidden"),
        )

    def expected(self, source: Source, component: str) -> Mapping[str, tuple[int, ...]]:
        module = empty(source, component)
        return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}

    def original_name(self, name: str) -> str:
        return original_name(name)

    def weights(self, source: Source, component: str) -> Weights:
        # the embedding is tied; a checkpoint may hold it once
        tied = {"encoder.embed_tokens.weight": "shared.weight"}
        folder = source.folder / folder_of(source, component)
        return Weights(folder, tied if component == "text_encoder" else {}, source.stamps)

    def skeleton(self, source: Source, component: str) -> nn.Module:
        module = empty(source, component)
        require_agreement(module, self.weights(source, component))
        return module.eval().requires_grad_(False)

    def load(self, source: Source, component: str) -> nn.Module:
        module = self.skeleton(source, component)
        module.load_state_dict(self.weights(source, component).tensors(), assign=True)
        return module.eval().requires_grad_(False)


def _in_pieces(component: str) -> tuple[str, Callable[..., Tensor]]:
    """Where the blocks are, and how the whole is called."""
    call = _encode if component == "text_encoder" else _velocity
    return _BLOCK_PREFIX[component].removesuffix("."), call


def _encode(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    return encoder(ids, mask).last_hidden_state * mask.unsqueeze(-1)


def _velocity(transformer: nn.Module, latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return transformer(latents, t, text, return_dict=False)[0]


def _generation(source: Source) -> dict[str, Any]:
    present = "generation_config.json" in source.files
    return config_of(source, "generation_config.json") if present else {}


def _class_of(index: Mapping[str, Any], component: str) -> str | None:
    """The class that model_index.json has for a component, None for none."""
    entry = index.get(component)
    named = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
    return entry[1] if named else None  # type: ignore[index]


def _kind(name: str, header: Header) -> LayerKind:
    if len(header.shape) > 2:
        return "conv3d" if len(header.shape) == 5 else "conv2d"
    return (
        "embedding" if name.startswith("shared.") or "relative_attention_bias" in name else "linear"
    )


def _block(component: str, name: str) -> int | None:
    prefix = _BLOCK_PREFIX.get(component)
    return int(name[len(prefix) :].split(".")[0]) if prefix and name.startswith(prefix) else None


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
