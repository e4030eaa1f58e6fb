"""Long runs survive: kill -9, SIGTERM, SIGINT, a disk without room, a shard cut short meanwhile.

HBXT_KILLS says how often the run is killed (6); each time at a random moment, seeded.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forked import Forked, wait_for

N_KILLS = int(os.environ.get("HBXT_KILLS", "6"))
RECIPE = """
name: faults
summary: few weights of every block, calibrated
calibration: tiny
rules:
  - match: "transformer/blocks.*.attn1.{to_q,to_out.0}"
    weights: int4-g128
  - match: "text_encoder/encoder.block.*.SelfAttention.{q,o}"
    weights: int4-g128
  - match: "*"
    weights: keep
    why: the test is about files
round: {use: gptq, damping: [0.01], correct: [1.0]}
accept: {suite: tiny, limits: {psnr: 5.0}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def hbxt(folder: Path) -> Iterator[Forked]:
    with Forked(folder / "log.txt") as forked:
        yield forked


@pytest.fixture(scope="module")
def command(folder: Path, micro_wan: Path) -> list[object]:
    shutil.copytree(micro_wan, folder / "wan")
    (folder / "faults.yaml").write_text(RECIPE)
    return ["-v", "quantize", folder / "faults.yaml", "--model", folder / "wan"]


@pytest.fixture(scope="module")
def undisturbed(hbxt: Forked, command: list[object], folder: Path) -> float:
    """How long a run takes that nothing disturbs; its store and artifact are `folder`/whole."""
    began = time.monotonic()
    assert hbxt.run([*command, *_to(folder / "whole")]) == 0, hbxt.log.read_text()
    return time.monotonic() - began


def _to(folder: Path) -> list[object]:
    return ["--store", folder / "store", "--out", folder / "artifact"]


def _all_but(stage: str, folder: Path, name: str) -> tuple[Path, str]:
    """A folder whose store lacks a stage's result, and that result's key."""
    here, whole = folder / name, folder / "whole" / "store"
    shutil.copytree(whole, here / "store", ignore=shutil.ignore_patterns(stage))
    (record,) = (whole / stage).glob("*.json")
    return here, record.stem


def _digests(folder: Path) -> dict[str, str]:
    """Of an artifact, and of every result in the store beside it."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix not in (".lock", ".seconds") and path.name != "files.json"
    }


def _finished(store: Path) -> set[str]:
    """Names of pieces that a run may not make again."""
    found = set()
    for journal in [*store.glob("*/*.partial/journal.jsonl"), *store.glob("*/*.journal")]:
        for line in journal.read_text().splitlines():
            name = json.loads(line).get("name", "")
            if name and (journal.parent / name).exists():
                found.add(name)
    for record in store.glob("*/*.json"):
        found |= {name.split("/")[0] for name in json.loads(record.read_text())["files"]}
    return found


def _made(log: Path) -> set[str]:
    return set(re.findall(r"^(\S+): made in ", log.read_text(), re.MULTILINE))


def _has(store: Path, stage: str, n_pieces: int) -> bool:
    """Whether a stage that is being built has as many finished pieces."""
    return any(
        len([p for p in partial.iterdir() if p.name not in ("journal.jsonl", "unfinished")])
        >= n_pieces
        for partial in store.glob(f"{stage}/*.partial")
    )


@pytest.mark.timeout(60 * (1 + N_KILLS))
def test_killed_at_random_moments_it_loses_a_piece_at_most_and_ends_with_the_same_bytes(
    hbxt: Forked, command: list[object], undisturbed: float, folder: Path
) -> None:
    moments = random.Random(7)
    expected, n_kills = _digests(folder / "whole"), 0
    kept, ever_kept = set[str](), set[str]()
    here = folder / "killed"
    while True:
        wait_s = moments.uniform(0.02, 0.35) * undisturbed if n_kills < N_KILLS else None

        def kill(pid: int, wait_s: float | None = wait_s) -> None:
            if wait_s is not None:
                time.sleep(wait_s)
                os.kill(pid, signal.SIGKILL)

        code = hbxt.run([*command, *_to(here)], kill)
        assert code in ((0, -signal.SIGKILL) if wait_s is not None else (0,)), hbxt.log.read_text()
        assert not _made(hbxt.log) & kept
        if code == 0:
            assert _digests(here) == expected
            if n_kills == N_KILLS:
                break
            shutil.rmtree(here)  # it was faster than the kill: there are more moments to try
        else:
            n_kills += 1
            assert len(list(here.glob("store/*/*.partial/unfinished/*"))) <= 1
        kept = _finished(here / "store")
        ever_kept |= kept
    assert ever_kept


@pytest.mark.parametrize(
    ("stage", "number", "code", "stopped_at", "what", "full_at"),
    [
        ("quantize", signal.SIGTERM, 143, "[1-3] of 4", "transformer.001.safetensors", "[23] of 4"),
        ("export", signal.SIGINT, 130, "1 of 3", "transformer/model.onnx.data", "1 of 3"),
    ],
)
def test_stopped_and_out_of_room_it_says_so_and_the_same_command_continues(
    stage: str, number: signal.Signals, code: int, stopped_at: str, what: str, full_at: str,
    hbxt: Forked, command: list[object], undisturbed: float, folder: Path,
) -> None:  # fmt: skip
    """A limit on the size of a file fails as a full disk does, and needs no disk of its own."""
    here, key = _all_but(stage, folder, number.name)
    partial = here / "store" / stage / f"{key}.partial"

    def stop(pid: int) -> None:
        wait_for(lambda: _has(here / "store", stage, 1))
        os.kill(pid, number)

    assert hbxt.run([*command, *_to(here)], stop) == code, hbxt.log.read_text()
    said = hbxt.log.read_text()
    assert "Traceback" not in said
    assert re.search(
        rf"\nstopped by {number.name}; {stopped_at} pieces are finished under {partial}; "
        "run the same command to continue\n$",
        said,
    )
    assert not (here / "artifact").exists()
    assert hbxt.run(["status", *command[2:], "--store", here / "store"]) == 0
    assert re.search(rf"{stage} .*{key} .*partial .*{stopped_at} ", hbxt.log.read_text())

    size = (folder / "whole" / "store" / stage / key / what).stat().st_size
    assert hbxt.run([*command, *_to(here)], largest_file=size - 1) == 1, hbxt.log.read_text()
    said = hbxt.log.read_text()
    assert "Traceback" not in said
    assert re.search(
        rf"\nerror: {partial}/transformer[.0-9a-z]*: the file may not grow any more "
        r"\(see `ulimit -f`\): [0-9.]+ MB are free.*; make room, or move the store to another disk",
        said,
    )
    assert re.search(
        rf"\n{full_at} pieces are finished under {partial}; once this is mended, the same", said
    )
    assert not (partial / "unfinished").exists()
    assert hbxt.run([*command, *_to(here)]) == 0
    assert _digests(here) == _digests(folder / "whole")


def test_a_shard_cut_short_meanwhile_is_named_and_once_restored_the_run_continues(
    hbxt: Forked, command: list[object], undisturbed: float, folder: Path
) -> None:
    here, key = _all_but("quantize", folder, "cut")
    shard = folder / "wan" / "transformer" / "diffusion_pytorch_model.safetensors"
    content = shard.read_bytes()

    def cut(_: int) -> None:
        wait_for(lambda: _has(here / "store", "quantize", 1))
        os.truncate(shard, len(content) // 3)

    try:
        assert hbxt.run([*command, *_to(here)], cut) == 2, hbxt.log.read_text()
        said = hbxt.log.read_text()
    finally:
        shard.write_bytes(content)
    assert "Traceback" not in said
    assert re.search(rf"\n(error|  ).*{shard}: ", said)
    assert f"of 4 pieces are finished under {here / 'store' / 'quantize' / key}.partial; " in said
    assert hbxt.run([*command, *_to(here)]) == 0
    assert _digests(here) == _digests(folder / "whole")
