"""The scale bench: what a process took is told rightly, and what it had to take is counted."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from checkpoints import Checkpoint, write_checkpoint
from machine_floor import MachineFloor, Work
from scale import Run, least_work, prediction, stored_bytes
from scale_pages import write_markdown, write_svg
from watched import Watched, watch

from hbxt_compress.models.wan import Wan
from hbxt_compress.plan import make_plan
from hbxt_compress.recipe import load_recipe
from hbxt_compress.source import locate
from tests.forked import wait_for

FLOOR = MachineFloor(
    machine="test", n_threads=1, gemm_flops={"float32": 1e9, "bfloat16": 2e9}, gemm_by_layer={},
    read_bytes=100.0, write_bytes=50.0, sha256_bytes=200.0, search_weights={2.0: 10.0, 3.5: 5.0},
)  # fmt: skip


def _watched(tmp_path: Path, code: str, **limits: float) -> Watched:
    return watch([sys.executable, "-c", code], tmp_path / "log.txt", **limits)


def test_a_process_is_measured_and_not_the_one_that_started_it(tmp_path: Path) -> None:
    held = bytearray(os.urandom(1 << 20) * 150)
    small = _watched(tmp_path, "import time; time.sleep(0.3)")
    assert small.error is None
    assert small.peak_rss_bytes < 60e6 < len(held)
    assert small.seconds > 0.3 > small.cpu_seconds


def test_memory_is_split_by_what_backs_it_and_reading_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(50_000_000))
    code = (
        "import mmap, time\n"
        "own = bytearray(b'x') * 100_000_000\n"
        f"file = open({str(file)!r}, 'rb')\n"
        "read = len(file.read())\n"
        "mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "sum(mapped[::4096])\n"
        "time.sleep(0.5)"
    )
    took = _watched(tmp_path, code)
    assert 100e6 < took.peak_anonymous_bytes < 170e6
    assert 50e6 < took.peak_file_bytes < 80e6
    assert 50e6 < took.asked_bytes < 80e6
    assert max(anonymous for _, anonymous, _ in took.curve) == took.peak_anonymous_bytes


@pytest.mark.parametrize(
    ("code", "limits", "told"),
    [
        ("raise SystemExit('no such recipe')", {}, "exit code 1: no such recipe"),
        (
            "import os, signal; print('began', flush=True); os.kill(os.getpid(), signal.SIGKILL)",
            {},
            "killed by SIGKILL (out of memory?): began",
        ),
        ("import time; time.sleep(60)", {"most_seconds": 0.3}, "stopped after 0.005 min"),
        (
            "import time; own = bytearray(b'x') * 200_000_000; time.sleep(60)",
            {"most_memory": 150e6},
            "of anonymous memory",
        ),
    ],
)
def test_a_process_that_fails_says_why(
    tmp_path: Path, code: str, limits: dict[str, float], told: str
) -> None:
    took = _watched(tmp_path, code, **limits)
    assert took.error is not None
    assert told in took.error
    assert took.seconds < 30


def test_a_watched_process_ends_with_the_one_that_watches(tmp_path: Path) -> None:
    child = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        "import sys; from pathlib import Path; from watched import watch\n"
        f"watch([sys.executable, '-c', {child!r}], Path('log.txt'))"
    )
    paths = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "bench")}
    pid = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=paths) as run:
        wait_for(lambda: pid.is_file() and pid.read_text() != "", most_s=30)
        run.terminate()
    assert run.returncode == 128 + signal.SIGTERM
    assert not Path(f"/proc/{pid.read_text()}").exists()


def test_the_floor_is_the_sum_of_its_parts() -> None:
    work = Work(
        read_bytes=1000, hashed_bytes=2000, written_bytes=100, flops=3e9, searched={3.5: 20}
    )
    parts = FLOOR.parts_s(work)
    assert parts == {"read": 10.0, "hash": 10.0, "search": 4.0, "multiply": 3.0, "write": 2.0}
    with pytest.raises(ValueError, match=r"norm \[9.0\] was not measured, only with \[2.0, 3.5\]"):
        FLOOR.parts_s(Work(searched={9.0: 1}))


def test_least_work_counts_every_byte_and_weight_once(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", Checkpoint(transformer="tiny"))
    source = locate(str(folder), hashed=False)
    family, found = Wan(), {}
    for name in ("w4a16-fast", "tiny"):
        recipe = load_recipe(name)
        planned = make_plan(recipe, family.layers(source), family.parameters(source))
        document = planned.to_json()
        if name == "tiny":
            document |= {"calibration": {"n": 3, "n_states": 2, "n_tokens": 32}}
        found[name] = least_work(recipe, document, source, 5000), planned
    fast, planned = found["w4a16-fast"]
    on_disk = stored_bytes(folder) - (folder / ".stamp").stat().st_size
    assert fast.read_bytes == on_disk
    assert fast.hashed_bytes == on_disk + 5000
    assert fast.written_bytes == 5000
    tables = [one.spec.n_weights for one in planned.quantized if one.spec.kind == "embedding"]
    every = sum(layer.spec.n_weights for layer in planned.quantized)
    assert fast.searched == {3.5: every - sum(tables), 2.0: sum(tables)}
    assert len(tables) == 1
    assert fast.flops == 0
    calibrated = found["tiny"][0]
    assert calibrated.searched == {2.0: every}
    tokens = 3 * 2 * 32 * 2  # prompts, states, tokens of each, branches
    n_weights = sum(map(math.prod, Checkpoint(transformer="tiny").shapes()["transformer"].values()))
    passes = 2 * 2 * n_weights * tokens  # two models
    by_inputs = [one.spec for one in found["tiny"][1].quantized if one.spec.kind != "embedding"]
    shapes = {spec.name: spec.shape for spec in by_inputs}
    fed = sum(n_out * n_in**2 for n_out, n_in in shapes.values())
    inputs = {(name.rpartition(".")[0], n_in) for name, (_, n_in) in shapes.items()}
    own = sum(
        tokens * n_in**2 + n_in**3 / 3 for name, n_in in inputs if name.startswith("transformer")
    )
    assert math.isclose(calibrated.flops, passes + fed + own)
    assert own > 0


def test_a_prediction_is_taken_where_the_plan_has_one() -> None:
    told = {"seconds": 3.0, "peak_rss_bytes": 7, "disk_bytes": 9}
    assert prediction({"predicted": {**told, "more": 1}}) == told
    assert prediction({"predicted": {"seconds": 3.0}}) is None
    assert prediction({}) is None


def test_a_broken_artifact_and_a_failed_run_are_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "tiny", Checkpoint(transformer="tiny"))
    run = Run(tmp_path / "run", folder, "w4a16-fast")
    monkeypatch.setattr(Run, "_hbxt", lambda *_: [sys.executable, "-c", "raise SystemExit('no')"])
    row = run.row(FLOOR, most_seconds=None, most_memory=None)
    assert row["error"] == "exit code 1: no"
    assert row["predicted"] is None
    assert "artifact_bytes" not in row
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "bad byte\n")
    )
    assert run._verified()["error"] == "verify: bad byte"


def test_pages_show_runs_and_failures(tmp_path: Path) -> None:
    row = {
        "model": "0.3B", "recipe": "w4a16-fast", "params": 300_000_000, "seconds": 100.0,
        "cpu_seconds": 90.0, "peak_rss_bytes": 2_000_000_000, "peak_anonymous_bytes": 1_500_000_000,
        "bytes_read": 600_000_000, "bytes_written": 200_000_000, "artifact_bytes": 180_000_000,
        "floor_seconds": 25.0, "predicted": None,
    }  # fmt: skip
    larger = row | {"model": "5B", "params": 5_000_000_000, "seconds": 2000.0}
    failed = {"model": "14B", "recipe": "w4a16", "params": 1, "error": "killed|by"}
    write_markdown(tmp_path / "scale.md", [row, larger, failed])
    text = (tmp_path / "scale.md").read_text()
    assert "| 0.3B | `w4a16-fast` | 300 M | 100.0 | 90.0 | 25.0 | 4.0 | 2.00 | 1.50 |" in text
    assert "| 14B | `w4a16` | killed/by |" in text
    for rows, dots in (([row, larger, failed], 8), ([row], 4)):
        write_svg(tmp_path / "scale.svg", rows)
        drawn = ElementTree.fromstring((tmp_path / "scale.svg").read_text())
        assert len(drawn.findall(".//{*}circle")) == dots
    (tmp_path / "scale.svg").unlink()
    write_svg(tmp_path / "scale.svg", [failed])
    assert not (tmp_path / "scale.svg").exists()
