"""The store: whole results only, found by what made them, resumed after a kill."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from hbxt_compress.errors import StoreError, UsageError
from hbxt_compress.machine import Machine
from hbxt_compress.publish import publish
from hbxt_compress.store import Entry, Missing, Store, Work, _version, canonical

VERSION = 1
FACTS = ("numpy",)
_HERE = Machine()
_calls: list[str] = []


def stage(
    work: Work, text: str, before: Entry | None = None, on: Machine = _HERE, n: int = 2
) -> None:
    for i in range(n):

        def make(path: Path, i: int = i) -> None:
            _calls.append(f"{text}{i}")
            if text == "dies" and i == 1 and len(_calls) < 3:
                raise KeyboardInterrupt
            path.write_text(f"{text} {i}")

        work.piece(f"piece-{i}", make)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    _calls.clear()


def test_a_finished_result_is_found_not_repeated(tmp_path: Path) -> None:
    first = Store(tmp_path).result(stage, text="a")
    again = Store(tmp_path).result(stage, text="a")
    assert again == first
    assert _calls == ["a0", "a1"]
    assert sorted(p.name for p in first.folder.iterdir()) == ["piece-0", "piece-1"]


def test_an_interrupted_result_goes_on_with_the_next_piece(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.result(stage, text="dies")
    assert not list(tmp_path.glob("stage/*.json"))
    store.result(stage, text="dies")
    assert _calls == ["dies0", "dies1", "dies1"]


def test_parameters_defaults_and_inputs_make_the_key_and_the_machine_does_not(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path)
    a = store.result(stage, text="a")
    assert store.result(stage, text="a", n=2, on=Machine(device="cuda", n_threads=7)) == a
    assert store.result(stage, text="b") != a
    assert store.result(stage, text="a", n=1).key != a.key


def test_an_input_counts_by_its_bytes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one = store.result(stage, text="a")
    same_bytes = Entry(folder=tmp_path, stage="other", key="other", digest=one.digest)
    assert store.result(stage, text="c", before=one) == store.result(
        stage, text="c", before=same_bytes
    )


def test_a_damaged_result_is_refused(tmp_path: Path) -> None:
    entry = Store(tmp_path).result(stage, text="a")
    (entry.folder / "piece-0").write_text("")
    with pytest.raises(StoreError, match="piece-0"):
        Store(tmp_path).result(stage, text="a")


def test_peek_builds_nothing(tmp_path: Path) -> None:
    peek = Store(tmp_path).peek()
    with pytest.raises(Missing):
        peek.result(stage, text="a")
    assert [state for _, _, state, _ in peek.seen] == ["missing"]
    assert _calls == []


def test_publish_replaces_only_its_own_kind(tmp_path: Path) -> None:
    entry = Store(tmp_path / "store").result(stage, text="a")
    out = tmp_path / "out"
    publish(entry, out, mark="piece-0")
    publish(entry, out, mark="piece-0")
    assert (out / "piece-1").read_text() == "a 1"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds no piece-0"):
        publish(entry, foreign, mark="piece-0")
    assert (foreign / "thesis.txt").read_text() == "mine"


def test_what_has_no_json_cannot_be_part_of_a_key() -> None:
    with pytest.raises(TypeError, match="set cannot"):
        canonical({1, 2})


def test_a_fact_may_be_any_of_several_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "onnxruntime-rocm":
            raise PackageNotFoundError(name)
        return "1.22.2"

    monkeypatch.setattr("hbxt_compress.store.version", version)
    assert _version("onnxruntime|onnxruntime-rocm") == "onnxruntime-rocm 1.22.2"
    with pytest.raises(StoreError, match="none of onnxruntime, numpy"):
        _version("onnxruntime|numpy")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"files": {"a": 1}}', "[" * 50_000])
def test_a_damaged_record_is_named_with_its_remedy(text: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    entry = store.result(stage, text="a")
    entry.folder.with_suffix(".json").write_text(text)
    with pytest.raises(StoreError, match=rf"{entry.key}\.json: damaged .*delete it to re-make"):
        store.result(stage, text="a")
