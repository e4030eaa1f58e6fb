"""Import: a model folder whose transformer comes from a checkpoint of others, LoRAs merged into it.

Configuration, text encoder, tokenizer and VAE are the base's. Names become diffusers', dtypes stay;
one tensor at a time is in memory. The folder has its name only once it is whole.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from hbxt_compress import disk
from hbxt_compress.checkpoint import Checkpoint, Stored, bare
from hbxt_compress.errors import SourceError, UsageError, listing
from hbxt_compress.journal import file_sha256
from hbxt_compress.licences import licence_files
from hbxt_compress.lora import Lora
from hbxt_compress.models import family_of
from hbxt_compress.sampler import STUDENTS_SAMPLER, SamplerSpec
from hbxt_compress.source import Source
from hbxt_compress.tensor_file import write_tensors
from hbxt_compress.weights import DTYPES

__all__ = ["IMPORTED", "import_model"]

IMPORTED: Final = "imported.json"
"""in an imported folder: files with sha256, LoRAs with their scales, steps and shift"""
_INTO: Final = "transformer"
_WEIGHTS: Final = "diffusion_pytorch_model.safetensors"
_FLOATS: Final = ("F32", "F16", "BF16")
log = logging.getLogger(__name__)


def import_model(
    base: Source,
    out: Path,
    *,
    checkpoint: Path | None = None,
    part: str | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    steps: Sequence[int] = (),
    shift: float | None = None,
) -> Path:
    """Writes `out`, a whole model folder with `imported.json`, and returns it.

    checkpoint: None merges the LoRAs (files and scales) into the base's own transformer. part: of
    several models in it, which. steps: timesteps that it was distilled to, written as its sampler
    with their shift (None: 5); none: the base's sampler stays.

    Raises:
        UsageError: nothing to import, or `out` exists.
        SourceError: tensors are missing, unknown, of another shape or not finite; all are named.
        DiskFull: the folder does not fit.
    """
    _require_sense(out, checkpoint, loras, steps, shift)
    family = family_of(base)
    if "transformer_2" in family.components(base):
        raise SourceError(
            f"{base.folder}: has two experts; a checkpoint replaces a model's only one"
        )
    sampler = None
    if steps:
        n = family.sampler(base).n_train_timesteps
        sampler = SamplerSpec.distilled(steps, 5.0 if shift is None else shift, n_train_timesteps=n)
    shapes = family.expected(base, _INTO)
    spellings = {name: name for name in shapes} | {family.original_name(n): n for n in shapes}
    opened = Checkpoint.open(checkpoint or base.folder / _INTO, part)
    tensors = _matched(opened, shapes, spellings)
    merged = [Lora.open(path, scale, shapes, spellings) for path, scale in loras]
    used = [opened, *(one.checkpoint for one in merged)]
    told = _told(base, opened, merged, sampler)
    fresh = out.with_name(f".{out.name}.new")
    disk.remove(fresh)
    copied = _copied(base, opened.path if checkpoint else None)
    n_bytes = sum(math.prod(one.shape) * DTYPES[one.dtype].itemsize for one in tensors.values())
    n_bytes += sum(path.stat().st_size for path in copied.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with disk.writing(out, needs_bytes=n_bytes, remedy="make room, or give an --out elsewhere"):
            for i, (name, path) in enumerate(copied.items()):
                log.info("import: %s", name, extra={"progress": (i, len(copied), "copy")})
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                with disk.reading(path):
                    shutil.copyfile(path, fresh / name)
            log.info("import: copied", extra={"progress": (len(copied), len(copied), "copy")})
            _write_weights(fresh / _INTO / _WEIGHTS, tensors, merged, opened.path)
            for one in used:
                one.require_unchanged()
            _write_json(fresh / IMPORTED, told)
            if sampler:
                _write_json(fresh / STUDENTS_SAMPLER, sampler.to_json())
            disk.sync(fresh)
        _require_absent(out)
        disk.put(fresh, out)
    except BaseException:
        disk.remove(fresh)
        raise
    return out


def _require_sense(
    out: Path,
    checkpoint: Path | None,
    loras: Sequence[tuple[Path, float]],
    steps: Sequence[int],
    shift: float | None,
) -> None:
    _require_absent(out)
    if checkpoint is None and not loras:
        raise UsageError("nothing to import: give a CHECKPOINT, --lora FILE, or both")
    if shift is not None and not steps:
        raise UsageError(f"--shift {shift:g}: of which steps? say --steps 1000,750,500, too")
    if bad := [f"{path}={scale}" for path, scale in loras if not math.isfinite(scale)]:
        raise UsageError(f"a LoRA's scale must be a finite number:\n{listing(bad)}")


def _require_absent(out: Path) -> None:
    if out.exists():
        raise UsageError(f"{out}: exists and is not overwritten; give another --out or remove it")


def _matched(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], spellings: Mapping[str, str]
) -> dict[str, Stored]:
    """The checkpoint's tensors by diffusers' names, sure to be just those that are expected."""
    found: dict[str, Stored] = {}
    problems = []
    for key, stored in checkpoint.tensors.items():
        name = spellings.get(bare(key))
        if name is None:
            problems.append(f"unexpected: {key}")
        elif name in found:
            problems.append(f"{key}: a second one for {name}")
        elif stored.shape != shapes[name]:
            problems.append(f"{key}: has shape {list(stored.shape)}, expected {list(shapes[name])}")
        elif stored.dtype not in _FLOATS:
            problems.append(f"{key}: is {stored.dtype}, expected one of {', '.join(_FLOATS)}")
        if name is not None:
            found[name] = stored
    own = {name: spelt for spelt, name in spellings.items()}
    problems += [f"missing: {own[name]}" for name in shapes if name not in found]
    if problems:
        raise SourceError(
            f"{checkpoint.path}: {len(problems)} tensors are not as the base's "
            f"{_INTO}/config.json has them; is it the same model?\n{listing(problems)}"
        )
    return found


def _write_weights(
    path: Path, tensors: Mapping[str, Stored], loras: Sequence[Lora], checkpoint: Path
) -> None:
    problems: list[str] = []
    done = 0

    def read(name: str) -> Tensor:
        nonlocal done
        tensor = tensors[name].read()
        if not _finite(tensor):
            problems.append(f"{name}: holds NaN or infinity")
        elif any(name in lora.names for lora in loras):
            added = tensor.float()
            for lora in loras:
                added = lora.added(name, added)
            tensor = added.to(tensor.dtype)
            if not _finite(tensor):
                added_to = [one.checkpoint.path.name for one in loras if name in one.names]
                problems.append(
                    f"{name}: holds NaN or infinity once {', '.join(added_to)} is added"
                )
        done += 1
        log.info("import: %s", name, extra={"progress": (done, len(tensors), "import")})
        return tensor

    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {name: (one.dtype, one.shape) for name, one in tensors.items()}, read)
    if problems:
        raise SourceError(
            f"{checkpoint}: weights that cannot be used; download them again:\n{listing(problems)}"
        )


def _finite(tensor: Tensor) -> bool:
    return not tensor.numel() or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def _copied(base: Source, checkpoint: Path | None) -> dict[str, Path]:
    """What goes into the folder as it is: path there -> file."""
    found: dict[str, Path] = dict(base.licences)
    for name in base.files:
        path = base.folder / name
        weights = path.parent == base.folder / _INTO and name.endswith(
            (".safetensors", ".index.json")
        )
        if not weights and name != IMPORTED:
            found[name] = path
    if checkpoint is not None:
        beside = checkpoint if checkpoint.is_dir() else checkpoint.parent
        for name, path in licence_files(beside).items():
            found[f"checkpoint-{name}" if name in found else name] = path
    return found


def _told(
    base: Source, checkpoint: Checkpoint, loras: Sequence[Lora], sampler: SamplerSpec | None
) -> dict[str, object]:
    """What `imported.json` says: names without folders, so that it is the same elsewhere."""
    before = base.config(IMPORTED) if IMPORTED in base.files else None
    return {
        "base": {"model": base.model, "imported": before},
        "weights": {
            "name": checkpoint.path.name,
            "part": checkpoint.part,
            "files": _digests(checkpoint),
        },
        "loras": [
            {
                "name": one.checkpoint.path.name,
                "scale": one.scale,
                "files": _digests(one.checkpoint),
            }
            for one in loras
        ],
        "sampler": sampler.to_json() if sampler else None,
    }


def _digests(checkpoint: Checkpoint) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for i, (file, (n_bytes, _)) in enumerate(checkpoint.stamps.items(), 1):
        found.append({"name": file.name, "bytes": n_bytes, "sha256": file_sha256(file)})
        log.info("import: %s", file, extra={"progress": (i, len(checkpoint.stamps), "hash")})
    return found


def _write_json(path: Path, document: Mapping[str, object]) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
