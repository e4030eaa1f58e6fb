"""Smoke: the whole of a recipe on two blocks of a model, before hours are spent on all of them.

The first blocks of each component are written out as a model of their own, as wide as it is, with
three of the prompts, four steps and a small clip. A recipe that cannot be rounded, exported or run
fails here, in minutes.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from hbxt_compress import pipeline
from hbxt_compress.errors import HbxtError, HealthError
from hbxt_compress.formats import FORMATS
from hbxt_compress.geometry import Geometry
from hbxt_compress.layers import matches
from hbxt_compress.machine import Machine
from hbxt_compress.models import Family, family_of
from hbxt_compress.plan import open_choices, refiners_for
from hbxt_compress.prompts import PromptSet, load_prompts
from hbxt_compress.recipe import Recipe
from hbxt_compress.runtime.generate import Runtime
from hbxt_compress.runtime.text import PromptTokenizer
from hbxt_compress.source import Header, Source, locate, read_headers
from hbxt_compress.store import Store

__all__ = ["N_BLOCKS", "Smoke", "shortened", "try_out"]

log = logging.getLogger(__name__)
N_BLOCKS = 2
_N_PROMPTS, _N_STEPS = 3, 4
_TUNED_STEPS = 2  # of a refiner
_PROMPT = "smoke"
_COPIED_AT_ONCE = 1 << 24
_MOST_SIDE, _MOST_FRAMES = 64, 5  # pixels and frames of the clip, where the model takes so few
_GENERATION: Final = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoke:
    """A try that went well. peak_rss_bytes: of this process so far, None where nobody tells."""

    seconds: float
    peak_rss_bytes: int | None

    @property
    def text(self) -> str:
        """In a line."""
        memory = "" if self.peak_rss_bytes is None else f", {self.peak_rss_bytes / 1e9:.2f} GB"
        return f"smoke: {N_BLOCKS} blocks of each component done in {self.seconds:.0f} s{memory}"


def try_out(recipe: Recipe, model: str, root: Path, *, machine: Machine) -> Smoke:
    """Runs a recipe on two blocks of a model, and one step of the artifact.

    root: in it everything is written, and removed again.

    Raises:
        HbxtError: what the whole run would have failed with, sooner or later.
    """
    began = time.monotonic()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix="smoke-") as name:
        folder = Path(name)
        source = locate(model, hashed=False)
        prompts = _few(load_prompts(recipe.calibration))
        short = shortened(source, folder / "model", texts=(*prompts.prompts, "", _PROMPT))
        calibration = folder / "smoke.yaml"
        calibration.write_text(_document(prompts), encoding="utf-8")
        try:
            fitting = _fitting(recipe, source, locate(str(short), hashed=False), calibration)
            artifact = pipeline.compress(
                fitting, str(short), Store(folder / "store"), machine=machine
            )
            _one_step(artifact, machine)
        except HbxtError as error:
            error.add_note(f"found by --smoke, on {N_BLOCKS} blocks of each component")
            raise
    return Smoke(seconds=time.monotonic() - began, peak_rss_bytes=_peak_bytes())


def shortened(source: Source, folder: Path, *, texts: Sequence[str]) -> Path:
    """The first blocks of a model's components as a model in `folder`, and what lies beside them.

    What has no blocks is linked. Of tables of words only those rows are kept that the texts need.
    """
    family = family_of(source)
    folder.mkdir(parents=True)
    tokenize = PromptTokenizer(source.folder / "tokenizer", family.text_length(source))
    n_words = 1 + max(int(tokenize(text)[0].max()) for text in texts)
    for component, depth in family.depths.items():
        if component not in family.components(source):
            continue
        headers = read_headers(source.folder / component)
        config = source.config(f"{component}/config.json")
        n_rows = dict.fromkeys(depth.tables, n_words)
        kept = {
            name: header
            for name, header in headers.items()
            if not name.startswith(depth.prefix)
            or int(name.removeprefix(depth.prefix).split(".")[0]) < N_BLOCKS
        }
        (folder / component).mkdir()
        _write_first_rows(folder / component / "model.safetensors", kept, n_rows)
        config[depth.count] = min(N_BLOCKS, config[depth.count])
        if depth.tables:
            config[depth.rows] = min(n_words, config[depth.rows])
        _write_json(folder / component / "config.json", config)
    for name in source.files:
        if Path(name).parts[0] not in family.depths:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to((source.folder / name).resolve())
    generation = folder / _GENERATION
    known = json.loads(generation.read_text(encoding="utf-8")) if generation.exists() else {}
    generation.unlink(missing_ok=True)
    size = _small(family, source)
    known |= {"height": size.height, "width": size.width, "num_frames": size.n_frames}
    known |= {"num_inference_steps": _N_STEPS}
    _write_json(generation, known)
    return folder


def _write_first_rows(path: Path, headers: dict[str, Header], n_rows: dict[str, int]) -> None:
    """Tensors as they are in their files, but for those of which only the first rows are kept."""
    document: dict[str, object] = {"__metadata__": {"format": "pt"}}
    parts: list[tuple[Header, int]] = []
    end = 0
    for name, header in headers.items():
        shape, rows = list(header.shape), n_rows.get(name)
        if rows is not None:
            shape[0] = min(rows, shape[0])
        size = header.n_bytes * int(np.prod(shape)) // max(1, int(np.prod(header.shape)))
        document[name] = {
            "dtype": header.dtype, "shape": shape, "data_offsets": [end, end + size],
        }  # fmt: skip
        parts.append((header, size))
        end += size
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for header, size in parts:
            with header.file.open("rb") as file:
                file.seek(header.offset)
                for start in range(0, size, _COPIED_AT_ONCE):
                    out.write(file.read(min(_COPIED_AT_ONCE, size - start)))


def _small(family: Family, source: Source) -> Geometry:
    """A clip as small as the model takes, or its own if that is smaller."""
    own = family.geometry(source)
    for side in (_MOST_SIDE, 2 * _MOST_SIDE, 4 * _MOST_SIDE):
        size = Geometry(
            height=min(side, own.height),
            width=min(side, own.width),
            n_frames=min(_MOST_FRAMES, own.n_frames),
            fps=own.fps,
        )
        try:
            family.tokens(source, size)
        except HbxtError:
            continue
        return size
    return own


def _few(prompts: PromptSet) -> PromptSet:
    """The first prompts or clips and, if there are any, one held-out one; the first and last step.

    Both experts of a model with two are observed so.
    """
    n, held_out = len(prompts.prompts), min(1, prompts.held_out)
    chosen = [*range(min(_N_PROMPTS - held_out, n - held_out)), *range(n - held_out, n)]
    n_steps = min(_N_STEPS, prompts.n_steps)
    clips = prompts.clips
    return prompts.model_copy(
        update={
            "prompts": tuple(prompts.prompts[i] for i in chosen),
            "clips": clips and clips.model_copy(
                update={"files": tuple(clips.files[i] for i in chosen)}
            ),
            "n_steps": n_steps,
            "observe": tuple(sorted({0, n_steps - 1})),
            "held_out": held_out,
            "statistics": None,
        }
    )  # fmt: skip


def _document(prompts: PromptSet) -> str:
    """A prompt set as JSON, which is YAML."""
    document = prompts.model_dump(mode="json", exclude_none=True)
    document.pop("prompts" if prompts.clips is not None else "clips", None)
    return json.dumps(document)


def _fitting(recipe: Recipe, source: Source, short: Source, calibration: Path) -> Recipe:
    """The recipe for a model of a few blocks: the same formats and algorithms, few steps of them.

    Rules for blocks that are not there are left out, and refiners that the whole model leaves out.
    Nothing is distilled, and no decoder trained: a few blocks have nothing to teach.
    """
    family = family_of(source)
    names = [spec.name for spec in family.layers(short)]
    taken, _ = refiners_for(recipe, family.layers(source), family.parameters(source))
    refine = tuple(
        one.model_copy(update={"n_steps": min(one.n_steps, _TUNED_STEPS)})
        if hasattr(one, "n_steps") else one
        for one in taken
    )  # fmt: skip
    rules = tuple(rule for rule in recipe.rules if any(matches(rule.match, name) for name in names))
    changed = {
        "rules": rules, "refine": refine, "calibration": str(calibration), "distill": (),
        "decoder": None,
    }  # fmt: skip
    short_recipe = recipe.model_copy(update=changed)
    if recipe.budget is None:
        return short_recipe
    choices = open_choices(short_recipe, family.layers(short))
    if not choices:
        return short_recipe.model_copy(update={"budget": None})
    # what the first format of each takes, and a little more: the least that any budget allows
    n_bytes = sum(
        min(FORMATS[name].bytes(one.spec.shape) for name in one.formats) for one in choices
    )
    bits = 8 * n_bytes / sum(one.spec.n_weights for one in choices)
    return short_recipe.model_copy(update={"budget": f"{1.02 * bits + 0.01:.4f} bits"})


def _one_step(artifact: Path, machine: Machine) -> None:
    """Opens every graph of an artifact: a clip of one step."""
    with Runtime.open(artifact, provider="cpu", n_threads=machine.n_threads) as runtime:
        latents = runtime.denoise(_PROMPT, n_steps=1)
        finite = all(np.isfinite(frame).all() for frame in runtime.frames(latents))
        if not (finite and np.isfinite(latents).all()):
            raise HealthError(f"{artifact}: one step gives values that are not finite")


def _peak_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
