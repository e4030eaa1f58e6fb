"""Export wrappers of the Wan family's transformer and text encoder (the VAE: wan_vae_graph.py).

Modules that trace badly are swapped for those of graph/ops.py in a copy that shares the weights.
What the swaps change: rotary tables are float32 constants, patch embedding is a linear over
flattened patches, and one timestep serves all tokens (text-to-video needs no more).
"""

from __future__ import annotations

from collections.abc import Callable

from hbxt_compress.torchvision_ops import mend_torchvision

mend_torchvision()

import torch  # noqa: E402
from diffusers import WanTransformer3DModel  # noqa: E402
from diffusers.models.activations import GELU  # noqa: E402
from diffusers.models.embeddings import Timesteps  # noqa: E402
from diffusers.models.normalization import FP32LayerNorm  # noqa: E402
from diffusers.models.transformers.transformer_wan import WanAttention, WanRotaryPosEmbed  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import UMT5EncoderModel  # noqa: E402
from transformers.activations import GELUTanh, NewGELUActivation  # noqa: E402
from transformers.models.umt5.modeling_umt5 import UMT5Attention, UMT5LayerNorm  # noqa: E402

from hbxt_compress.errors import ExportError  # noqa: E402
from hbxt_compress.graph.capture import ComponentGraphs, GraphSpec, TensorSpec  # noqa: E402
from hbxt_compress.graph.ops import (  # noqa: E402
    FastGelu,
    LayerNorm,
    Linear,
    RmsNorm,
    attend,
    shared_copy,
    swap,
)

__all__ = ["public_config", "text_encoder_graphs", "transformer_graphs"]

# Far below any score, yet within float16 and without overflow when a bias is added.
_MASKED = -30000.0


def transformer_graphs(
    transformer: WanTransformer3DModel,
    *,
    latent_shape: tuple[int, int, int, int],
    text_length: int,
    component: str = "transformer",
    file: str = "model.onnx",
) -> ComponentGraphs:
    """The denoiser at one size: latents C T H W (batch 1), text_length tokens.

    Raises:
        ExportError: The transformer takes image embeddings.
    """
    config = transformer.config
    if config.image_dim is not None or config.added_kv_proj_dim is not None:
        raise ExportError(
            f"{component}: image_dim {config.image_dim}, added_kv_proj_dim "
            f"{config.added_kv_proj_dim}: image-to-video transformers cannot be exported; "
            "use a text-to-video model"
        )
    inputs = {
        "hidden_states": TensorSpec(shape=(1, *latent_shape)),
        "timestep": TensorSpec(shape=(1,)),
        "encoder_hidden_states": TensorSpec(shape=(1, text_length, config.text_dim)),
    }
    graph = GraphSpec(
        module=_Transformer(transformer, latent_shape, component),
        inputs=inputs,
        outputs=["out_hidden_states"],
        reference=lambda x, t, text: transformer(x, t, text, return_dict=False),
        blocks="blocks",
    )
    return ComponentGraphs(component=component, graphs={file: graph}, config=public_config(config))


def text_encoder_graphs(
    encoder: UMT5EncoderModel, *, text_length: int, component: str = "text_encoder"
) -> ComponentGraphs:
    """The text encoder for prompts padded to text_length tokens (batch 1)."""
    shape = (1, text_length)
    inputs = {
        "input_ids": TensorSpec(shape=shape, dtype=torch.int64, below=encoder.config.vocab_size),
        "attention_mask": TensorSpec(shape=shape, dtype=torch.int64),
    }
    graph = GraphSpec(
        module=_TextEncoder(encoder, text_length, component),
        inputs=inputs,
        outputs=["last_hidden_state"],
        reference=lambda ids, mask: (encoder(ids, attention_mask=mask)[0],),
        blocks="encoder.block",
    )
    return ComponentGraphs(
        component=component,
        graphs={"model.onnx": graph},
        config=public_config(encoder.config.to_dict()),
    )


def public_config(config: dict[str, object]) -> dict[str, object]:
    """A component's config without what names a machine: its public keys."""
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "dtype")}


class _Transformer(nn.Module):
    def __init__(
        self, transformer: WanTransformer3DModel, latent_shape: tuple[int, ...], component: str
    ) -> None:
        super().__init__()
        tables = _RotaryTables(transformer.rope, latent_shape)
        self.model: WanTransformer3DModel = shared_copy(transformer)
        self.model.rope = tables
        self.model.patch_embedding = _PatchEmbedding(
            f"{component}/patch_embedding", transformer.patch_embedding
        )
        swap(self.model, _linear_swaps(component))
        swap(self.model, _transformer_swaps)
        for module in self.model.modules():
            if isinstance(module, WanAttention):
                module.processor = _attention

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return self.model(hidden_states, timestep, text, return_dict=False)[0]


def _linear_swaps(component: str) -> Callable[[str, nn.Module], nn.Module | None]:
    def replacement(path: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, nn.Linear):
            return Linear(f"{component}/{path}", module.weight, module.bias)
        return None

    return replacement


def _transformer_swaps(_: str, module: nn.Module) -> nn.Module | None:
    if isinstance(module, nn.RMSNorm):
        return RmsNorm(module.weight, module.eps)
    if isinstance(module, FP32LayerNorm):
        return LayerNorm(module.normalized_shape[0], module.weight, module.bias, module.eps)
    if isinstance(module, nn.GELU) and module.approximate == "tanh":
        return FastGelu()
    if isinstance(module, GELU) and module.approximate == "tanh":
        return _GeluProjection(module.proj)
    if isinstance(module, Timesteps):
        return _Sinusoid(module)
    return None


class _GeluProjection(nn.Module):
    """diffusers' GELU: a linear, then the activation."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj
        self.activation = FastGelu()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.proj(x))


class _RotaryTables(nn.Module):
    """cos and sin, S 1 D/2 each, for one latent size."""

    def __init__(self, rope: WanRotaryPosEmbed, latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        cos, sin = rope(torch.empty(1, *latent_shape))
        self.register_buffer("cos", cos[0, :, :, 0::2].float().contiguous())
        self.register_buffer("sin", sin[0, :, :, 1::2].float().contiguous())

    def forward(self, _: Tensor) -> tuple[Tensor, Tensor]:
        return self.get_buffer("cos"), self.get_buffer("sin")


class _PatchEmbedding(Linear):
    """A convolution whose kernel is its stride, as a linear over flattened patches."""

    def __init__(self, layer: str, conv: nn.Conv3d) -> None:
        super().__init__(layer, conv.weight, conv.bias)
        self.patch = conv.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        _, c, t, h, w = x.shape
        p_t, p_h, p_w = self.patch
        grid = (t // p_t, h // p_h, w // p_w)
        x = x.reshape(c, grid[0], p_t, grid[1], p_h, grid[2], p_w)
        x = x.permute(1, 3, 5, 0, 2, 4, 6).reshape(1, -1, c * p_t * p_h * p_w)
        # diffusers flattens and transposes this back to 1 S D, which a pass then cancels.
        return super().forward(x).transpose(1, 2).unflatten(2, grid)


class _Sinusoid(nn.Module):
    """The sinusoidal timestep embedding with its frequencies as a constant."""

    def __init__(self, timesteps: Timesteps) -> None:
        super().__init__()
        half = timesteps.num_channels // 2
        exponent = -torch.log(torch.tensor(10000.0)) * torch.arange(half, dtype=torch.float32)
        self.register_buffer(
            "frequencies", torch.exp(exponent / (half - timesteps.downscale_freq_shift))
        )
        self.cos_first = timesteps.flip_sin_to_cos
        self.scale = timesteps.scale

    def forward(self, timestep: Tensor) -> Tensor:
        angle = timestep[:, None] * self.get_buffer("frequencies")[None] * self.scale
        waves = [torch.sin(angle), torch.cos(angle)]
        return torch.cat(waves[::-1] if self.cos_first else waves, dim=-1)


def _attention(
    attn: WanAttention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    attention_mask: Tensor | None,
    rotary: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The attention processor: RMSNorm over all heads, rotary embedding, one attention node."""
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    query = attn.norm_q(attn.to_q(hidden_states))
    key = attn.norm_k(attn.to_k(context))
    value = attn.to_v(context)
    if rotary is not None:
        query = _rotate(query, *rotary)
        key = _rotate(key, *rotary)
    head_dim = attn.inner_dim // attn.heads
    out = attend(query, key, value, n_heads=attn.heads, scale=head_dim**-0.5)
    return attn.to_out[0](out)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x, 1 S H*D, with each pair of neighbours turned by its token's angle; cos, sin S 1 D/2.

    Of each head all first numbers come out before all second ones: queries and keys multiply to the
    same in any order, and in this one they are put together in long runs.
    """
    pairs = x.unflatten(-1, (-1, cos.shape[-1], 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.cat([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(2)


class _TextEncoder(nn.Module):
    def __init__(self, encoder: UMT5EncoderModel, text_length: int, component: str) -> None:
        super().__init__()
        self.model: UMT5EncoderModel = shared_copy(encoder)
        # The table's second name; without it the first, which checkpoints use, is exported.
        self.model.encoder.embed_tokens = nn.Identity()
        attention = encoder.encoder.block[0].layer[0].SelfAttention
        self.register_buffer("buckets", _relative_buckets(attention, text_length))
        swap(self.model, _linear_swaps(component))
        swap(self.model, _text_swaps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = (1.0 - attention_mask.float())[:, None, None, :] * _MASKED
        x = self.model.shared(input_ids)
        for block in self.model.encoder.block:
            first, second = block.layer
            x = x + self._attention(first.SelfAttention, first.layer_norm(x), mask)
            x = x + second.DenseReluDense(second.layer_norm(x))
        return self.model.encoder.final_layer_norm(x)

    def _attention(self, attn: UMT5Attention, x: Tensor, mask: Tensor) -> Tensor:
        bias = (
            attn.relative_attention_bias(self.get_buffer("buckets")).permute(2, 0, 1)[None] + mask
        )
        out = attend(
            attn.q(x), attn.k(x), attn.v(x), n_heads=attn.n_heads, scale=attn.scaling, bias=bias
        )
        return attn.o(out)


def _relative_buckets(attention: UMT5Attention, length: int) -> Tensor:
    """int64 S S: the bucket of each (query, key) distance."""
    position = torch.arange(length)
    return attention._relative_position_bucket(position[None, :] - position[:, None])


def _text_swaps(_: str, module: nn.Module) -> nn.Module | None:
    if isinstance(module, UMT5LayerNorm):
        return RmsNorm(module.weight, module.variance_epsilon)
    if isinstance(module, NewGELUActivation | GELUTanh):
        return FastGelu()
    return None
