"""How an artifact and its layers came about, and what makes two of them differ."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hbxt_compress import cli
from hbxt_compress.artifact import Artifact
from hbxt_compress.errors import UsageError
from hbxt_compress.explain import artifact_story, difference, errors_in_words, layer_story
from hbxt_compress.manifest import FileRecord, LayerFate, Manifest
from tests.fake_artifact import make_artifact, rewrite_manifest

QUERY, KEY, OUT = (f"transformer/blocks.0.attn1.{name}" for name in ("to_q", "to_k", "to_out.0"))
EXPORT = {"stage": "export", "version": "6"}
DOCUMENT: dict[str, Any] = {
    "name": "fake",
    "summary": "four bits",
    "rules": [
        {"match": "text_encoder/*", "weights": "keep", "why": "small", "round": None},
        {"match": "transformer/*.{to_q,to_k}", "weights": ["int4-g64", "int4-g128"], "why": ""},
        {"match": "*", "weights": "keep", "why": "the rest", "activations": "keep"},
    ],
    "prepare": [{"use": "rotate"}],
    "round": {"use": "gptq", "damping": 0.01},
    "refine": [],
}


def _artifact(folder: Path) -> Path:
    make_artifact(folder)
    [query] = Artifact.open(folder).manifest.layers
    key = replace(query, name=KEY, format="int4-g64", reason="budget: cheap here", bytes_after=12)
    none = dict.fromkeys(("error", "held_out", "g1_db", "g2_db", "limit_db"))
    out = replace(query, name=OUT, format="fp16", how="", reason="the rest", bytes_after=32, **none)
    rewrite_manifest(
        folder,
        layers=(query, key, out),
        recipe={
            "name": "fake", "digest": "ab" * 32, "document": DOCUMENT,
            "calibration": {"name": "wide", "text": "26 own trajectories"},
            "left_out": [{"step": "refine recover", "reason": "too large"}],
        },
        source={"model": "org/some@1", "family": "wan", "files": {"a.json": "cd" * 32}},
        lineage=({"stage": "quantize", "version": "7", "digest": "ef" * 32},
                 EXPORT),
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _artifact(tmp_path_factory.mktemp("explained") / "artifact")


@pytest.fixture(scope="module")
def manifest(artifact: Path) -> Manifest:
    return Artifact.open(artifact).manifest


def test_every_layer_is_counted_under_the_rule_that_decided(manifest: Manifest) -> None:
    rules = artifact_story(manifest)["rules"]
    assert [rule["layers"] for rule in rules] == [0, 2, 1]
    assert rules[1]["formats"] == {"int4-g128": 1, "int4-g64": 1}
    assert (rules[1]["bytes_before"], rules[1]["bytes_after"]) == (64, 22)
    assert rules[2]["why"] == "the rest"


def test_a_story_is_json_and_says_where_it_came_from(manifest: Manifest) -> None:
    told = json.loads(json.dumps(artifact_story(manifest)))
    assert told["source"] == {
        "model": "org/some@1",
        "family": "wan",
        "files": {"a.json": "cd" * 32},
    }
    assert told["stages"][0] == {"stage": "quantize", "version": "7", "digest": "ef" * 32}
    assert told["calibration"]["text"] == "26 own trajectories"


def test_a_layers_story(manifest: Manifest) -> None:
    told = layer_story(manifest, KEY)
    assert told["rule"]["rule"] == 1
    assert told["rule"]["match"] == "transformer/*.{to_q,to_k}"
    assert (told["bits"], told["place"]) == (6.0, [2, 3])
    assert told["beside"]["before"]["name"] == QUERY
    assert told["beside"]["after"] == {"name": OUT, "format": "fp16", "error": None}
    assert "before" not in layer_story(manifest, QUERY)["beside"]
    assert "after" not in layer_story(manifest, OUT)["beside"]


def test_a_misspelt_layer(manifest: Manifest) -> None:
    with pytest.raises(UsageError, match=r"did you mean 'transformer/blocks\.0\.attn1\.to_k'"):
        layer_story(manifest, "transformer/blocks.0.attn1.to_kk")
    with pytest.raises(UsageError, match="it has 3"):
        layer_story(manifest, "?")


def _layer(manifest: Manifest, **changes: object) -> LayerFate:
    return replace(manifest.layers[0], **changes)  # type: ignore[arg-type]


def test_errors_in_words(manifest: Manifest) -> None:
    told = list(errors_in_words(_layer(manifest, error=0.01, held_out=0.02)))
    assert told[0] == "its output's error is -20.0 dB (1.000%) of its power on the calibration rows"
    assert told[2] == "so it errs 3.0 dB more on what it has not seen"
    assert told[-1] == "it is 4.0 dB above the rate-distortion limit at the bits stored"
    alike = list(errors_in_words(_layer(manifest, error=0.01, held_out=0.01)))
    assert not any("has not seen" in one for one in alike)
    exact = list(errors_in_words(_layer(manifest, error=0.0, held_out=0.0)))
    assert exact[0].startswith("its output's error is nothing of")
    [kept] = errors_in_words(_layer(manifest, error=None, how=""))
    assert "not rounded" in kept
    [blind] = errors_in_words(_layer(manifest, error=None))
    assert "needed no statistics" in blind


def test_an_artifact_does_not_differ_from_itself(manifest: Manifest) -> None:
    told = difference(manifest, manifest)
    assert told["same"]
    assert told["reasons"] == []
    assert told["layers"]["same"] == 3


def _changed(manifest: Manifest) -> tuple[FileRecord, ...]:
    return tuple(
        replace(one, sha256="0" * 64) if one.path == "transformer/model.onnx.data" else one
        for one in manifest.files
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "sums were made in another order"),
        ({"made_with": {"hbxt_compress": "1"}}, "other versions: hbxt_compress 0 and 1"),
        (
            {"source": {"model": "m", "family": "wan", "files": {"a.json": "0" * 64}}},
            "other source files: a.json",
        ),
        (
            {
                "lineage": (
                    {"stage": "quantize", "version": "8"},
                    {"stage": "export", "version": "6"},
                )
            },
            "other versions of stages: quantize 7 and 8",
        ),
        (
            {"recipe": {"name": "b", "digest": "9" * 64, "document": {**DOCUMENT, "prepare": []}}},
            "recipes that differ in prepare (fake abababababab, b 999999999999)",
        ),
        ({"text_length": 9, "session": {"a": "b"}}, "another session"),
    ],
)
def test_why_two_differ(manifest: Manifest, changes: dict[str, Any], reason: str) -> None:
    other = replace(manifest, files=_changed(manifest), **changes)
    told = difference(manifest, other)
    assert not told["same"]
    assert told["files"]["differing"] == ["transformer/model.onnx.data"]
    assert any(reason in one for one in told["reasons"])


def test_layers_and_files_that_differ_are_named(manifest: Manifest) -> None:
    layers = (_layer(manifest, error=0.5, format="int8"), *manifest.layers[1:2])
    told = difference(manifest, replace(manifest, layers=layers, files=manifest.files[1:]))
    assert told["layers"]["differing"] == {"format": [QUERY], "error": [QUERY]}
    assert (told["layers"]["same"], told["layers"]["only_first"]) == (1, [OUT])
    assert told["files"]["only_first"] == [manifest.files[0].path]
    assert not told["same"]


def _run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["explain", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_the_command(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, artifact)
    assert code == 0
    for said in ("recipe fake", "cdcdcdcd", "stage quantize version 7 efef", "left out: too large",
                 "calibration: wide, 26 own", "round: gptq (damping 0.01)"):  # fmt: skip
        assert said in out
    code, out, _ = _run(capsys, artifact, KEY)
    assert "rule 1 is the first that matches" in out
    assert "int4-g64 or int4-g128" in out
    code, out, _ = _run(capsys, artifact, KEY, "--json")
    assert json.loads(out)["name"] == KEY
    code, out, _ = _run(capsys, artifact, "--layers", "--json")
    assert json.loads(out) == [QUERY, KEY, OUT]
    code, out, _ = _run(capsys, artifact, "--layers")
    assert "budget: cheap here" in out
    code, out, _ = _run(capsys, artifact, "--against", artifact)
    assert "the same: 14 files, 3 layers" in out
    make_artifact(tmp_path / "other")
    code, out, _ = _run(capsys, artifact, "--against", tmp_path / "other")
    assert "because of other source files: a.json" in out
    code, _, err = _run(capsys, artifact, KEY, "--layers")
    assert (code, "one of them" in err) == (2, True)
    code, _, err = _run(capsys, artifact, "x")
    assert (code, "none of that name" in err) == (2, True)
