"""Licence files travel from a model into all that is made of it, and are known or not guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from hbxt_compress.algorithms.pupil import Distilled
from hbxt_compress.errors import SourceError
from hbxt_compress.journal import file_sha256
from hbxt_compress.licences import known_licence, licence_files, licence_of
from hbxt_compress.source import locate
from hbxt_compress.stages.distill import _write_student as write_distilled
from hbxt_compress.stages.export import _copy_licences
from hbxt_compress.stages.import_model import _copied
from tests.fake_artifact import SAMPLER

APACHE = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "wan"
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    for name in ("LICENSE", "Notice.md", "THIRD_PARTY_NOTICES.txt", "license.txt"):
        (folder / name).write_text(name)
    (folder / "licensed.json").write_text("{}")
    (folder / "transformer" / "LICENSE").write_text("of a part")
    (folder / "LICENSES").mkdir()
    return folder


NAMES = ["LICENSE", "Notice.md", "THIRD_PARTY_NOTICES.txt", "license.txt"]


def test_licence_files_are_found_by_name_in_the_root_whatever_their_case(model: Path) -> None:
    assert list(licence_files(model)) == NAMES
    (model / "checkpoint-LICENSE").write_text("imported")
    (model / "COPYING").write_text("x")
    assert licence_files(model).keys() == {*NAMES, "checkpoint-LICENSE", "COPYING"}


def test_a_source_knows_them_and_its_key_does_not(model: Path) -> None:
    source = locate(str(model), hashed=False)
    assert list(source.licences) == NAMES
    assert "LICENSE" not in source.key()


def test_the_built_in_model_has_this_projects_licence() -> None:
    found = locate("builtin/tiny-wan", hashed=False).licences
    assert list(found) == ["LICENSE"]
    assert found["LICENSE"].read_text(encoding="utf-8") == APACHE
    assert licence_of({"LICENSE": APACHE}) == "apache-2.0"


def test_import_takes_the_bases_and_the_checkpoints(model: Path, tmp_path: Path) -> None:
    beside = tmp_path / "checkpoint"
    beside.mkdir()
    (beside / "NOTICES").write_text("Open RAIL-MS")
    (beside / "LICENSE").write_text("another")
    found = _copied(locate(str(model), hashed=False), beside)
    wanted = {name: name for name in NAMES}
    wanted |= {"NOTICES": "Open RAIL-MS", "checkpoint-LICENSE": "another"}
    assert {name: found[name].read_text() for name in wanted} == wanted


def test_a_student_carries_them(model: Path, tmp_path: Path) -> None:
    source = locate(str(model), hashed=False)
    (tmp_path / "student").mkdir()
    nothing = Distilled(weights={}, sampler=SAMPLER, measured={})
    write_distilled(tmp_path / "student", source, nothing)
    assert list(licence_files(tmp_path / "student")) == NAMES


def test_an_export_copies_what_its_key_says(model: Path, tmp_path: Path) -> None:
    source = locate(str(model), hashed=False)
    wanted = {name: file_sha256(path) for name, path in source.licences.items()}
    _copy_licences(source, tmp_path / "licences", wanted)
    assert sorted(path.name for path in (tmp_path / "licences").iterdir()) == NAMES
    (model / "LICENSE").write_text("changed")
    with pytest.raises(SourceError, match="LICENSE: changed meanwhile"):
        _copy_licences(source, tmp_path / "licences", wanted)
    _copy_licences(source, tmp_path / "none", {})
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ({}, None),
        ({"LICENSE": "MIT License\n\nCopyright"}, "mit"),
        ({"LICENSE": "do as you like"}, None),
        ({"LICENSE": APACHE, "NOTICE": "made by somebody"}, "apache-2.0"),
        ({"LICENSE": APACHE, "NOTICES": "under Open RAIL-MS: you must not"}, None),
        ({"LICENSE": APACHE, "checkpoint-LICENSE": "MIT License"}, None),
        ({"LICENSE": APACHE, "LICENSE.txt": APACHE}, "apache-2.0"),
        ({"NOTICE": "nothing known"}, None),
    ],
)
def test_a_licence_is_known_if_all_files_agree(texts: dict[str, str], found: str | None) -> None:
    assert licence_of(texts) == found


def test_a_licence_that_mentions_another_far_down_is_not_that_one() -> None:
    assert known_licence("My own terms.\n" + "word " * 1000 + "Apache License Version 2.0") is None
