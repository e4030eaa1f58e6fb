"""Prompts encoded once: the same bytes with and without, whatever happens to the folder."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from hbxt_compress import cli
from hbxt_compress.runtime import Runtime, generate
from hbxt_compress.runtime.prompt_cache import MOST_BYTES, PromptCache
from tests.fake_artifact import TEXT_LENGTH, make_artifact, rewrite_manifest

PROMPT = "a red circle moving left"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("prompts") / "artifact")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "not" / "there" / "yet"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The components whose graphs were opened since the list was emptied."""
    found: list[str] = []
    real = generate.open_session

    def counting(path: Path, *others: object, **options: object) -> object:
        found.append(path.parent.name)
        return real(path, *others, **options)

    monkeypatch.setattr(generate, "open_session", counting)
    return found


def files(cache: Path) -> list[Path]:
    assert not list(cache.glob("*.partial"))
    return sorted(cache.glob("*"))


def digest(folder: Path, **options: object) -> str:
    with Runtime.open(folder, provider="cpu", n_threads=1, verify=False, **options) as runtime:
        return runtime.generate(PROMPT, negative="white", seed=3).sha256


def test_a_second_clip_does_not_open_the_encoder_and_is_the_same_to_the_bit(
    folder: Path, cache: Path, opened: list[str]
) -> None:
    whole = digest(folder)
    assert digest(folder, cache=cache) == whole
    assert opened.count("text_encoder") == 2
    assert len(files(cache)) == 2  # the prompt and the negative one
    opened.clear()
    assert digest(folder, cache=cache) == whole
    assert "text_encoder" not in opened
    cached = Runtime.open(folder, provider="cpu", n_threads=1, cache=cache)
    plain = Runtime.open(folder, provider="cpu", n_threads=1)
    for prompt in (PROMPT, "white", "") * 2:
        got, expected = cached.encode(prompt), plain.encode(prompt)
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert got.tobytes() == expected.tobytes()
    assert len(files(cache)) == 3


def test_without_being_asked_nothing_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]
) -> None:
    monkeypatch.setenv("HBXT_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        digest(folder)
    assert opened.count("text_encoder") == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["encoder", "tokenizer", "threads", "provider", "session"])
def test_what_the_features_depend_on_is_in_the_name(
    folder: Path, cache: Path, tmp_path: Path, opened: list[str], change: str
) -> None:
    digest(folder, cache=cache)
    opened.clear()
    other = shutil.copytree(folder, tmp_path / "other")
    options: dict[str, object] = {"provider": "cpu", "n_threads": 1}
    if change == "encoder":
        data = other / "text_encoder" / "model.onnx.data"
        data.write_bytes(bytes(len(data.read_bytes())))
    elif change == "tokenizer":
        text = (other / "tokenizer" / "tokenizer.json").read_text()
        swapped = text.replace('"red"', '"x"').replace('"right"', '"red"').replace('"x"', '"right"')
        (other / "tokenizer" / "tokenizer.json").write_text(swapped)
    elif change == "threads":
        options["n_threads"] = 2
    elif change == "provider":
        options["provider"] = "auto"
    if change in ("encoder", "tokenizer"):
        rewrite_manifest(other)
    elif change == "session":
        rewrite_manifest(other, session={"session.of_the_future": "yes"})
    with Runtime.open(other, cache=cache, **options) as runtime:
        got = runtime.encode(PROMPT)
    assert opened == ["text_encoder"]
    with Runtime.open(other, **options) as runtime:
        assert got.tobytes() == runtime.encode(PROMPT).tobytes()


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def reshaped(content: bytes) -> bytes:
    return save({"rows": load(content)["rows"][:1]}, metadata={"sha256": "0" * 64})


def undigested(content: bytes) -> bytes:
    return save(load(content))


@pytest.mark.parametrize("damage", [cut, flipped, reshaped, undigested, lambda _: b""])
def test_a_damaged_file_is_removed_with_a_warning_and_made_again(
    folder: Path, cache: Path, opened: list[str], caplog: pytest.LogCaptureFixture,
    damage: Callable[[bytes], bytes],
) -> None:  # fmt: skip
    whole = digest(folder, cache=cache)
    before = {path: path.read_bytes() for path in files(cache)}
    victim = next(iter(before))
    victim.write_bytes(damage(before[victim]))
    opened.clear()
    with caplog.at_level(logging.WARNING):
        assert digest(folder, cache=cache) == whole
    (warning,) = caplog.messages
    assert warning.startswith(f"{victim}: not readable (")
    assert opened.count("text_encoder") == 1
    assert {path: path.read_bytes() for path in files(cache)} == before


def test_a_folder_that_cannot_be_used_is_a_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        assert digest(folder, cache=tmp_path / "file" / "below") == digest(folder)
    assert caplog.messages
    assert all("are not kept for the next clip" in one for one in caplog.messages)
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_disk_without_room_leaves_nothing_behind(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object, __: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with caplog.at_level(logging.WARNING):
        assert digest(folder, cache=cache) == digest(folder)
    assert "No space left on device" in caplog.messages[0]
    assert files(cache) == []


def test_features_that_are_not_finite_are_not_kept(cache: Path) -> None:
    ids = mask = np.ones((1, 4), dtype=np.int64)
    bad = np.full((1, 4, 2), np.nan, dtype=np.float32)
    assert PromptCache(cache, {}).get(ids, mask, lambda: bad) is bad
    assert not cache.exists()


def entry(prompts: PromptCache, i: int, made: list[int] | None = None) -> Path:
    """Asks for the i-th prompt, and returns its file. made: gets i if it was encoded."""
    ids, mask = np.full((1, TEXT_LENGTH), i), np.ones((1, TEXT_LENGTH), dtype=np.int64)

    def make() -> np.ndarray:
        if made is not None:
            made.append(i)
        return np.full((1, TEXT_LENGTH, 64), i, dtype=np.float32)

    assert (prompts.get(ids, mask, make) == i).all()
    return prompts.folder / f"{prompts._key(ids, mask)}.safetensors"


def aged(path: Path, seconds: float) -> None:
    now = path.stat().st_mtime
    os.utime(path, (now - seconds, now - seconds))


def test_what_was_used_longest_ago_makes_room(cache: Path) -> None:
    size = entry(PromptCache(cache, {}), 0).stat().st_size
    prompts = PromptCache(cache, {}, most_bytes=3 * size)
    assert MOST_BYTES == 1_000_000_000
    paths = [entry(prompts, i) for i in range(3)]
    for i, path in enumerate(paths):
        aged(path, 300 - 100 * i)
    entry(prompts, 0)  # now the second is the one that was used longest ago
    paths.append(entry(prompts, 3))
    assert [path.exists() for path in paths] == [True, False, True, True]
    made: list[int] = []
    for i in (3, 2, 1):
        entry(prompts, i, made)
    assert made == [1]
    assert len(files(cache)) == 3


def test_one_that_is_larger_than_the_bound_is_still_kept(cache: Path) -> None:
    prompts = PromptCache(cache, {}, most_bytes=10)
    paths = [entry(prompts, i) for i in range(2)]
    assert [path.exists() for path in paths] == [False, True]


def test_what_a_killed_process_left_is_removed_after_a_while(cache: Path) -> None:
    cache.mkdir(parents=True)
    old, new, foreign = (cache / name for name in ("a.partial", "b.partial", "notes.txt"))
    for path in (old, new, foreign):
        path.write_text("x")
    aged(old, 4000)
    aged(foreign, 4000)
    entry(PromptCache(cache, {}), 1)
    assert (old.exists(), new.exists(), foreign.exists()) == (False, True, True)


def test_many_at_once_share_a_folder_that_is_too_small(cache: Path) -> None:
    size = entry(PromptCache(cache, {}), 0).stat().st_size
    errors: list[BaseException] = []

    def work() -> None:
        try:
            prompts = PromptCache(cache, {}, most_bytes=2 * size)
            for i in [*range(6)] * 5:
                entry(prompts, i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert errors == []
    assert 1 <= len(files(cache)) <= 3


def test_two_processes_at_once(folder: Path, cache: Path) -> None:
    code = """
import sys
from pathlib import Path
from hbxt_compress.runtime import Runtime
print("ready", flush=True)
sys.stdin.readline()
with Runtime.open(Path(sys.argv[1]), provider="cpu", n_threads=1, cache=Path(sys.argv[2])) as r:
    print(r.generate(sys.argv[3], negative="white", seed=3).sha256)
"""
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(cache), PROMPT],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    for one in pair:
        assert one.stdout.readline() == "ready\n"
    for one in pair:
        one.stdin.write("\n")
        one.stdin.flush()
    whole = digest(folder)
    assert [one.communicate() for one in pair] == [(f"{whole}\n", "")] * 2
    assert len(files(cache)) == 2


@pytest.mark.parametrize("how", ["option", "variable", "default", "off"])
def test_the_command_line_keeps_prompts_unless_told_not_to(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str], how: str
) -> None:
    there = tmp_path / "cache"
    given = {"option": ["--cache", str(there)], "off": ["--cache", str(there), "--no-cache"]}
    monkeypatch.delenv("HBXT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    if how == "variable":
        monkeypatch.setenv("HBXT_CACHE", str(there))
    elif how == "default":
        there = tmp_path / "home" / "hbxt" / "prompts"
    command = ["generate", str(folder), "--prompt", PROMPT, "--provider", "cpu", "--out"]
    for i in range(2):
        with pytest.raises(SystemExit) as ended:
            cli.main([*command, str(tmp_path / f"{i}.mp4"), *given.get(how, [])])
        assert not ended.value.code
    assert opened.count("text_encoder") == (2 if how == "off" else 1)
    assert there.is_dir() == (how != "off")
    assert (tmp_path / "0.mp4").read_bytes() == (tmp_path / "1.mp4").read_bytes()
