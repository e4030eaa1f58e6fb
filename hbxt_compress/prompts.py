"""PromptSet: what calibration shows the model: frozen text, a seed, observed steps; maybe clips.

With prompts alone the model denoises each and is observed on its own trajectories. With `clips` it
is shown real ones at the same noise levels, which needs no denoising.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from hbxt_compress import library
from hbxt_compress.errors import RecipeError, listing
from hbxt_compress.json_text import parse_json
from hbxt_compress.strict import Settings, load

__all__ = [
    "ClipFile",
    "Clips",
    "Name",
    "PromptSet",
    "PromptText",
    "Rows",
    "load_prompts",
    "seed_of",
]

_METADATA = ("metadata.csv", "metadata.jsonl")  # as the `videofolder` of `datasets` names them
_FILE_NAME = "file_name"

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=80)]
_MOST_CHARACTERS = 4000
_MOST_ROWS, _MOST_BYTES = 1_000_000, 1 << 28  # of a parquet file, whose few kB may hold terabytes
PromptText = Annotated[str, Field(min_length=1, max_length=_MOST_CHARACTERS)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Rows(Settings):
    """Prompts of a local file that `datasets` reads: lines of text, or a column."""

    file: str
    """path of a .txt, .csv, .jsonl or .parquet file, relative to the YAML file"""
    sha256: _Sha256
    column: str = "caption"
    first: Annotated[int, Field(ge=0)] = 0
    count: Annotated[int, Field(ge=1)]


class ClipFile(Settings):
    """One real clip and what it shows."""

    file: Annotated[str, Field(min_length=1)]
    """a video file's path in the clips' folder"""
    caption: PromptText
    sha256: _Sha256 | None = None
    """of the file, if it must be that one; filled in when the set is loaded"""


class Clips(Settings):
    """Real clips whose noised latents are shown instead of the model's own trajectories."""

    folder: str
    """where the videos are, relative to the YAML file"""
    height: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    """pixels that clips are resized to: the short side fits, the middle of the long one is kept"""
    n_frames: Annotated[int, Field(ge=1)]
    """frames of each clip, from its middle"""
    fps: Annotated[float, Field(gt=0)] | None = None
    """frames a second that are taken; default: the model's own"""
    column: str = "caption"
    """of the folder's metadata.csv or metadata.jsonl, where `files` are not listed"""
    files: tuple[ClipFile, ...] = ()
    """clips and captions; default: those of the folder's metadata, by file_name and column"""


class PromptSet(Settings):
    """Prompts, the seed of their noise, and the steps of each trajectory that are observed."""

    name: Name
    summary: str
    prompts: tuple[PromptText, ...] = ()
    rows: Rows | None = None
    clips: Clips | None = None
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
        given = [bool(self.prompts), self.rows is not None, self.clips is not None]
        if sum(given) != 1:
            raise ValueError("needs exactly one of prompts, rows and clips")
        _check_distinct(self.prompts)
        if self.clips is None:
            self._check_counts(len(self.prompts) if self.rows is None else self.rows.count)
        elif self.clips.files:
            self._check_counts(len(self.clips.files))
        return self

    def _check_counts(self, n_prompts: int) -> None:
        if self.held_out >= n_prompts:
            raise ValueError(f"held_out {self.held_out} leaves none of {n_prompts} to learn from")
        if (self.statistics or 0) > n_prompts - self.held_out:
            raise ValueError(
                f"statistics {self.statistics}: only {n_prompts - self.held_out} of {n_prompts} "
                "prompts are not held out"
            )

    def key(self) -> dict[str, object]:
        """What stands for the set in a result's key: clips by their bytes, wherever they lie."""
        document = {"kind": type(self).__name__, **self.model_dump(mode="json")}
        clips = document.pop("clips")
        if clips is not None:
            del clips["folder"], clips["column"]
            clips["files"] = [[file["caption"], file["sha256"]] for file in clips["files"]]
            document["clips"] = clips
        return document

    def items(self) -> list[tuple[str, int]]:
        """(prompt, seed of its noise) in order."""
        return [(prompt, seed_of(self.seed, prompt)) for prompt in self.prompts]


def seed_of(seed: int, prompt: str) -> int:
    """A stable seed for one prompt, in 0..2^31-1; the same on every machine and in any order."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{prompt}".encode()).digest()[:4], "big") >> 1


def load_prompts(name_or_path: str) -> PromptSet:
    """A prompt set with its text in it; rows of a file are read and replaced by what they say.

    Of clips, the folder is made absolute, every file named with its sha256, prompts the captions.

    Raises:
        RecipeError: the set is not valid, or files that it names are missing or not those.
    """
    path = library.find("calibration", name_or_path)
    found = load(PromptSet, path)
    if found.clips is not None:
        return _with_clips(path, found, found.clips)
    if found.rows is None:
        return found
    texts = _texts(path, found.rows)
    try:
        _check_distinct(texts)
    except ValueError as error:
        raise RecipeError(f"{path}: rows: {path.parent / found.rows.file}: {error}") from error
    return found.model_copy(update={"prompts": texts, "rows": None})


def _texts(path: Path, rows: Rows) -> tuple[str, ...]:
    file = path.parent / rows.file
    if not file.is_file():
        raise RecipeError(f"{path}: rows.file: {file} does not exist")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != rows.sha256:
        raise RecipeError(f"{path}: rows.sha256: {file} has {digest}, not {rows.sha256}")
    end = rows.first + rows.count
    parquet = file.suffix == ".parquet"
    table = _parquet(file, rows.column, end) if parquet else _table(file, rows.column)
    if rows.column not in table:
        raise RecipeError(f"{path}: rows.column: {file} has {list(table)}, not {rows.column!r}")
    texts = table[rows.column]
    if end > len(texts):
        raise RecipeError(
            f"{path}: rows: wants rows {rows.first}..{end - 1} of {len(texts)} in {file}"
        )
    wrong = [
        f"row {i}: {text!r:.60}"
        for i, text in enumerate(texts[rows.first : end], start=rows.first)
        if not isinstance(text, str) or not 1 <= len(text) <= _MOST_CHARACTERS
    ]
    if wrong:
        raise RecipeError(
            f"{path}: rows: {file} has {len(wrong)} that are no text of 1..{_MOST_CHARACTERS} "
            f"characters:\n{listing(wrong)}"
        )
    return tuple(str(text) for text in texts[rows.first : end])


def _with_clips(path: Path, found: PromptSet, clips: Clips) -> PromptSet:
    """The set with every clip found and hashed."""
    try:
        folder = (path.parent / clips.folder).resolve()
    except (ValueError, RuntimeError) as error:  # a NUL in its name, a link to itself
        raise RecipeError(f"{path}: clips.folder: {clips.folder!r}: {error}") from None
    if not folder.is_dir():
        raise RecipeError(f"{path}: clips.folder: {folder} does not exist")
    problems, files = [], list[ClipFile]()
    for wanted in clips.files or _listed(path, folder, clips.column):
        file = folder / wanted.file
        if not file.is_file() or not file.resolve().is_relative_to(folder):  # no loop: it is a file
            problems.append(f"{wanted.file}: no such file in {folder}")
            continue
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if wanted.sha256 not in (None, digest):
            problems.append(f"{wanted.file}: its sha256 is {digest}, not {wanted.sha256}")
        files.append(wanted.model_copy(update={"sha256": digest}))
    digests = [file.sha256 for file in files]
    problems += [f"{f.file}: the same clip stands more than once" for i, f in enumerate(files)
                 if f.sha256 in digests[:i]]  # fmt: skip
    if problems:
        raise RecipeError(f"{path}: clips, {len(problems)} problems:\n{listing(problems)}")
    try:
        found._check_counts(len(files))
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error
    whole = clips.model_copy(update={"folder": str(folder), "files": tuple(files)})
    captions = tuple(file.caption for file in files)
    return found.model_copy(update={"prompts": captions, "clips": whole})


def _listed(path: Path, folder: Path, column: str) -> tuple[ClipFile, ...]:
    """The clips of a folder's metadata, in its order."""
    file = next((folder / name for name in _METADATA if (folder / name).is_file()), None)
    if file is None:
        raise RecipeError(
            f"{path}: clips: {folder} has no {' or '.join(_METADATA)} with {_FILE_NAME} and "
            f"{column}; write one, or list `files` with captions here"
        )
    table = _table(file)
    missing = [name for name in (_FILE_NAME, column) if name not in table]
    if missing:
        raise RecipeError(f"{path}: clips: {file} has {list(table)}, not {', '.join(missing)}")
    found, problems = [], []
    for i, (name, text) in enumerate(zip(table[_FILE_NAME], table[column], strict=True)):
        try:
            found.append(ClipFile(file=str(name or ""), caption=str(text or "")))
        except ValueError:
            problems.append(f"row {i}: {name!r}: {str(text)[:60]!r}")
    if problems or not found:
        raise RecipeError(
            f"{path}: clips: {file} has {len(found)} rows with a {_FILE_NAME} and a {column} of "
            f"1..4000 characters, and {len(problems)} without\n{listing(problems)}"
        )
    return tuple(found)


def _table(file: Path, column: str = "text") -> Mapping[str, list[object]]:
    """The columns of a .csv or .jsonl file, or the lines of a text file as `column`."""
    if file.suffix == ".jsonl":
        return _json_lines(file)
    import datasets  # heavy, and only sets that name a file need it

    csv = file.suffix == ".csv"
    read = datasets.Dataset.from_csv if csv else datasets.Dataset.from_text
    silent, loudness = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()  # reading a list of names is no progress worth a bar
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are told here
    try:
        with tempfile.TemporaryDirectory() as cache:
            table = read(str(file), cache_dir=cache, keep_in_memory=True)
    except Exception as error:  # datasets wraps what each reader raises in errors of its own
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise RecipeError(f"{file}: not readable as {file.suffix} ({reason})") from None
    finally:
        datasets.logging.set_verbosity(loudness)
        if not silent:
            datasets.enable_progress_bars()
    columns = {name: list(table[name]) for name in table.column_names}
    return columns if csv else {column: columns["text"]}


def _json_lines(file: Path) -> Mapping[str, list[object]]:
    """The columns of JSON objects, one a line; None where a line lacks one.

    Not by `datasets`: pyarrow 26's reader ends the process by SIGSEGV on some damaged files.
    """
    rows: list[dict[str, object]] = []
    problems = []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except ValueError as error:
        raise RecipeError(f"{file}: not readable as .jsonl ({error})") from None
    for i, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            problems.append(f"line {i}: {error}")
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            problems.append(f"line {i}: not a JSON object")
    if problems:
        raise RecipeError(f"{file}: not readable as .jsonl:\n{listing(problems)}")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _parquet(file: Path, column: str, n_rows: int) -> Mapping[str, list[object]]:
    """The first rows of a parquet file's column, and the names of the others without theirs."""
    from pyarrow import ArrowException, parquet

    found: list[object] = []
    try:
        with parquet.ParquetFile(file) as opened:
            about = opened.metadata
            n_bytes = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
            if about.num_rows > _MOST_ROWS or n_bytes > _MOST_BYTES:
                raise RecipeError(
                    f"{file}: {about.num_rows:,} rows, {n_bytes:,} bytes once unpacked; at most "
                    f"{_MOST_ROWS:,} and {_MOST_BYTES:,} are read"
                )
            names = opened.schema_arrow.names
            if column in names:
                for batch in opened.iter_batches(64, columns=[column]):
                    found += batch.column(0).to_pylist()
                    if len(found) >= n_rows:
                        break
    except (ArrowException, OSError, ValueError, KeyError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(f"{file}: not readable as .parquet ({reason})") from None
    return {name: found if name == column else [] for name in names}


def _check_distinct(prompts: tuple[str, ...]) -> None:
    twice = sorted({prompt for prompt in prompts if prompts.count(prompt) > 1})
    if twice:
        raise ValueError(f"a prompt stands more than once: {', '.join(map(repr, twice[:5]))}")
