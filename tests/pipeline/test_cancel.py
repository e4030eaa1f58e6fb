"""`hbxt generate` that is stopped: a clip of the finished frames, or nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hbxt_compress.clips import read_video
from hbxt_compress.runtime import Runtime
from tests.fake_artifact import make_artifact

PROMPT = "a red circle moving left"
N_FRAMES = 9
# Says what is to run and waits for a line, so that a signal comes at a moment that is known.
_STEPPED = """
import sys
from hbxt_compress import cli
from hbxt_compress.runtime.session import Session

run = Session.run

def stepped(self, inputs, **needed):
    print("decoding" if "latent_sample" in inputs else "denoising", flush=True)
    sys.stdin.readline()
    return run(self, inputs, **needed)

Session.run = stepped
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("cancel") / "artifact")


@pytest.fixture(scope="module")
def frames(artifact: Path) -> np.ndarray:
    """What is generated undisturbed."""
    return np.stack([*Runtime.open(artifact, provider="cpu").stream(PROMPT)])


def stopped(artifact: Path, out: Path, what: str, nth: int, *numbers: int) -> tuple[int, str]:
    """Exit code and stderr of a run that gets the signals in its nth call that does `what`."""
    command = ["generate", artifact, "--prompt", PROMPT, "--provider", "cpu", "--out", out]
    with subprocess.Popen(
        [sys.executable, "-c", _STEPPED, *map(str, command)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        n_seen = 0
        for line in process.stdout:
            n_seen += line == f"{what}\n"
            if n_seen == nth and line == f"{what}\n":
                for number in numbers:
                    os.kill(process.pid, number)
            try:
                process.stdin.write("\n")
                process.stdin.flush()
            except BrokenPipeError:  # the signal has ended it
                break
        _, said = process.communicate()
    return process.returncode, said


@pytest.mark.parametrize(
    ("number", "nth", "n_kept"),
    [(signal.SIGINT, 2, 2), (signal.SIGTERM, 2, 2), (signal.SIGINT, 3, 6)],
)
def test_while_frames_are_decoded_the_finished_ones_are_kept(
    artifact: Path, frames: np.ndarray, tmp_path: Path, number: int, nth: int, n_kept: int
) -> None:
    """Of 9 frames the first comes from the first call, four from each of the two others."""
    out = tmp_path / "clip.mp4"
    out.write_bytes(b"an older file")
    code, said = stopped(artifact, out, "decoding", nth, number)
    assert code == 128 + number
    name = signal.Signals(number).name
    assert said.splitlines()[-1] == (
        f"stopped by {name}; {out} holds {n_kept} of {N_FRAMES} frames; "
        "the same command starts over"
    )
    assert "Traceback" not in said
    found = read_video(out)
    assert found.shape == (n_kept, *frames.shape[1:])
    distances = np.abs(found[:, None].astype(int) - frames[None].astype(int)).mean((2, 3, 4))
    assert distances.argmin(axis=1).tolist() == list(range(n_kept))
    assert [*tmp_path.iterdir()] == [out]


@pytest.mark.parametrize(
    ("what", "nth", "older"),
    [
        ("denoising", 1, None),
        ("denoising", 4, b"an older file"),
        ("decoding", 1, b"an older file"),
    ],
)
def test_before_a_frame_is_finished_nothing_is_written(
    artifact: Path, tmp_path: Path, what: str, nth: int, older: bytes | None
) -> None:
    out = tmp_path / "clip.mp4"
    if older is not None:
        out.write_bytes(older)
    code, said = stopped(artifact, out, what, nth, signal.SIGINT)
    assert code == 130
    told = "stopped by SIGINT; nothing was written; the same command starts over"
    assert said.splitlines()[-1] == told
    assert "Traceback" not in said
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == (
        {} if older is None else {"clip.mp4": older}
    )


def test_an_unhealthy_clip_is_not_kept(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "sick", fault="vae nan")
    out = tmp_path / "new" / "clip.mp4"
    code, said = stopped(artifact, out, "decoding", 9)
    assert (code, [*out.parent.iterdir()]) == (1, [])
    assert "frame 0: " in said
