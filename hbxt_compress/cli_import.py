"""`hbxt import`: the command that makes a model folder of a checkpoint of others."""

from __future__ import annotations

from pathlib import Path

import click

from hbxt_compress.errors import UsageError

__all__ = ["import_"]

_path = click.Path(path_type=Path)


@click.command("import")
@click.argument("checkpoint", type=_path, required=False)
@click.option(
    "--base", required=True, help="Model that gives all else: folder, or Hub id@revision."
)
@click.option("--out", type=_path, required=True, help="Folder to write; must not exist.")
@click.option(
    "--steps", help="Timesteps it was distilled to: 1000,750,500; default: base's sampler."
)
@click.option("--shift", type=float, help="Of the steps' noise levels; default: 5.")
@click.option("--lora", "loras", multiple=True, metavar="FILE[=SCALE]", help="Merged; repeatable.")
@click.option("--part", help="Of several models in a training checkpoint: generator_ema, ...")
def import_(
    checkpoint: Path | None, base: str, out: Path, steps: str | None, shift: float | None,
    loras: tuple[str, ...], part: str | None,
) -> None:  # fmt: skip
    """Make a model folder of a distilled CHECKPOINT.

    In the naming of Wan's own code or diffusers': .safetensors, a folder of them, .pt, .pth, .bin.
    Without CHECKPOINT the LoRAs are merged into the base. Imported students run in --steps steps
    without guidance.
    """
    from hbxt_compress.source import locate
    from hbxt_compress.stages.import_model import import_model

    import_model(
        locate(base, hashed=False),
        out,
        checkpoint=checkpoint,
        part=part,
        loras=[_lora(one) for one in loras],
        steps=_steps(steps),
        shift=shift,
    )
    click.echo(out)


def _steps(text: str | None) -> tuple[int, ...]:
    try:
        return () if text is None else tuple(int(step) for step in text.split(","))
    except ValueError:
        raise UsageError(f"--steps {text}: write whole numbers, such as 1000,750,500") from None


def _lora(text: str) -> tuple[Path, float]:
    """The file and scale of `FILE=SCALE`; a file may have an = in its name."""
    file, _, scale = text.rpartition("=")
    if not file or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(file), float(scale)
    except ValueError:
        raise UsageError(f"--lora {text}: {scale!r} is no number; write FILE=0.8") from None
