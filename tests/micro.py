"""A WanPipeline folder with random weights: the reference model's shape, made in two seconds."""

from __future__ import annotations

import json
from pathlib import Path

from hbxt_compress.torchvision_ops import mend_torchvision

mend_torchvision()

import torch  # noqa: E402
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel  # noqa: E402

from hbxt_compress.reference.train_transformer import new_text_encoder, new_tokenizer  # noqa: E402

GENERATION = {
    "height": 32, "width": 32, "num_frames": 5, "fps": 8,
    "num_inference_steps": 3, "guidance_scale": 3.0,
    "max_sequence_length": 16,
}  # fmt: skip


def write_micro_wan(
    folder: Path, *, two_experts: bool = False, residual_vae: bool = True, seed: int = 0
) -> Path:
    """The folder of a random two-block Wan: width 128, 5 frames of 32x32, latents 4 2 4 4."""
    torch.manual_seed(seed)
    tokenizer = new_tokenizer()

    def transformer() -> WanTransformer3DModel:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64,
            in_channels=4, out_channels=4,
            text_dim=128, freq_dim=64, ffn_dim=256, num_layers=2, rope_max_seq_len=32,
        )  # fmt: skip

    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2] if residual_vae else [1, 2, 2, 2], num_res_blocks=1,
        temperal_downsample=[True, True] if residual_vae else [False, True, True],
        is_residual=residual_vae,
        in_channels=12 if residual_vae else 3, out_channels=12 if residual_vae else 3,
        patch_size=2 if residual_vae else None, latents_mean=[0.1] * 4, latents_std=[1.5] * 4,
    )  # fmt: skip
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=new_text_encoder(len(tokenizer)),
        transformer=transformer(),
        transformer_2=transformer() if two_experts else None,
        boundary_ratio=0.875 if two_experts else None,
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        expand_timesteps=residual_vae,
    ).save_pretrained(folder, safe_serialization=True)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder
