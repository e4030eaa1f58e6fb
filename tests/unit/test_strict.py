from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from hbxt_compress.errors import RecipeError
from hbxt_compress.strict import Settings, did_you_mean, load, one_of


class Slow(Settings):
    damping: float = 0.01
    order: Literal["ascending", "natural"] = "natural"
    levels: tuple[int, ...] = ()


class Fast(Settings):
    pass


How = one_of({"slow": Slow, "fast": Fast})


class Part(Settings):
    name: str
    size: int = 1


class Whole(Settings):
    name: str
    ratio: float = 1.0
    loud: bool = True
    how: How | None = None
    many: tuple[How, ...] = ()
    parts: Annotated[tuple[Part, ...], Field(max_length=3)] = ()
    limits: dict[str, float] = {}  # noqa: RUF012


def _write(folder: Path, text: str) -> Path:
    path = folder / "whole.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _problems(folder: Path, text: str) -> list[str]:
    """The messages of an invalid file, each as 'line: rest'."""
    path = _write(folder, text)
    with pytest.raises(RecipeError) as caught:
        load(Whole, path)
    return [line.removeprefix(f"{path}:") for line in str(caught.value).splitlines()]


def test_values_reach_the_model_with_their_types(tmp_path: Path) -> None:
    text = "name: a\nratio: 2\nloud: false\nmany: [{use: slow, levels: [1, 2]}, {use: fast}]\n"
    found = load(Whole, _write(tmp_path, text + "parts:\n  - {name: x, size: 3}\n"))
    assert (found.name, found.ratio, found.loud) == ("a", 2.0, False)
    assert found.many == (Slow(levels=(1, 2)), Fast())
    assert found.parts == (Part(name="x", size=3),)


def test_a_choice_is_dumped_with_its_name_and_changes_the_digest(tmp_path: Path) -> None:
    slow = load(Whole, _write(tmp_path, "name: a\nmany: [{use: slow}]\n"))
    fast = load(Whole, _write(tmp_path, "name: a\nmany: [{use: fast}]\n"))
    assert fast.model_dump(mode="json")["many"] == [{"use": "fast"}]
    assert len(slow.digest) == 64
    assert slow.digest != fast.digest


def test_the_digest_ignores_order_and_spelt_out_defaults(tmp_path: Path) -> None:
    short = load(Whole, _write(tmp_path, "name: a\nmany: [{use: slow}]\n"))
    long = load(
        Whole,
        _write(tmp_path, "many:\n- damping: 1.0e-2\n  use: slow\nratio: 1.0\nname: 'a' # same\n"),
    )
    assert short == long
    assert short.digest == long.digest


def test_aliases_are_fine(tmp_path: Path) -> None:
    text = "name: a\nparts: [&one {name: x}, *one]\n"
    assert load(Whole, _write(tmp_path, text)).parts == (Part(name="x"),) * 2


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Part(name="x").name = "y"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ratio: 1.0\n", "1: name: missing; this key is required"),
        ("name: a\nratoi: 1.0\n", "2: ratoi: unknown key (did you mean 'ratio'?)"),
        ("name: a\nname: b\n", "2: name: duplicate key"),
        ("name: 3\n", "1: name: must be text, not 3"),
        ("name:\n", "1: name: must be text, not empty"),
        ("name: a\nratio: 1e-3\n", "2: ratio: '1e-3' is text to YAML; write 1.0e-3"),
        ("name: a\nratio: 2.5e3\n", "2: ratio: '2.5e3' is text to YAML; write 2.5e+3"),
        ("name: a\nratio: '7'\n", "2: ratio: '7' is text to YAML; write 7"),
        ("name: a\nratio: fast\n", "2: ratio: must be a number, not 'fast'"),
        ("name: a\nratio: .nan\n", "2: ratio: .nan is not a finite number"),
        ("name: a\nratio: 1.0e+999\n", "2: ratio: 1.0e+999 is not a finite number"),
        ("name: no\n", "1: name: YAML reads no as false"),
        ("name: a\nloud: yes\n", "2: loud: YAML reads yes as true"),
        ("name: 2024-01-02\n", "1: name: '2024-01-02' is a date to YAML"),
        ("name: a\nparts: [{name: b, size: 012}]\n", "2: parts[0].size: YAML reads 012 as 10"),
        ("name: a\nparts: [{name: b, size: 1_0}]\n", "2: parts[0].size: YAML reads 1_0 as 10"),
        ("name: a\nparts: [{name: b, size: 1.5}]\n", "2: parts[0].size: must be a whole number"),
        ("name: a\nlimits: {x: 12:30}\n", "2: limits.x: YAML reads 12:30 as 750"),
        ("name: a\nparts: {name: b}\n", "2: parts: must be a list"),
        ("name: a\nparts:\n  - 3\n", "3: parts[0]: must be a mapping, not 3"),
        ("name: a\nlimits: {1: 2.0}\n", "2: limits: the key '1' is not text"),
        ("name: a\nmany:\n  - use: slwo\n", "3: many[0].use: unknown name 'slwo' (did you mean 's"),
        ("name: a\nmany:\n  - {damping: 1.0}\n", "3: many[0].use: must be a mapping that names"),
        ("name: a\nmany: [{use: slow, dmaping: 1.0}]\n", "2: many[0].dmaping: unknown key (did "),
        (
            "name: a\nmany:\n  - use: slow\n    order: naturl\n",
            "4: many[0].order: must be 'ascending' or 'natural', not 'naturl' (did you mean 'nat",
        ),
        ("name: !!python/name:os.system x\n", "1: name: 'x' is of the custom tag"),
        ("name: !mine a\n", "1: name: 'a' is of the custom tag !mine"),
        ("name: a\nparts: !mine []\n", "2: parts: custom tag !mine is not allowed"),
        ("name: a\nmany: &loop [*loop]\n", "2: many[0]: an alias that contains itself"),
    ],
)
def test_every_problem_has_its_line_and_a_remedy(tmp_path: Path, text: str, expected: str) -> None:
    problems = _problems(tmp_path, text)
    assert len(problems) == 1, problems
    assert problems[0].startswith(expected)


def test_all_problems_are_reported_at_once_and_in_order(tmp_path: Path) -> None:
    text = "nmae: a\nratio: 1e1\nparts:\n  - {name: 3}\n  - {size: x}\nhow: 1\nmany: [{use: q}]\n"
    found = _problems(tmp_path, text)
    wanted = [
        "1: name: missing", "1: nmae: unknown", "2: ratio: ", "4: parts[0].name",
        "5: parts[1].name: missing", "5: parts[1].size", "6: how", "7: many[0].use: unknown",
    ]  # fmt: skip
    assert len(found) == len(wanted), found
    assert all(line.startswith(start) for line, start in zip(found, wanted, strict=True)), found


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty"),
        (b"# only a comment\n", "the file is empty"),
        (b"- a\n- b\n", ":1: must be a mapping"),
        (b"name: a\n\tratio: 1\n", ":2: not valid YAML: .*spaces, not tabs"),
        (b"name: [a\nratio: 1\n", ":2: not valid YAML"),
        (b"name: a\n---\nname: b\n", ":2: not valid YAML"),
        (b"name: \xff\xfe\n", "byte 6 is not UTF-8"),
        (b"name: a\x07\n", ":1: not valid YAML: a character"),
        (b"name: " + b"[" * 20_000, "nested too deeply"),
        (b"#" * 1_000_001, "larger than"),
    ],
)
def test_what_is_not_a_settings_file_is_refused(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    path = tmp_path / "whole.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=expected):
        load(Whole, path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(RecipeError, match="cannot be read"):
            load(Whole, path)


def test_aliases_that_multiply_are_stopped(tmp_path: Path) -> None:
    lines = ["name: a", "a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(RecipeError, match="multiply without end"):
        load(Whole, _write(tmp_path, "\n".join(lines)))


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "whole.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: a\r\nratio: 2.0\r\n")
    assert load(Whole, path) == Whole(name="a", ratio=2.0)


def test_suggestions_are_close_or_none() -> None:
    assert did_you_mean("w4a61", ["w4a16", "fp16"]) == " (did you mean 'w4a16'?)"
    assert did_you_mean("zzz", ["w4a16", "fp16"]) == ""


def test_aliases_that_nest_deeper_than_the_text_are_stopped(tmp_path: Path) -> None:
    lines = ["a0: &a0 [[[[x]]]]", *(f"a{i}: &a{i} [[[[*a{i - 1}]]]]" for i in range(1, 3000))]
    with pytest.raises(RecipeError, match="nested too deeply"):
        load(Whole, _write(tmp_path, "\n".join(lines)))
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 90))]
    with pytest.raises(RecipeError, match="unknown key") as caught:
        load(Whole, _write(tmp_path, "\n".join(lines)))
    assert max(map(len, str(caught.value).splitlines())) < 400


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('name: "a\\ud800"\n', "1: name: half a character"),
        ('name: a\n"\\udfff": 1\n', "2: a key with half a character"),
        (f"name: a\nratio: {'x' * 5000}\n", "2: ratio: must be a number, not 'xxx"),
    ],
)
def test_messages_can_be_printed_and_read(tmp_path: Path, text: str, expected: str) -> None:
    (line,) = _problems(tmp_path, text)
    assert line.startswith(expected)
    assert len(line.encode()) < 200


class Either(Settings):
    weights: str | Annotated[tuple[str, ...], Field(min_length=2)] = ""
    betas: tuple[float, float] = (0.9, 0.999)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("weights: [a, 3, b]\n", ["1: weights[1]: must be text, not 3"]),
        ("weights: [a, {b: c}]\n", ["1: weights[1]: must be text, not {'b': 'c'}"]),
        ("weights: 3\n", ["1: weights: must be text, not 3"]),
        ("weights: {a: 3}\n", ["1: weights: must be text, not {'a': 3}"]),
        ("betas: [0.9]\n", ["1: betas: needs one more"]),
        ("betas: [0.9, x]\n", ["1: betas[1]: must be a number, not 'x'"]),
        ("weights: [a]\n", ["1: weights: needs at least 2 of them"]),
    ],
)
def test_of_several_types_the_one_that_was_meant_is_told(
    tmp_path: Path, text: str, expected: list[str]
) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load(Either, path)
    assert str(caught.value).splitlines() == [f"{path}:{line}" for line in expected]
