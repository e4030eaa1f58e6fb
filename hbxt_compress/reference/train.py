"""Trains the reference model from nothing: `python -m hbxt_compress.reference.train`.

Four parts, each resumable: the autoencoder, its decoder again on squared error alone, the latents
of the training clips, and the text encoder with the transformer. Then a WanPipeline folder is
written.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

from hbxt_compress.reference import shapes, train_transformer, train_vae

__all__ = ["main", "write_model"]

log = logging.getLogger(__name__)
_FLOW_SHIFT = 3.0
_GENERATION = {
    "height": shapes.SIZE_PX,
    "width": shapes.SIZE_PX,
    "num_frames": shapes.N_FRAMES,
    "fps": shapes.FPS,
    "num_inference_steps": 50,
    "guidance_scale": 4.0,
    "max_sequence_length": train_transformer.TEXT_LENGTH,
}


def main() -> None:
    """Trains in --work (resuming what is there) and writes the model to --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/reference-model"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny-wan")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    device = torch.device(options.device)
    vae = train_vae.train(options.work, device)
    train_vae.polish_decoder(vae, options.work, device)
    latents = train_transformer.encode_clips(vae, options.work)
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    normal = (latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
    parts = train_transformer.train(options.work, normal, device)
    final = train_vae.new_vae(mean.tolist(), std.tolist()).to(device)
    final.load_state_dict(vae.state_dict())
    final.eval()
    psnr = train_vae.measure_psnr(final)
    log.info("autoencoder round trip on unseen clips: %.2f dB", psnr)
    write_model(options.out, final, *parts)
    facts = {
        "vae_psnr_db": round(psnr, 2),
        "device": options.device,
        "n_cores": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "vae_steps": train_vae.N_STEPS + train_vae.N_POLISH,
        "transformer_steps": train_transformer.N_STEPS,
        "training_clips": train_transformer.N_CLIPS,
    }
    (options.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    log.info("written to %s", options.out)


def write_model(
    folder: Path,
    vae: AutoencoderKLWan,
    tokenizer: object,
    text_encoder: torch.nn.Module,
    transformer: torch.nn.Module,
) -> None:
    """A WanPipeline folder in float16, with generation_config.json beside model_index.json."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=_FLOW_SHIFT,
        num_train_timesteps=1000,
    )
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.cpu().half(),
        transformer=transformer.cpu().half(),
        vae=vae.cpu().half(),
        scheduler=scheduler,
        expand_timesteps=True,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / "generation_config.json").write_text(json.dumps(_GENERATION, indent=1) + "\n")


if __name__ == "__main__":
    main()
