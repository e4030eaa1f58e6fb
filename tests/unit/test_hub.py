"""Uploads: verified first, all of a release and nothing else, to a hub on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hbxt_compress.errors import ArtifactError, UsageError
from hbxt_compress.hub import look_through
from hbxt_compress.release import release
from tests.fake_artifact import make_artifact
from tests.fake_hub import fake_hub
from tests.fake_report import write_report


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    artifact = make_artifact(folder / "artifact")
    report = write_report(folder / "report", artifact)
    release(artifact, report, folder / "release", licence="apache-2.0")
    return folder / "release"


def _push(endpoint: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs `hbxt push` in a process of its own: the Hub's client reads its settings at import."""
    own = {
        "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_mine", "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "hbxt_compress", "push", *map(str, arguments)],
        capture_output=True, text=True, check=False, env={**os.environ, **own},
    )  # fmt: skip


def _content(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_what_arrives_is_the_release_byte_for_byte(released: Path) -> None:
    with fake_hub() as hub:
        run = _push(hub.endpoint, released, "org/some", "--private")
        assert run.returncode == 0, run.stderr
        assert hub.repo == "org/some"
        assert hub.private is True
        assert hub.tokens == {"Bearer hf_mine"}
        assert hub.branches["main"] == _content(released)
        assert {len(one) for one in hub.stored.values()} >= {40}
        assert "/commit/" in run.stdout
        other = _push(hub.endpoint, released, "org/some", "--revision-branch", "v1")
        assert other.returncode == 0, other.stderr
        assert hub.branches["v1"] == hub.branches["main"]


def test_a_dry_run_asks_nobody(released: Path) -> None:
    with fake_hub() as hub:
        run = _push(hub.endpoint, released, "org/some", "--dry-run")
        assert run.returncode == 0, run.stderr
        assert hub.asked == []
    assert "transformer/model.onnx.data" in run.stdout
    assert "org/some, branch main" in run.stdout
    assert "nothing was sent" in run.stdout


def test_a_hub_that_refuses_is_one_message(released: Path) -> None:
    with fake_hub() as hub:
        run = _push(f"{hub.endpoint}/nowhere", released, "org/some")
    assert run.returncode == 1
    assert "org/some: could not be uploaded" in run.stderr
    assert "HF_TOKEN" in run.stderr
    assert "Traceback" not in run.stderr


def test_only_releases_are_uploaded_and_only_whole_ones(released: Path, tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "artifact")
    with pytest.raises(UsageError, match="no release"):
        look_through(artifact, "org/some", branch=None)
    told = look_through(artifact, "org/some", branch="v1", force=True)
    assert (told.released, told.branch) == (False, "v1")
    assert told.files["transformer/model.onnx.data"] == 40
    with pytest.raises(UsageError, match="write it as org/name"):
        look_through(released, "some", branch=None)
    (artifact / "more").write_text("x")
    with pytest.raises(ArtifactError, match="more: not in the manifest"):
        look_through(artifact, "org/some", branch=None, force=True)
    (released / "more").write_text("x")
    try:
        with pytest.raises(ArtifactError, match=r"more: not in release\.json"):
            look_through(released, "org/some", branch=None)
    finally:
        (released / "more").unlink()
