"""Releases: whole, told, and every change of one found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from flips import missed

from hbxt_compress import release as releasing
from hbxt_compress.artifact import Artifact
from hbxt_compress.errors import (
    ArtifactError,
    CheckFailed,
    QualityGateFailed,
    QualityUndecided,
    RuntimeUnavailable,
    UsageError,
)
from hbxt_compress.file_records import sealed, sha256_of
from hbxt_compress.manifest import TargetRecord
from hbxt_compress.release import release
from hbxt_compress.released import Release
from hbxt_compress.verify import open_release
from tests.fake_artifact import make_artifact, rewrite_manifest
from tests.fake_report import write_report

APACHE = "Apache License\n  Version 2.0, January 2004\n  http://www.apache.org/licenses/\n"


def _content(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _licensed(folder: Path, texts: Mapping[str, str]) -> Path:
    """An artifact whose source had these licence files."""
    artifact = make_artifact(folder)
    (artifact / "licences").mkdir()
    for name, text in texts.items():
        (artifact / "licences" / name).write_text(text)
    rewrite_manifest(artifact, lineage=({"stage": "export", "version": "6"},))
    return artifact


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "artifact"
    return _licensed(folder, {"LICENSE": APACHE, "NOTICE": "made by somebody"})


@pytest.fixture(scope="module")
def report(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("report"), artifact)


@pytest.fixture(scope="module")
def whole(artifact: Path, report: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "release"
    release(artifact, report, out)
    return out


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "release"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A private key, its public one, and somebody else's public key."""
    pytest.importorskip("model_signing", reason="it comes with the extra `sign`")
    folder = tmp_path_factory.mktemp("keys")
    for name in ("own", "other"):
        make = ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.pem"]
        show = ["ec", "-in", f"{name}.pem", "-pubout", "-out", f"{name}.pub"]
        for command in (make, show):
            subprocess.run(["openssl", *command], check=True, capture_output=True, cwd=folder)
    return folder / "own.pem", folder / "own.pub", folder / "other.pub"


@pytest.fixture(scope="module")
def signed(
    artifact: Path, report: Path, keys: tuple[Path, Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    out = tmp_path_factory.mktemp("signed") / "release"
    release(artifact, report, out, key=keys[0])
    return out


def _refusal(folder: Path, **how: object) -> str:
    with pytest.raises(ArtifactError) as error:
        open_release(folder, **how)  # type: ignore[arg-type]
    return str(error.value)


def test_a_release_holds_the_artifact_as_it_is_and_what_tells_about_it(
    artifact: Path, report: Path, whole: Path
) -> None:
    found, own = _content(whole), _content(artifact)
    assert {name: found[name] for name in own} == own
    for name in ("report.json", "report.md", "report.html"):
        assert found[f"quality/{name}"] == (report / name).read_bytes()
    assert found.keys() - own.keys() == {
        ".gitattributes", "README.md", "release.json",
        "quality/report.json", "quality/report.md", "quality/report.html",
    }  # fmt: skip
    record = open_release(whole)
    assert {one.path for one in record.files} == found.keys() - {"release.json"}
    assert (record.licence, record.outcome, record.signed) == ("apache-2.0", "pass", False)
    assert Artifact.open(whole).manifest == Artifact.open(artifact).manifest


def test_a_second_release_is_the_same_to_the_byte(
    artifact: Path, report: Path, whole: Path, tmp_path: Path
) -> None:
    release(artifact, report, tmp_path / "again")
    assert _content(tmp_path / "again") == _content(whole)


def test_hard_links_are_asked_for_and_leave_the_source_alone(
    artifact: Path, report: Path, tmp_path: Path
) -> None:
    before = _content(artifact)
    release(artifact, report, tmp_path / "linked", link=True)
    name = "transformer/model.onnx.data"
    assert (artifact / name).samefile(tmp_path / "linked" / name)
    assert _content(artifact) == before
    open_release(tmp_path / "linked")


def test_the_card_repeats_what_was_measured(whole: Path) -> None:
    text = (whole / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["license"] == "apache-2.0"
    assert (about["library_name"], about["pipeline_tag"]) == ("onnx", "text-to-video")
    assert "base_model" not in about
    [metric] = about["model-index"][0]["results"][0]["metrics"]
    assert metric["type"] == "psnr"
    assert metric["value"] == 41.25
    assert "n 8, 95 % interval 40.5 .. 42.12" in metric["name"]
    assert "**PASS: all promises are kept.**" in body
    assert "| psnr | 41.25 dB | 40.5 .. 42.12 |" in body
    assert "| ulp (noise) | 2 | 91 |" in body
    assert "provider: there is no other" in body
    assert "Not measured: fvd\\_i3d." in body
    assert "**Not verified on AMD GPUs.**" in body
    assert "[licences/LICENSE](licences/LICENSE)" in body
    assert "without a licence file" not in body


def test_the_hub_reads_the_card(whole: Path) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    about = huggingface_hub.ModelCard.load(whole / "README.md", ignore_metadata_errors=False).data
    [result] = about.eval_results
    assert (result.metric_type, result.metric_value) == ("psnr", 41.25)


def test_a_hub_source_is_the_base_model_and_a_folder_is_not_in_the_card(
    artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for model, base in (("Wan-AI/Some@abc", "Wan-AI/Some"), ("/home/me/secret/Some", None)):
        own = Path(shutil.copytree(artifact, tmp_path / f"artifact-{base is None}"))
        rewrite_manifest(own, source={"model": model, "family": "wan", "files": {}})
        report = write_report(tmp_path / f"report-{base is None}", own)
        release(own, report, tmp_path / f"out-{base is None}")
        text = (tmp_path / f"out-{base is None}" / "README.md").read_text(encoding="utf-8")
        assert yaml.safe_load(text.split("---\n")[1]).get("base_model") == base
        assert "secret" not in text
        assert "# Some fake" in text
    told = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert told == ["/home/me/secret/Some is told in manifest.json and report.json, which go along"]


@pytest.mark.parametrize("texts", [{}, {"LICENSE": "do as you like"}])
def test_a_licence_is_never_guessed(tmp_path: Path, texts: dict[str, str]) -> None:
    own = _licensed(tmp_path / "artifact", texts) if texts else make_artifact(tmp_path / "artifact")
    report = write_report(tmp_path / "report", own)
    if not texts:
        with pytest.raises(UsageError, match="--licence"):
            release(own, report, tmp_path / "out")
        assert not list(tmp_path.glob("*out*"))
    release(own, report, tmp_path / "out", licence=None if texts else "My Own 1.0")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    about = yaml.safe_load(text.split("---\n")[1])
    assert about["license"] == "other"
    assert about["license_name"] == ("other" if texts else "my-own-1.0")
    assert about.get("license_link") == ("licences/LICENSE" if texts else None)
    assert ("came without a licence file" in " ".join(text.split())) == (not texts)


def test_the_report_must_be_of_this_artifact(artifact: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(artifact, tmp_path / "other"))
    layers = Artifact.open(other).manifest.layers
    rewrite_manifest(other, layers=(replace(layers[0], error=0.02),))
    report = write_report(tmp_path / "report", other)
    with pytest.raises(UsageError, match="report of another artifact: artifact, layers differ"):
        release(artifact, report, tmp_path / "out")
    (report / "report.html").unlink()
    with pytest.raises(UsageError, match=r"lacks report\.html"):
        release(other, report, tmp_path / "out")
    with pytest.raises(UsageError, match="no readable report"):
        release(artifact, tmp_path, tmp_path / "out")


def test_a_broken_promise_is_released_only_if_allowed_and_told(
    artifact: Path, tmp_path: Path
) -> None:
    failed = write_report(tmp_path / "failed", artifact, "fail")
    doubtful = write_report(tmp_path / "doubtful", artifact, "undecided")
    with pytest.raises(QualityGateFailed, match="--allow fail"):
        release(artifact, failed, tmp_path / "out", allow="undecided")
    with pytest.raises(QualityUndecided, match="--allow undecided"):
        release(artifact, doubtful, tmp_path / "out")
    release(artifact, doubtful, tmp_path / "one", allow="fail")
    release(artifact, failed, tmp_path / "two", allow="fail")
    assert "is undecided.** UNDECIDED: too few" in (tmp_path / "one" / "README.md").read_text()
    assert "promise is broken.** FAIL: broken" in (tmp_path / "two" / "README.md").read_text()


def test_what_cannot_be_released_leaves_nothing(
    artifact: Path, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists and is not overwritten"):
        release(artifact, report, tmp_path / "there")
    damaged = Path(shutil.copytree(artifact, tmp_path / "damaged"))
    with (damaged / "transformer/model.onnx.data").open("ab") as file:
        file.write(b"1")
    with pytest.raises(ArtifactError, match=r"transformer/model\.onnx\.data: 41 bytes"):
        release(damaged, report, tmp_path / "out")
    taken = _licensed(tmp_path / "taken", {"LICENSE": APACHE})
    (taken / "README.md").write_text("mine")
    rewrite_manifest(taken, session={})
    with pytest.raises(UsageError, match=r"README\.md"):
        release(taken, write_report(tmp_path / "r", taken), tmp_path / "out", link=True)
    assert (taken / "README.md").read_text() == "mine"

    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(releasing, "card", full)
    with pytest.raises(Exception, match="no space is left"):
        release(artifact, report, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_graphs_that_will_not_do_on_a_target_are_not_released(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    told = TargetRecord(runtime="cpu", nodes={"runs": 1}, settings={})
    rewrite_manifest(own, targets={"cpu": told})
    report = write_report(tmp_path / "report", own)
    release(own, report, tmp_path / "out")
    assert "judged for cpu by" in (tmp_path / "out" / "README.md").read_text()
    checked = releasing.check_targets(own, ("cpu",))[0]
    bad = replace(checked, runtimes={"cpu": replace(checked.runtimes["cpu"], cliff=("x.onnx",))})
    monkeypatch.setattr(releasing, "check_targets", lambda *_: (bad,))
    with pytest.raises(CheckFailed, match="will not do on cpu"):
        release(own, report, tmp_path / "again")


def test_every_flipped_bit_is_found_without_a_signature(folder: Path) -> None:
    assert list(missed(folder, 100, key=None)) == []
    open_release(folder)


@pytest.mark.timeout(240)
def test_every_flipped_bit_is_found_with_one(
    signed: Path, keys: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(signed, tmp_path / "release"))
    assert list(missed(folder, 200, key=keys[1])) == []
    open_release(folder, by=keys[1])


def test_every_byte_of_the_record_counts(folder: Path) -> None:
    path = folder / "release.json"
    before = path.read_bytes()
    for place in range(0, len(before), 23):
        path.write_bytes(before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :])
        with pytest.raises(ArtifactError):
            Release.read(folder)


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def _turn_into_link(path: Path) -> None:
    copy = path.with_name("elsewhere")
    path.rename(copy)
    path.symlink_to(copy.name)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda f: _append(f / "README.md"), "README.md: "),
        (lambda f: os.truncate(f / "quality/report.json", 10), "quality/report.json: 10 bytes"),
        (lambda f: (f / "licences/NOTICE").unlink(), "licences/NOTICE: missing"),
        (lambda f: (f / "extra.txt").write_text("x"), "extra.txt: not in release.json"),
        (lambda f: (f / "quality/.hidden").write_text("x"), "quality/.hidden: not in"),
        (lambda f: (f / "empty/deep").mkdir(parents=True), "empty/: a folder that is not in"),
        (lambda f: (f / "README.md").rename(f / "readme.md"), "readme.md: not in release.json"),
        (lambda f: shutil.copy(f / "README.md", f / "Readme.md"), "Readme.md: not in release.json"),
        (lambda f: _turn_into_link(f / "README.md"), "README.md: a link"),
        (lambda f: (f / "more").symlink_to(f / "quality"), "more: not in release.json"),
        (lambda f: (f / "model.sig").write_text("{}"), "model.sig: not meant"),
        (lambda f: (f / "release.json").unlink(), "not a release"),
        (lambda f: (f / "release.json").write_text("["), "not JSON"),
        (lambda f: (f / "release.json").write_text("[]\n"), "not as it was written"),
        (lambda f: (f / "release.json").write_text(sealed({"schema": 2})), "by a newer one"),
        (lambda f: (f / "release.json").write_text(sealed({"schema": 1})), "not a release's"),
    ],
)  # fmt: skip
def test_every_other_change_is_found(
    folder: Path, change: Callable[[Path], object], named: str
) -> None:
    change(folder)
    assert named in _refusal(folder)


def test_a_forged_record_is_another_release(folder: Path) -> None:
    """Without a signature the digest is what must be trusted."""
    digest = sha256_of(folder / "release.json")
    open_release(folder, digest=digest.upper())
    (folder / "README.md").write_text("buy this")
    record = Release.read(folder)
    files = [replace(one, sha256=sha256_of(folder / one.path), size_bytes=8)
             if one.path == "README.md" else one for one in record.files]  # fmt: skip
    (folder / "release.json").write_text(replace(record, files=tuple(files)).text())
    open_release(folder)
    assert "another release" in _refusal(folder, digest=digest)


def test_a_record_cannot_replace_the_manifest(folder: Path) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    document["files"][0]["sha256"] = "0" * 64
    del document["digest"]
    (folder / "manifest.json").write_text(sealed(document))
    record, path = Release.read(folder), folder / "manifest.json"
    files = [replace(one, sha256=sha256_of(path), size_bytes=path.stat().st_size)
             if one.path == "manifest.json" else one for one in record.files]  # fmt: skip
    (folder / "release.json").write_text(replace(record, files=tuple(files)).text())
    assert "manifest.json and release.json differ in 1 files" in _refusal(folder)


def test_what_the_hubs_client_notes_is_left_alone(
    signed: Path, keys: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(signed, tmp_path / "release"))
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "README.md.metadata").write_text("etag")
    open_release(folder, by=keys[1])
    Artifact.open(folder)
    (folder / ".cache" / "other").write_text("x")
    assert ".cache/other: not in" in _refusal(folder)


def test_a_signature_is_its_owners(
    signed: Path, whole: Path, keys: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    private, public, other = keys
    open_release(signed, by=public)
    assert "not a signature of these files by" in _refusal(signed, by=other)
    assert "not signed" in _refusal(whole, by=public)
    for wrong, said in ((private, "not a public key"), (tmp_path / "none", "no such file")):
        with pytest.raises(UsageError, match=said):
            open_release(signed, by=wrong)
    stripped = Path(shutil.copytree(signed, tmp_path / "stripped"))
    for name in ("model.sig", "model.sig.sha256"):
        (stripped / name).unlink()
    assert "model.sig: missing, release.json says it is signed" in _refusal(stripped)


def test_model_signings_own_tool_agrees(
    signed: Path, keys: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    verifying = pytest.importorskip("model_signing.verifying")
    config = verifying.Config().use_elliptic_key_verifier(public_key=keys[1])
    folder = Path(shutil.copytree(signed, tmp_path / "release"))
    config.verify(folder, folder / "model.sig")
    (folder / "release.json").write_text("{}")
    with pytest.raises(ValueError, match="Hash mismatch"):
        config.verify(folder, folder / "model.sig")


def test_what_cannot_sign_is_told(
    artifact: Path, report: Path, keys: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    private, public, _ = keys
    for wrong, said in ((public, "not a private key"), (tmp_path / "none", "no such file")):
        with pytest.raises(UsageError, match=said):
            release(artifact, report, tmp_path / "out", key=wrong)
    with pytest.raises(UsageError, match="one of them"):
        release(artifact, report, tmp_path / "out", key=private, sigstore=True)
    assert not list(tmp_path.glob("*out*"))


def test_without_the_package_signing_is_told_to_be_unavailable(
    artifact: Path, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "model_signing", None)
    (tmp_path / "key.pem").write_text("x")
    with pytest.raises(RuntimeUnavailable, match=r"hbxt-compress\[sign\]"):
        release(artifact, report, tmp_path / "out", key=tmp_path / "key.pem")
    assert not list(tmp_path.glob("*out*"))
