"""The gate as CI uses it: accept, change, evaluate, compare, and find where an error enters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as Xml

import numpy as np
import onnx
import pytest

from hbxt_compress import evaluation, pipeline
from hbxt_compress.artifact import Artifact, record_files, write_manifest
from hbxt_compress.baseline import accept_report, find_baseline
from hbxt_compress.bisection import bisect
from hbxt_compress.comparing import compare_reports
from hbxt_compress.errors import UsageError
from hbxt_compress.machine import Machine
from hbxt_compress.recipe import load_recipe
from hbxt_compress.report import QualityReport
from hbxt_compress.store import Store
from hbxt_compress.suite import Suite
from tests.micro import write_micro_wan

_CONTROLS = ("ulp", "threads", "provider", "seed", "fp16")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def artifact(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    micro = write_micro_wan(tmp_path_factory.mktemp("micro") / "wan")
    out = tmp_path_factory.mktemp("out") / "artifact"
    return pipeline.compress(load_recipe("tiny"), str(micro), store, machine=Machine(), out=out)


def _suite() -> Suite:
    return Suite(
        name="four", summary="four prompts, two seeds", seed=1, n_steps=2, n_seeds=2,
        metrics=("psnr", "latent_error", "temporal_error"), controls=_CONTROLS, n_control_clips=8,
        prompts=("a red circle", "a blue square", "a cat", "nothing"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(artifact: Path, store: Store) -> QualityReport:
    return evaluation.evaluate(artifact, _suite(), store, machine=Machine())


def _broken(artifact: Path, out: Path, block: str) -> Path:
    """The artifact with the codes of one block's layers inverted, and a manifest that fits."""
    opened = Artifact.open(artifact)
    out.mkdir()
    for record in opened.manifest.files:
        (out / record.path).parent.mkdir(parents=True, exist_ok=True)
        (out / record.path).write_bytes((artifact / record.path).read_bytes())
    graph = out / "transformer" / "model.onnx"
    n = 0
    for tensor in onnx.load(str(graph), load_external_data=False).graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if block in tensor.name and tensor.data_type == onnx.TensorProto.UINT8 and where:
            place = graph.parent / where["location"]
            held = np.memmap(place, np.uint8, "r+", int(where["offset"]), (int(where["length"]),))
            held[:] = 255 - held
            held.flush()
            n += 1
    assert n
    write_manifest(out, replace(opened.manifest, files=record_files(out)))
    return out


def test_controls_stand_beside_the_candidate(report: QualityReport) -> None:
    assert report.n_clips == 8
    assert len({clip.seed for clip in report.clips}) == 8
    found = {one.name: one for one in report.controls}
    assert tuple(found) == _CONTROLS
    means = {name: np.mean(one.values["psnr"]) for name, one in found.items() if one.values}
    own = next(m.value for m in report.measurements if m.metric == "psnr")
    assert own is not None
    assert means["ulp"] > own > means["seed"]
    assert np.mean(found["ulp"].values["latent_error"]) > 0
    assert found["provider"].n == 0
    assert "only the CPU" in found["provider"].note
    assert {one.kind for one in report.controls} == {"noise", "seed", "damage"}


def test_a_broken_block_is_worse_than_the_baseline_and_an_equal_artifact_is_not(
    artifact: Path, store: Store, report: QualityReport, tmp_path: Path
) -> None:
    path = accept_report(report, why="a test", out=tmp_path / "b.json", force=False)
    baseline = find_baseline(str(path), "tiny", "four")
    out = tmp_path / "same"
    same = evaluation.evaluate(
        artifact, _suite(), store, machine=Machine(), baseline=baseline, out=out
    )
    assert same.outcome == "pass"
    assert {v.against for v in same.verdicts} == {"baseline"}
    assert same.baseline is not None
    assert same.baseline.note == ""
    cases = Xml.parse(out / "junit.xml").getroot()[0]
    assert cases.get("failures") == "0"
    assert cases.get("tests") == str(3 + len(same.findings))
    assert "noise" in (out / "summary.md").read_text()

    broken = _broken(artifact, tmp_path / "broken", "blocks.1")
    worse = evaluation.evaluate(broken, _suite(), store, machine=Machine(), baseline=baseline)
    assert worse.outcome == "fail"
    assert "worse than the accepted baseline" in worse.conclusion
    parts = bisect(broken, _suite(), store, machine=Machine(), n_clips=2)
    assert parts.components[0].name == "transformer"
    assert parts.blocks == ()
    assert "exported again it differs in transformer/" in parts.note

    timeless = [replace(one, seconds={}) for one in (report, worse)]  # times as sampled vary
    compared = compare_reports(timeless)
    assert [one.word for one in compared.reports[1].differences if one.metric == "psnr"] == [
        "worse"
    ]
    assert [one.unbeaten for one in compared.reports] == [True, False]
    json.dumps(compared.to_json(), allow_nan=False)
    with pytest.raises(UsageError, match="the very clips of"):
        compare_reports([report, same])


def test_full_precision_under_another_name_is_refused(
    artifact: Path, store: Store, tmp_path: Path
) -> None:
    made = Artifact.open(artifact).manifest.source["model"]
    out = tmp_path / "fp32"
    pipeline.compress(load_recipe("fp32"), str(made), store, machine=Machine(), out=out)
    manifest = Artifact.open(out).manifest
    write_manifest(out, replace(manifest, recipe={**manifest.recipe, "name": "w4a16"}))
    with pytest.raises(UsageError, match="byte for byte the full-precision"):
        evaluation.evaluate(out, _suite(), store, machine=Machine())


def test_blocks_are_put_back_one_by_one(artifact: Path, store: Store) -> None:
    found = bisect(artifact, _suite(), store, machine=Machine(), n_clips=2)
    assert found.note == ""
    assert {part.name for part in found.components} == {
        "transformer",
        "text_encoder",
        "vae_decoder",
    }
    assert [part.name.split("/")[0] for part in found.blocks] == ["transformer"] * len(found.blocks)
    assert found.blocks
    assert len(found.latent_error) == 2
    assert found.components[0].gain_db > 0
    assert found.blocks[0].gain_db <= found.components[0].gain_db + 1
    assert "grows most in step" in found.text


def test_without_the_store_only_components_are_put_back(artifact: Path, tmp_path: Path) -> None:
    found = bisect(artifact, _suite(), Store(tmp_path / "empty"), machine=Machine(), n_clips=1)
    assert found.components[0].gain_db > 0
    assert found.blocks == ()
    assert "the store lacks" in found.note
