from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from hbxt_compress.errors import RecipeError
from hbxt_compress.prompts import PromptSet, load_prompts, seed_of

_SET = "name: mine\nsummary: s\nseed: 1\nn_steps: 4\nobserve: [0, 3]\n"


def _write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_seeds_are_stable_and_do_not_depend_on_order(tmp_path: Path) -> None:
    forward = load_prompts(_write(tmp_path, _SET + "prompts: [a, b, c]\n")).items()
    back = load_prompts(_write(tmp_path, _SET + "prompts: [c, b, a]\n")).items()
    assert forward == back[::-1]
    assert len({seed for _, seed in forward}) == 3
    # the literal definition, which must never change: clips are found by it
    digest = hashlib.sha256(b"1:a").hexdigest()
    assert seed_of(1, "a") == int(digest[:8], 16) // 2
    assert seed_of(2, "a") != seed_of(1, "a")
    assert all(0 <= seed < 2**31 for _, seed in forward)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompts: [a, a]\n", "more than once: 'a'"),
        ("prompts: []\n", "exactly one of prompts, rows"),
        ("prompts: ['']\n", r"prompts\[0\]"),
        (
            "prompts: [a]\nrows: {file: x.txt, sha256: " + "a" * 64 + ", count: 1}\n",
            "exactly one of",
        ),
    ],
)
def test_prompts_that_make_no_sense_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        load_prompts(_write(tmp_path, _SET + text))


@pytest.mark.parametrize("observe", ["[0, 4]", "[-1, 2]", "[2, 1]", "[1, 1]"])
def test_observed_steps_must_rise_within_the_trajectory(tmp_path: Path, observe: str) -> None:
    text = _SET.replace("[0, 3]", observe) + "prompts: [a]\n"
    with pytest.raises(RecipeError, match=r"observe must rise within 0\.\.3"):
        load_prompts(_write(tmp_path, text))


def test_statistics_need_prompts_that_are_not_held_out(tmp_path: Path) -> None:
    text = _SET + "held_out: 1\nprompts: [a, b, c]\n"
    assert load_prompts(_write(tmp_path, text)).statistics is None
    assert load_prompts(_write(tmp_path, text + "statistics: 2\n")).statistics == 2
    with pytest.raises(RecipeError, match="statistics 3: only 2 of 3 prompts are not held out"):
        load_prompts(_write(tmp_path, text + "statistics: 3\n"))


def test_the_wide_set_begins_and_ends_as_the_standard_one() -> None:
    """So that layers' statistics and what is chosen on held-out prompts are the same under both."""
    wide, standard = load_prompts("wide"), load_prompts("standard")
    n = wide.statistics
    assert n == len(standard.prompts) - standard.held_out
    assert wide.held_out == standard.held_out
    assert wide.items()[:n] == standard.items()[:n]
    assert wide.items()[-wide.held_out :] == standard.items()[n:]
    assert (wide.n_steps, wide.observe) == (standard.n_steps, standard.observe)


def _rows(folder: Path, file: str, more: str = "count: 2") -> str:
    digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    return _write(folder, _SET + f"rows: {{file: {file}, sha256: {digest}, first: 1, {more}}}\n")


def test_rows_of_a_text_file_become_the_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    found = load_prompts(_rows(tmp_path, "p.txt"))
    assert found.prompts == ("two", "three")
    assert found.rows is None
    plain = load_prompts(_write(tmp_path, _SET + "prompts: [two, three]\n"))
    assert found.digest == plain.digest  # the digest is of what is said, not of where it stood


def test_rows_of_a_parquet_column_become_the_prompts(tmp_path: Path) -> None:
    from datasets import Dataset

    table = {"id": [1, 2, 3], "caption": ["x", "y", "z"]}
    Dataset.from_dict(table).to_parquet(str(tmp_path / "p.parquet"))
    assert load_prompts(_rows(tmp_path, "p.parquet")).prompts == ("y", "z")
    with pytest.raises(RecipeError, match=r"rows.column: .*\['id', 'caption'\], not 'text'"):
        load_prompts(_rows(tmp_path, "p.parquet", "count: 2, column: text"))


def test_rows_that_are_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    with pytest.raises(RecipeError, match=r"wants rows 1\.\.2 of 2"):
        load_prompts(_rows(tmp_path, "p.txt"))
    path = _rows(tmp_path, "p.txt", "count: 1")
    (tmp_path / "p.txt").write_text("other\ntwo\n")
    with pytest.raises(RecipeError, match=r"rows\.sha256"):
        load_prompts(path)
    (tmp_path / "p.txt").unlink()
    with pytest.raises(RecipeError, match="does not exist"):
        load_prompts(path)


def test_a_set_without_prompts_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="exactly one of prompts, rows"):
        PromptSet(name="x", summary="", seed=0, n_steps=1, observe=(0,))


_CLIPS = "clips: {folder: clips, height: 32, width: 32, n_frames: 5"


def _folder(at: Path, metadata: str | None = None, name: str = "metadata.csv") -> Path:
    """Files that nobody decodes here: a set looks at names and bytes alone."""
    folder = at / "clips"
    folder.mkdir()
    for file in ("b.mp4", "a.mkv", "c.mp4"):
        (folder / file).write_bytes(file.encode())
    if metadata is not None:
        (folder / name).write_text(metadata)
    return folder


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_clips_of_a_folder_come_with_their_captions(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [("b.mp4", "two, of one"), ("a.mkv", "one")]
    text = "file_name,caption,more\n" + "".join(f'{file},"{what}",1\n' for file, what in rows)
    if name.endswith("jsonl"):
        lines = [json.dumps({"file_name": file, "caption": what}) for file, what in rows]
        text = "\n".join(lines)
    folder = _folder(tmp_path, text, name)
    found = load_prompts(_write(tmp_path, _SET + "held_out: 1\n" + _CLIPS + "}\n"))
    assert found.prompts == ("two, of one", "one")
    assert found.clips is not None
    assert found.clips.folder == str(folder)
    expected = [(file, what, hashlib.sha256(file.encode()).hexdigest()) for file, what in rows]
    assert [(f.file, f.caption, f.sha256) for f in found.clips.files] == expected
    assert capfd.readouterr() == ("", "")


def test_clips_may_be_listed_with_the_bytes_they_must_have(tmp_path: Path) -> None:
    _folder(tmp_path)
    digest = hashlib.sha256(b"c.mp4").hexdigest()
    files = "files: [{file: c.mp4, caption: x, sha256: %s}, {file: a.mkv, caption: x}]}\n"
    found = load_prompts(_write(tmp_path, _SET + f"{_CLIPS}, " + files % digest))
    assert found.prompts == ("x", "x")
    other = _write(tmp_path, _SET + f"{_CLIPS}, " + files % ("a" * 64))
    with pytest.raises(RecipeError, match=rf"c\.mp4: its sha256 is {digest}, not aaa"):
        load_prompts(other)


@pytest.mark.parametrize(
    ("metadata", "more", "expected"),
    [
        (None, "}", r"has no metadata\.csv or metadata\.jsonl"),
        ("file_name,text\nb.mp4,x\n", "}", r"has \['file_name', 'text'\], not caption"),
        ("file_name,caption\nb.mp4,x\nc.mp4,\n", "}", r"1 without\s+row 1: 'c\.mp4'"),
        ("file_name,caption\nz.mp4,x\nb.mp4,y\ny.mp4,y\n", "}", r"2 problems:\s+z.mp4: no.*\s+y"),
        ("file_name,caption\nb.mp4,x\nb.mp4,y\n", "}", r"b\.mp4: the same clip .* more than once"),
        ("file_name,caption\n../mine.yaml,x\n", "}", r"\.\./mine\.yaml: no such file in"),
        ("file_name,caption\nb.mp4,x\n", "}\nheld_out: 1", r"held_out 1 leaves none of 1"),
        ("file_name,caption\nb.mp4,x\n", "}\nstatistics: 2", r"statistics 2: only 1 of 1"),
        ('"', "}", r"metadata\.csv: not readable as \.csv"),
        (None, ", files: [{file: q.mp4, caption: x}]}", r"q\.mp4: no such file in"),
        (None, ", files: [{file: b.mp4}]}", r"clips\.files\[0\]\.caption: missing"),
        (None, ", frames: 3}", r"clips\.frames: unknown key \(did you mean 'n_frames'"),
        (None, ", fps: 0.0}", r"clips\.fps"),
        (None, "}\nprompts: [a]", "exactly one of prompts, rows and clips"),
    ],
)
def test_clips_that_make_no_sense_are_refused(
    metadata: str | None, more: str, expected: str, tmp_path: Path
) -> None:
    _folder(tmp_path, metadata)
    with pytest.raises(RecipeError, match=expected):
        load_prompts(_write(tmp_path, _SET + _CLIPS + more + "\n"))


def test_a_folder_of_clips_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"clips\.folder: .*clips does not exist"):
        load_prompts(_write(tmp_path, _SET + _CLIPS + "}\n"))


def test_a_set_without_clips_is_filed_as_it_was_before_there_were_any(tmp_path: Path) -> None:
    found = load_prompts(_write(tmp_path, _SET + "prompts: [a]\n"))
    assert found.key() == {
        "kind": "PromptSet", "name": "mine", "summary": "s", "prompts": ["a"], "rows": None,
        "seed": 1, "n_steps": 4, "observe": [0, 3], "held_out": 0, "statistics": None,
    }  # fmt: skip


def _table(folder: Path, columns: dict[str, Any], **how: Any) -> None:
    parquet.write_table(pyarrow.table(columns), folder / "rows.parquet", **how)


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        ([None, "b"], "has 1 that are no text of 1..4000 characters:\n  row 1: None"),
        ([1, 2], "row 1: 1\n  row 2: 2"),
        (["", "b"], "row 1: ''"),
        (["x" * 4001, "b"], "has 1 that are no text"),
    ],
)
def test_rows_that_are_no_prompts_are_named(
    tmp_path: Path, texts: list[object], problem: str
) -> None:
    _table(tmp_path, {"caption": ["passed over" if isinstance(texts[1], str) else 0, *texts]})
    path = _rows(tmp_path, "rows.parquet")
    with pytest.raises(RecipeError) as refused:
        load_prompts(path)
    assert problem in str(refused.value)
    assert "rows.parquet" in str(refused.value)


def test_a_small_file_of_a_million_million_rows_is_not_unpacked(tmp_path: Path) -> None:
    once = pyarrow.array(["a clip"]).dictionary_encode()
    many = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array(np.zeros(1_000_001, np.int32)), once.dictionary
    )
    _table(tmp_path, {"caption": many})
    assert (tmp_path / "rows.parquet").stat().st_size < 10_000
    with pytest.raises(RecipeError, match=r"rows\.parquet: 1,000,001 rows"):
        load_prompts(_rows(tmp_path, "rows.parquet", "count: 2"))
    _table(tmp_path, {"caption": ["x" * 300_000_000]}, compression="zstd", write_statistics=False)
    with pytest.raises(
        RecipeError, match=r"rows\.parquet: 1 rows, 300,000,\d+ bytes once unpacked"
    ):
        load_prompts(_rows(tmp_path, "rows.parquet", "count: 1"))


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    clips = 'clips: {folder: "a\\0b", height: 32, width: 32, n_frames: 5}\n'
    with pytest.raises(RecipeError, match=r"clips\.folder: 'a.x00b': embedded null"):
        load_prompts(_write(tmp_path, _SET + clips))
    with pytest.raises(RecipeError, match="no name of a file"):
        load_prompts("a\0b/set.yaml")
