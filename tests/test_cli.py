"""The command line as a person meets it: what it prints, how it fails, and with which exit code."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import pytest

from hbxt_compress import cli, ending, evaluation, library, pipeline
from hbxt_compress.artifact import Artifact
from hbxt_compress.clips import read_video
from hbxt_compress.costs import prediction
from hbxt_compress.costs.work import KINDS, Rates
from hbxt_compress.errors import SourceError
from hbxt_compress.machine import Machine
from hbxt_compress.recipe import load_recipe
from hbxt_compress.report import SCHEMA, Measurement, QualityReport, Verdict
from hbxt_compress.store import Store
from hbxt_compress.tile import Tile
from tests.fake_artifact import make_artifact


class Run:
    """Runs `hbxt` in this process; keeps what it said."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> int:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        self.out, self.err = self._capsys.readouterr()
        assert "Traceback" not in self.err
        return int(caught.value.code or 0)


@pytest.fixture
def hbxt(capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(capsys)


@pytest.fixture(autouse=True)
def _known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is not measured, which takes seconds."""
    rates = Rates(machine="test", per_second=dict.fromkeys(KINDS, 1e9), n_cores=2, is_compiled=True)
    monkeypatch.setattr(pipeline, "find_rates", lambda *_, **__: rates)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that generates."""
    folder = tmp_path_factory.mktemp("artifact") / "fake"
    make_artifact(folder)
    return folder


def test_help_answers_at_once() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(
        [sys.executable, "-m", "hbxt_compress", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    for command in (
        "quantize",
        "evaluate",
        "generate",
        "plan",
        "recipes",
        "show",
        "status",
        "verify",
    ):
        assert f"\n  {command} " in run.stdout
    assert spent < 0.5, f"{spent:.2f} s of CPU time"


@pytest.mark.parametrize("command", sorted(cli.hbxt.commands))
def test_every_command_explains_itself(command: str, hbxt: Run) -> None:
    assert hbxt(command, "--help") == 0
    first = cli.hbxt.commands[command].get_short_help_str(100)
    assert not first.endswith("...")
    assert first in hbxt.out


def test_wrong_usage_is_exit_code_2(hbxt: Run) -> None:
    for arguments in (["nope"], ["plan"], ["plan", "--depth", "3", "w4a16"], ["generate", "x"]):
        assert hbxt(*arguments) == 2
        assert hbxt.err


def test_recipes_are_listed(hbxt: Run) -> None:
    assert hbxt("recipes") == 0
    assert all(name in hbxt.out for name in library.names("recipes"))
    assert hbxt("recipes", "--json") == 0
    assert [r["name"] for r in json.loads(hbxt.out)] == list(library.names("recipes"))


def test_show_prints_defaults_and_the_digest(hbxt: Run) -> None:
    assert hbxt("show", "w4a16") == 0
    shown = json.loads(hbxt.out)
    assert shown["digest"] == load_recipe("w4a16").digest
    assert shown["round"]["use"] == "gptq"
    assert shown["round"]["damping"] == [0.001, 0.01, 0.1]  # a default


def test_an_unknown_recipe_is_exit_code_2_with_a_suggestion(hbxt: Run) -> None:
    for command in ("show", "plan", "quantize", "status"):
        assert hbxt(command, "w4a61") == 2
        assert "unknown recipe 'w4a61' (did you mean 'w4a16'?)" in hbxt.err
        assert hbxt.out == ""


def test_every_mistake_of_a_recipe_is_told_at_once(hbxt: Run, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = library.find("recipes", "tiny").read_text()
    path.write_text(text.replace("calibration:", "calibraton:").replace("use: gptq", "use: gptx"))
    assert hbxt("plan", path) == 2
    assert "calibraton: unknown key (did you mean 'calibration'?)" in hbxt.err
    assert "calibration: missing" in hbxt.err
    assert "round.use: unknown name 'gptx'" in hbxt.err
    assert hbxt.err.count(f"{path}:") == 3


def test_plan_tells_every_fate_and_the_sizes(hbxt: Run, micro_wan: Path) -> None:
    assert hbxt("plan", "w4a16-fast", "--model", micro_wan) == 0
    for text in ("int4-g128", "transformer", "text_encoder", "vae_decoder", "bits a weight"):
        assert text in hbxt.out
    assert hbxt("plan", "w4a16-fast", "--model", micro_wan, "--json") == 0
    planned = json.loads(hbxt.out)
    assert planned["recipe"]["digest"] == load_recipe("w4a16-fast").digest
    sizes = planned["components"]["transformer"]
    assert sizes["after"] < sizes["before"]
    formats = {layer["weights"] for layer in planned["layers"]}
    assert formats == {"int4-g128", "int4-row-g128", "fp16"}
    assert all(layer["reason"] for layer in planned["layers"])


def test_plan_says_what_a_model_is_too_large_for(
    hbxt: Run, micro_wan: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    text = library.find("recipes", "w4a16-fast").read_text()
    recipe.write_text(f"{text}\nrefine: [{{use: solver, largest: 1.0e+5}}]\n")
    assert hbxt("plan", recipe, "--model", micro_wan) == 0
    assert "refine solver: left out: text_encoder has 0." in hbxt.out
    assert hbxt("plan", recipe, "--model", micro_wan, "--json") == 0
    (left_out,) = json.loads(hbxt.out)["left_out"]
    assert "over its limit of 0.1 M" in left_out["reason"]


def test_plan_of_a_budget_says_what_each_layer_would_cost(
    hbxt: Run, micro_wan: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    text = library.find("recipes", "w4a16").read_text()
    recipe.write_text(text.replace("calibration: standard", "calibration: tiny"))
    asked = ("plan", recipe, "--model", micro_wan, "--store", tmp_path / "store")
    assert hbxt(*asked) == 0
    assert "decided by" in hbxt.out
    assert hbxt(*asked, "--layers") == 0
    assert "budget:" in hbxt.out
    assert hbxt(*asked, "--json") == 0
    layers = json.loads(hbxt.out)["layers"]
    chosen = [layer for layer in layers if layer["reason"].startswith("budget:")]
    assert len({layer["weights"] for layer in chosen}) > 1
    assert all("bytes more and save" in layer["reason"] for layer in chosen)
    n_weights = sum(math.prod(layer["shape"]) for layer in chosen)
    assert 8 * sum(layer["bytes_after"] for layer in chosen) <= 4.25 * n_weights


def test_plan_predicts_by_stage_before_anything_is_measured(
    hbxt: Run, micro_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object, **__: object) -> None:
        raise AssertionError("a stage was run")

    monkeypatch.setattr(Store, "result", measured)
    asked = ("plan", "w4a16", "--model", micro_wan, "--store", tmp_path, "--predict")
    assert hbxt(*asked, "--json", "--out", tmp_path / "out") == 0
    told = json.loads(hbxt.out)["predicted"]
    named = [stage["stage"] for stage in told["stages"]]
    stages = ["read", "calibrate", "probe", "quantize", "refine", "ranges", "export", "copy"]
    assert named == stages
    for total, key, joined in (
        ("seconds", "seconds", sum), ("disk_bytes", "disk_bytes", sum),
        ("peak_rss_bytes", "peak_rss_bytes", max),
    ):  # fmt: skip
        assert told[total] == joined(stage[key] for stage in told["stages"]) > 0
    assert told["most_disk_bytes"] >= told["disk_bytes"]
    assert told["machine"] == "test"
    assert hbxt(*asked) == 0
    assert "prediction: w4a16" in hbxt.out
    assert "machine: test" in hbxt.out


def test_quantize_refuses_what_the_machine_has_no_room_for(
    hbxt: Run, micro_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(*_: object, **__: object) -> Path:
        raise SourceError("begun")

    monkeypatch.setattr(pipeline, "compress", begun)
    monkeypatch.setattr(pipeline, "is_small", lambda *_: False)
    monkeypatch.setattr(prediction, "free_memory", lambda: 10**8)
    monkeypatch.setattr(prediction, "free_bytes", lambda _: 1000)
    asked = ("quantize", "w4a16-fast", "--model", micro_wan, "--store", tmp_path / "store")
    assert hbxt(*asked, "--out", tmp_path / "out") == 2
    assert "recipe w4a16-fast needs more than this machine has" in hbxt.err
    assert "memory: 0.6 GB at the peak of export, 0.1 GB are available" in hbxt.err
    assert f"disk: 0.0 GB for {tmp_path / 'store'}" in hbxt.err
    assert "--force" in hbxt.err
    assert "begun" not in hbxt.err
    assert hbxt(*asked, "--force") == 2
    assert hbxt.err == "error: begun\n"


@pytest.mark.parametrize("name", library.names("recipes"))
def test_every_recipe_plans_on_a_small_wan(name: str, micro_wan: Path, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    plan = pipeline.plan(recipe, str(micro_wan), Store(tmp_path), machine=Machine())
    assert {layer.spec.component for layer in plan.layers} == {
        "transformer",
        "text_encoder",
        "vae_decoder",
    }


def test_a_rule_that_matches_nothing_is_exit_code_2(
    hbxt: Run, tmp_path: Path, micro_wan: Path
) -> None:
    path = tmp_path / "mine.yaml"
    text = library.find("recipes", "tiny").read_text()
    path.write_text(text.replace(".ffn.net.", ".ffm.net."))
    assert hbxt("plan", path, "--model", micro_wan) == 2
    assert "matches none of the model's" in hbxt.err
    assert "ffm" in hbxt.err


def test_a_model_that_is_not_there_is_exit_code_2(hbxt: Run, tmp_path: Path) -> None:
    assert hbxt("plan", "w4a16", "--model", tmp_path / "none") == 2
    assert "no such folder" in hbxt.err


def test_an_interrupt_and_an_error_of_the_system_say_how_to_go_on(
    hbxt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_with(error: BaseException) -> None:
        def plan(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(pipeline, "plan", plan)

    fail_with(KeyboardInterrupt())
    assert hbxt("plan", "w4a16") == 130
    assert hbxt.err == "\nstopped by SIGINT; run the same command to continue\n"
    fail_with(OSError(5, "Input/output error", "/x/y"))
    assert hbxt("plan", "w4a16") == 1
    assert hbxt.err == (
        "error: [Errno 5] Input/output error: '/x/y'\n"
        "once this is mended, the same command continues\n"
    )
    error = SourceError("a shard is gone")
    error.add_note("2 of 3 pieces are finished under x.partial")
    fail_with(error)
    assert hbxt("plan", "w4a16") == 2
    assert hbxt.err == (
        "error: a shard is gone\n2 of 3 pieces are finished under x.partial; "
        "once this is mended, the same command continues\n"
    )


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--debug", "show", "w4a61"])
    assert "Traceback" in capsys.readouterr().err


def test_copy_makes_a_recipe_of_one_s_own(hbxt: Run, tmp_path: Path) -> None:
    path = tmp_path / "My recipe.yaml"
    assert hbxt("copy", "w8a16", path) == 0
    mine = load_recipe(str(path))
    assert mine.name == "my-recipe"
    assert mine.rules == load_recipe("w8a16").rules
    assert hbxt("copy", "w4a16", path) == 2
    assert "exists already" in hbxt.err
    assert load_recipe(str(path)) == mine


def test_generate_writes_a_clip(hbxt: Run, artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "clip.mp4"
    arguments = ["--prompt", "a red circle", "--out", out, "--provider", "cpu"]
    assert hbxt("generate", artifact, *arguments) == 0
    assert out.stat().st_size > 0
    assert str(out) in hbxt.out
    assert "cpu" in hbxt.out
    assert "denoising" in hbxt.err


def test_generate_decodes_in_tiles(hbxt: Run, tmp_path: Path) -> None:
    names = {"first": "model_tile_first_8x16.onnx", "next": "model_tile_8x16.onnx"}
    folder = make_artifact(tmp_path / "a", tile=Tile(height=8, width=16, overlap=0, **names))
    out = tmp_path / "clip.mp4"
    assert hbxt("-v", "generate", folder, "--prompt", "a red circle", "--out", out, "--tiled") == 0
    assert len(read_video(out)) == 9
    assert "vae_decoder/model_tile_8x16.onnx runs on" in hbxt.err


def test_generate_in_tiles_needs_them(hbxt: Run, artifact: Path, tmp_path: Path) -> None:
    arguments = ["--prompt", "x", "--out", tmp_path / "clip.mp4", "--tiled"]
    assert hbxt("generate", artifact, *arguments) == 2
    assert "has no graphs for tiles of frames of 16 x 16 pixels" in " ".join(hbxt.err.split())
    assert not list(tmp_path.glob("*.mp4"))


def test_generate_refuses_what_it_cannot_do(hbxt: Run, artifact: Path, tmp_path: Path) -> None:
    assert hbxt("generate", artifact, "--prompt", "x", "--out", tmp_path / "clip.avi") == 2
    assert "clips are written as .mp4" in hbxt.err
    assert hbxt("generate", artifact, "--prompt", "x", "--steps", "0") == 2
    assert hbxt("generate", tmp_path, "--prompt", "x", "--out", tmp_path / "c.mp4") == 2
    assert not list(tmp_path.glob("*.mp4"))


def test_verify_accepts_a_whole_artifact_and_names_a_changed_file(
    hbxt: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "artifact"
    make_artifact(folder)
    assert hbxt("verify", folder) == 0
    assert "as the manifest says" in hbxt.out
    victim = folder / "transformer" / "config.json"
    victim.write_bytes(victim.read_bytes()[:-1] + b" ")
    for command in (["verify"], ["generate", "--prompt", "x"], ["evaluate"]):
        assert hbxt(command[0], folder, *command[1:]) == 2
        assert "transformer/config.json" in hbxt.err


def _report(*outcomes: str) -> QualityReport:
    verdicts = tuple(
        Verdict(metric=f"m{i}", limit=1.0, outcome=outcome, reason="because")  # type: ignore[arg-type]
        for i, outcome in enumerate(outcomes)
    )
    one = Measurement(
        metric="m0",
        value=2.0,
        interval=(1.5, 2.5),
        n=4,
        unit="dB",
        direction="higher",
        note="a note",
    )
    return QualityReport(
        schema=SCHEMA, recipe={"name": "r"}, source={}, suite={}, n_clips=4, components={},
        bytes_before=2000, bytes_after=1000, measurements=(one,), curves={}, layers=(),
        verdicts=verdicts, conclusion="so it is", clips=(), made_with={},
        artifact="", seconds={}, controls=(), findings=(), baseline=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        (["pass"], 0),
        ([], 0),
        (["pass", "fail"], 3),
        (["undecided"], 4),
        (["undecided", "fail"], 3),
    ],
)
def test_verdicts_become_exit_codes(
    outcomes: list[str], code: int, hbxt: Run, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: _report(*outcomes))
    assert hbxt("evaluate", artifact, "--suite", "tiny", "--no-bisect") == code
    assert "1.5 .. 2.5" in hbxt.out
    assert "a note" in hbxt.out
    assert "so it is" in hbxt.out
    assert ("because" in hbxt.out) == (code != 0)
    assert hbxt("evaluate", artifact, "--suite", "tiny", "--json", "--no-bisect") == code
    assert QualityReport.from_json(json.loads(hbxt.out)) == _report(*outcomes)


def test_evaluate_takes_the_suite_that_the_recipe_promises_on(
    hbxt: Run, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Artifact.open(artifact)
    document = {"document": {"accept": {"suite": "tiny"}}}
    opened = replace(whole, manifest=replace(whole.manifest, recipe=document))
    monkeypatch.setattr(Artifact, "open", lambda *_, **__: opened)
    asked = []

    def evaluate(folder: Path, suite: object, *_: object, **__: object) -> QualityReport:
        asked.append(suite)
        return _report("pass")

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    assert hbxt("evaluate", artifact) == 0
    assert [suite.name for suite in asked] == ["tiny"]  # type: ignore[attr-defined]
    assert hbxt("evaluate", artifact, "--suite", "tyni") == 2
    assert "unknown suite 'tyni' (did you mean 'tiny'?)" in hbxt.err


def test_a_stop_that_a_library_turned_into_its_own_error_is_told_as_a_stop(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @click.command()
    def command() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except BaseException:
            wrong = ValueError("could not determine the shape of object")
            wrong.add_note("1 of 4 pieces are finished")
            raise wrong from None

    with pytest.raises(SystemExit) as ended:
        ending.run(command, [])
    assert ended.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; 1 of 4 pieces are finished; run" in capsys.readouterr().err
