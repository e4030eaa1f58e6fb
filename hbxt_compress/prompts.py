"""PromptSet: what calibration shows the model, as frozen text with a seed and observed steps."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from hbxt_compress import library
from hbxt_compress.errors import RecipeError
from hbxt_compress.strict import Settings, load

__all__ = ["Name", "PromptSet", "PromptText", "Rows", "load_prompts", "seed_of"]

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=80)]
PromptText = Annotated[str, Field(min_length=1, max_length=4000)]


class Rows(Settings):
    """Prompts of a local file that `datasets` reads: lines of text, or a Parquet column."""

    file: str
    """path of a .txt or .parquet file, relative to the YAML file"""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    column: str = "caption"
    first: Annotated[int, Field(ge=0)] = 0
    count: Annotated[int, Field(ge=1)]


class PromptSet(Settings):
    """Prompts, the seed of their noise, and the steps of each trajectory that are observed."""

    name: Name
    summary: str
    prompts: tuple[PromptText, ...] = ()
    rows: Rows | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    n_steps: Annotated[int, Field(ge=1, le=1000)]
    """denoising steps of each trajectory"""
    observe: Annotated[tuple[int, ...], Field(min_length=1)]
    """indices of the steps whose layer inputs are gathered, 0 the noisiest"""
    held_out: Annotated[int, Field(ge=0)] = 0
    """how many of the last prompts algorithms choose with instead of learning from them"""
    statistics: Annotated[int, Field(ge=1)] | None = None
    """how many of the first prompts layers' statistics are summed over; tuning learns from all"""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        wrong = [step for step in self.observe if not 0 <= step < self.n_steps]
        if wrong or list(self.observe) != sorted(set(self.observe)):
            raise ValueError(
                f"observe must rise within 0..{self.n_steps - 1}, not {list(self.observe)}"
            )
        if bool(self.prompts) == (self.rows is not None):
            raise ValueError("needs either prompts or rows, and not both")
        n_prompts = len(self.prompts) if self.rows is None else self.rows.count
        if self.held_out >= n_prompts:
            raise ValueError(f"held_out {self.held_out} leaves none of {n_prompts} to learn from")
        if (self.statistics or 0) > n_prompts - self.held_out:
            raise ValueError(
                f"statistics {self.statistics}: only {n_prompts - self.held_out} of {n_prompts} "
                "prompts are not held out"
            )
        _check_distinct(self.prompts)
        return self

    def items(self) -> list[tuple[str, int]]:
        """(prompt, seed of its noise) in order."""
        return [(prompt, seed_of(self.seed, prompt)) for prompt in self.prompts]


def seed_of(seed: int, prompt: str) -> int:
    """A stable seed for one prompt, in 0..2^31-1; the same on every machine and in any order."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{prompt}".encode()).digest()[:4], "big") >> 1


def load_prompts(name_or_path: str) -> PromptSet:
    """A prompt set with its text in it; rows of a file are read and replaced by what they say."""
    path = library.find("calibration", name_or_path)
    found = load(PromptSet, path)
    if found.rows is None:
        return found
    texts = _texts(path, found.rows)
    try:
        _check_distinct(texts)
    except ValueError as error:
        raise RecipeError(f"{path}: rows: {error}") from error
    return found.model_copy(update={"prompts": texts, "rows": None})


def _texts(path: Path, rows: Rows) -> tuple[str, ...]:
    file = path.parent / rows.file
    if not file.is_file():
        raise RecipeError(f"{path}: rows.file: {file} does not exist")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != rows.sha256:
        raise RecipeError(f"{path}: rows.sha256: {file} has {digest}, not {rows.sha256}")
    from datasets import Dataset  # heavy, and only sets that name a file need it

    with tempfile.TemporaryDirectory() as cache:
        if file.suffix == ".parquet":
            table = Dataset.from_parquet(str(file), cache_dir=cache, keep_in_memory=True)
        else:
            table = Dataset.from_text(str(file), cache_dir=cache, keep_in_memory=True)
            table = table.rename_column("text", rows.column)
    if rows.column not in table.column_names:
        raise RecipeError(
            f"{path}: rows.column: {file} has {table.column_names}, not {rows.column!r}"
        )
    end = rows.first + rows.count
    if end > len(table):
        raise RecipeError(f"{path}: rows: wants rows {rows.first}..{end - 1} of {len(table)}")
    return tuple(str(text) for text in table[rows.column][rows.first : end])


def _check_distinct(prompts: tuple[str, ...]) -> None:
    twice = sorted({prompt for prompt in prompts if prompts.count(prompt) > 1})
    if twice:
        raise ValueError(f"a prompt stands more than once: {', '.join(map(repr, twice[:5]))}")
