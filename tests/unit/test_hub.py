"""Uploads: verified first, all of a release and nothing else, to a hub on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from hbxt_compress import cli
from hbxt_compress.errors import ArtifactError, UsageError
from hbxt_compress.hub import look_through
from hbxt_compress.release import release
from tests.fake_artifact import make_artifact
from tests.fake_hub import FakeHub, fake_hub
from tests.fake_report import write_report


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    artifact = make_artifact(folder / "artifact")
    report = write_report(folder / "report", artifact)
    release(artifact, report, folder / "release", licence="apache-2.0")
    return folder / "release"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that the client takes for the only one; HF_ENDPOINT says that at its import."""
    with fake_hub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        yield served


def _push(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["push", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return int(caught.value.code or 0), out, err


def _content(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_what_arrives_is_the_release_byte_for_byte(
    released: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = _push(capsys, released, "org/some", "--private")
    assert code == 0, err
    assert (hub.repo, hub.private, hub.tokens) == ("org/some", True, {"Bearer hf_mine"})
    assert hub.branches["main"] == _content(released)
    assert {len(one) for one in hub.stored.values()} >= {40}  # weights went the way of large files
    assert "/commit/" in out
    code, _, err = _push(capsys, released, "org/some", "--revision-branch", "v1")
    assert code == 0, err
    assert hub.branches["v1"] == hub.branches["main"]


def test_a_dry_run_asks_nobody(
    released: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = _push(capsys, released, "org/some", "--dry-run")
    assert code == 0, err
    assert hub.asked == []
    for said in ("transformer/model.onnx.data", "org/some, branch main", "nothing was sent"):
        assert said in out


def test_a_hub_that_refuses_is_one_message(
    released: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(constants, "ENDPOINT", f"{hub.endpoint}/nowhere")
    code, _, err = _push(capsys, released, "org/some")
    assert code == 1
    assert "org/some: could not be uploaded" in err
    assert "HF_TOKEN" in err


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
