"""Trains the reference model's text encoder and transformer together, by flow matching.

x_t = (1 - s) x0 + s eps, target velocity eps - x0, on normalised latents of the training clips.
Captions are padded to TEXT_LENGTH; WanPipeline pads to 512 unless told otherwise, and padding takes
part in cross-attention. One padding key weighted log(481) stands for the 481 that 512 tokens would
have, so half the training sees each length and both work at sampling time.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from hbxt_compress.reference import loop, shapes
from hbxt_compress.reference.train_vae import Z_DIM, clips

__all__ = [
    "TEXT_LENGTH",
    "encode_clips",
    "new_text_encoder",
    "new_tokenizer",
    "new_transformer",
    "train",
]

TEXT_LENGTH = 32
N_STEPS = 4800
N_CLIPS = 8192
_BATCH = 32
_DROP_CAPTION = 0.1
_SHIFT = 3.0
_EMA = 0.999


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the caption grammar; other words become <unk>."""
    words = sorted(
        {word for i in range(4000) for v in (0, 3) for word in _words("train", i, v)} | {"the"}
    )
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace("grey", "gray")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
    )


def _words(split: shapes.Split, index: int, variant: int) -> list[str]:
    text = shapes.caption(shapes.scene(split, index), variant).replace(",", " ,")
    return [*text.split(), "moves", "stands"]


def new_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """An untrained two-layer UMT5 encoder of width 128."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4,
            dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def new_transformer() -> WanTransformer3DModel:
    """An untrained Wan transformer: 6 blocks of width 256, about 7 M parameters."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=64,
        in_channels=Z_DIM, out_channels=Z_DIM,
        text_dim=128, freq_dim=256, ffn_dim=1024, num_layers=6, rope_max_seq_len=64,
    )  # fmt: skip


class _WeightedPadding(WanAttnProcessor):  # type: ignore[misc]  # diffusers ships no types
    """Cross-attention in which the last text token counts for many; self-attention unchanged."""

    bias: Tensor | None = None  # 1 or B, 1, 1, TEXT_LENGTH

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if encoder_hidden_states is None:
            return super().__call__(attn, hidden_states, None, attention_mask, rotary_emb)
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        k = (
            attn.norm_k(attn.to_k(encoder_hidden_states))
            .unflatten(2, (attn.heads, -1))
            .transpose(1, 2)
        )
        v = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        bias = None if self.bias is None else self.bias.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=bias)
        return attn.to_out[0](out.transpose(1, 2).flatten(2).type_as(hidden_states))


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, folder: Path, n_clips: int = N_CLIPS) -> Tensor:
    """Latent means of the first training clips, float32 N Z T' H' W', cached in the folder."""
    path = folder / "latents.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    from hbxt_compress.reference import whole_clip

    found = []
    for start in range(0, n_clips, 16):
        x = clips("train", range(start, start + 16)).to(vae.device)
        with torch.autocast(vae.device.type, torch.bfloat16):
            moments = whole_clip.encode(vae, x)
        found.append(moments[:, :Z_DIM].float().cpu())
    latents = torch.cat(found)
    torch.save(latents, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)
    return latents


def train(
    folder: Path, latents: Tensor, device: torch.device, n_steps: int = N_STEPS
) -> tuple[PreTrainedTokenizerFast, UMT5EncoderModel, WanTransformer3DModel]:
    """The tokenizer, and the averaged weights of text encoder and transformer, in eval mode.

    latents: normalised, N Z T' H' W'; row i belongs to the training scene i.
    """
    torch.manual_seed(1)
    tokenizer = new_tokenizer()
    model = nn.ModuleDict(
        {"text": new_text_encoder(len(tokenizer)), "video": new_transformer()}
    ).to(device)
    average = nn.ModuleDict(
        {"text": new_text_encoder(len(tokenizer)), "video": new_transformer()}
    ).to(device)
    average.load_state_dict(model.state_dict())
    processor = _WeightedPadding()
    for module in model["video"].modules():
        if isinstance(module, WanAttention) and module.is_cross_attention:
            module.set_processor(processor)
    captions = [
        [shapes.caption(shapes.scene("train", i), v) for v in range(4)] for i in range(len(latents))
    ]
    tokens = [
        tokenizer(four, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
        for four in captions
    ]
    ids = torch.stack([t.input_ids for t in tokens])
    masks = torch.stack([t.attention_mask for t in tokens])
    empty = tokenizer("", padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".blocks." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".blocks." in n)]
    muon = torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)

    def forward(
        x0: Tensor, eps: Tensor, sigma: Tensor, text: Tensor, mask: Tensor, bias: Tensor
    ) -> Tensor:
        processor.bias = bias
        hidden = model["text"](text, mask).last_hidden_state * mask.unsqueeze(-1)
        s = sigma.view(-1, 1, 1, 1, 1)
        v = model["video"]((1 - s) * x0 + s * eps, sigma * 1000, hidden, return_dict=False)[0]
        return F.mse_loss(v.float(), eps - x0)

    loss_of = loop.compiled(forward)

    def step(k: int) -> float:
        g = torch.Generator().manual_seed(k)
        rows = torch.randint(len(latents), (_BATCH,), generator=g)
        variants = (torch.rand(_BATCH, generator=g) < 0.5).long() * torch.randint(
            4, (_BATCH,), generator=g
        )
        text, mask = ids[rows, variants], masks[rows, variants]
        dropped = torch.rand(_BATCH, 1, generator=g) < _DROP_CAPTION
        text, mask = (
            torch.where(dropped, empty.input_ids, text),
            torch.where(dropped, empty.attention_mask, mask),
        )
        uniform = (torch.arange(_BATCH) + torch.rand(_BATCH, generator=g)) / _BATCH
        normal = torch.sigmoid(torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4)))
        sigma = torch.where(torch.arange(_BATCH) % 4 == 0, uniform, normal)
        sigma = _SHIFT * sigma / (1 + (_SHIFT - 1) * sigma)
        bias = torch.zeros(_BATCH, 1, 1, TEXT_LENGTH)
        bias[torch.rand(_BATCH, generator=g) < 0.5, ..., -1] = math.log(512 - TEXT_LENGTH + 1)
        x0 = latents[rows]
        eps = torch.randn(x0.shape, generator=g)
        for optimizer, peak in ((muon, 1.5e-3), (adamw, 1e-3)):
            for group in optimizer.param_groups:
                group["lr"] = loop.trapezoid(k, n_steps, peak)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(*(t.to(device) for t in (x0, eps, sigma, text, mask, bias)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            decay = min(_EMA, (k + 1) / (k + 10))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        return float(loss.detach())

    parts: dict[str, nn.Module | torch.optim.Optimizer] = {
        "model": model,
        "average": average,
        "muon": muon,
        "adamw": adamw,
    }
    loop.run("transformer", folder, n_steps, parts, step)
    average.eval().requires_grad_(False)
    return tokenizer, average["text"], average["video"]
