"""`hbxt check`: each rule of each table on a small graph made for it, and no alarm on good ones."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest

from hbxt_compress.cli import main
from hbxt_compress.errors import ArtifactError, UsageError
from hbxt_compress.graph.check import check_targets
from hbxt_compress.graph.judge import Judgement, judge, read_graph
from hbxt_compress.graph.table import (
    DEFAULT_TARGETS,
    MODEL,
    RUNTIMES,
    VERDICTS,
    default_runtime,
    table,
)
from tests.small_graphs import BAD, GOOD, Bad


def _judged(path: Path, runtime: str, target: str) -> Judgement:
    return judge([read_graph(path)], table(runtime), target)


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: f"{bad.runtime}: {bad.name}")
def test_a_bad_graph_gets_its_verdict(bad: Bad, tmp_path: Path) -> None:
    found = _judged(bad.write(tmp_path), bad.runtime, bad.target).nodes
    about = [one for one in found if bad.op in (None, one.op)]
    worst = max(about, key=lambda one: VERDICTS.index(one.verdict))
    assert worst.verdict == bad.verdict, worst
    said = [one.reason for one in about if one.verdict == bad.verdict]
    assert any(bad.says in reason for reason in said), said


def test_the_corpus_is_large_and_no_two_graphs_are_called_the_same() -> None:
    assert len(BAD) >= 60
    assert max(Counter(one.name for one in (*BAD,)).values()) == 1


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("target", DEFAULT_TARGETS)
def test_a_good_graph_gives_no_alarm(name: str, target: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(GOOD[name], path)
    found = _judged(path, default_runtime(target), target)
    assert [one for one in found.nodes if one.verdict != "runs"] == []
    assert found.passes


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_rule_of_a_table_has_a_graph_that_it_was_made_for(
    runtime: str, tmp_path: Path
) -> None:
    rules = table(runtime).rules
    some = [one for one in DEFAULT_TARGETS if table(runtime).computes_on(one)]
    said = set[str]()
    for i, bad in enumerate(BAD):
        folder = tmp_path / str(i)
        folder.mkdir()
        graph = read_graph(bad.write(folder))
        for target in some:
            found = judge([graph], table(runtime), target).nodes
            said |= {reason for one in found for reason in one.reason.split("; ")}
    without = [rule.reason for rule in rules if not set(rule.reason.split("; ")) <= said]
    assert not without


@pytest.mark.parametrize(
    "bad", [one for one in BAD if one.runtime == "cpu" and one.target == "cpu"],
    ids=lambda bad: bad.name,
)  # fmt: skip
def test_the_processor_itself_agrees(bad: Bad, tmp_path: Path) -> None:
    """ONNX Runtime refuses what is said to fail, and takes what is said to be slow."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    path = str(bad.write(tmp_path))
    if bad.verdict == "fails":
        with pytest.raises(Exception):  # noqa: B017, PT011
            ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    else:
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def test_what_the_processor_takes_is_what_the_installed_runtime_has() -> None:
    own = table("cpu")
    if ort.__version__ != own.version:
        pytest.skip(f"the table is of ONNX Runtime {own.version}, here is {ort.__version__}")
    from tests.bench.cpu_kernels import kernels

    for (domain, name), types in kernels().items():
        assert set(own.takes(domain, name) or ()) == (types or set(own.types)), (domain, name)


def test_more_than_ten_unsupported_nodes_leave_the_whole_graph_to_the_cpu(tmp_path: Path) -> None:
    over = next(one for one in BAD if one.name == "eleven unknown operators")
    found = _judged(over.write(tmp_path), "migraphx", "gfx1201")
    assert found.cliff == ("model.onnx",)
    assert not found.passes
    ten = onnx.ModelProto()
    ten.CopyFrom(over.model)
    del ten.graph.node[-1]
    ten.graph.node[-1].output[0] = "y"
    onnx.save(ten, tmp_path / "ten.onnx")
    assert _judged(tmp_path / "ten.onnx", "migraphx", "gfx1201").passes
    assert _judged(tmp_path / "model.onnx", "amdgpu", "gfx1201").passes, "the plug-in has no cliff"


def test_nodes_that_would_run_say_that_they_are_over_the_cliff(tmp_path: Path) -> None:
    over = next(one for one in BAD if one.name == "eleven unknown operators")
    mixed = onnx.ModelProto()
    mixed.CopyFrom(over.model)
    mixed.graph.node.add(op_type="Neg", input=["x"], output=["z"], name="fine")
    mixed.graph.output.add().CopyFrom(mixed.graph.output[0])
    mixed.graph.output[1].name = "z"
    onnx.save(mixed, tmp_path / "model.onnx")
    fine = next(
        one
        for one in _judged(tmp_path / "model.onnx", "migraphx", "gfx1100").nodes
        if one.node == "fine"
    )
    assert fine.verdict == "falls_back"
    assert "with more than 10 the provider takes none" in fine.reason


def test_a_graph_is_judged_with_the_environment_that_is_set_for_it(tmp_path: Path) -> None:
    attention = next(one for one in BAD if one.name == "attention on RDNA")
    graphs, own = [read_graph(attention.write(tmp_path))], table("migraphx")
    assert judge(graphs, own, "gfx1201").counts()["slow"] == 1
    name = "MIGRAPHX_MLIR_USE_SPECIFIC_OPS"
    assert judge(graphs, own, "gfx1201", {name: "convolution,attention"}).counts()["runs"] == 1
    assert judge(graphs, own, "gfx1201", {name: "convolution"}).counts()["slow"] == 1


def test_the_command_prints_json_for_machines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = BAD[0].write(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["check", str(path), "--target", "gfx1201", "--json"])
    assert ended.value.code == 3
    found = json.loads(capsys.readouterr().out)
    assert found["target"] == "gfx1201"
    assert set(found["runtimes"]) == set(RUNTIMES)
    [node] = found["runtimes"]["migraphx"]["nodes"]
    assert (node["verdict"], node["op"]) == ("misparsed", "com.microsoft::MatMulNBits")
    assert found["runtimes"]["migraphx"]["summary"]["misparsed"] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--target", "gfx1201"], 3, "zero points are taken for 8"),
        (["--target", "cpu"], 0, "passes"),
        (["--target", "gfx1201", "--runtime", "cpu"], 3, "not for this target"),
        (["--target", "gfx120"], 2, "did you mean 'gfx1201'?"),
        (["--runtime", "migrafix"], 2, "did you mean 'migraphx'?"),
    ],
)
def test_the_command_ends_with_a_code_and_says_why(
    arguments: list[str], code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = BAD[1].write(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["check", str(path), *arguments])
    assert ended.value.code == code
    told = capsys.readouterr()
    assert says in " ".join((told.out + told.err).split())


def test_what_is_no_graph_is_refused_without_a_traceback(tmp_path: Path) -> None:
    for name, content in {"a.onnx": b"", "b.onnx": b"\x00\x01", "c.onnx": b"text " * 9}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtifactError, match=name):
            check_targets(tmp_path / name)
    with pytest.raises(ArtifactError, match="no such file"):
        check_targets(tmp_path / "none.onnx")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"holds no \*\.onnx"):
        check_targets(tmp_path / "empty")
    with pytest.raises(UsageError, match="unknown"):
        check_targets(tmp_path / "a.onnx", ["gfx1"])


def test_a_folder_of_graphs_is_judged_file_by_file(tmp_path: Path) -> None:
    for i, name in enumerate(("unet", "vae")):
        (tmp_path / name).mkdir()
        onnx.save([*GOOD.values()][i], tmp_path / name / "model.onnx")
    [found] = check_targets(tmp_path, ["cpu"])
    assert {one.file for one in found.runtimes["cpu"].nodes} == {
        "unet/model.onnx",
        "vae/model.onnx",
    }


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_table_says_what_it_was_made_from(name: str) -> None:
    own = table(name)
    assert own.name == name
    assert own.version
    assert own.source
    assert all(rule.source and rule.reason for rule in own.rules)
    known = {f"{domain}::{op}" for domain, ops in own.operators.items() for op in ops}
    only = {key if "::" in key else f"ai.onnx::{key}" for key in own.only}
    assert only <= known, only - known


def test_nodes_of_every_kind_are_judged_once(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    branch = next(one for one in BAD if one.name == "a branch")
    found = _judged(branch.write(tmp_path), "cpu", "cpu").nodes
    assert Counter(one.op for one in found if one.op != MODEL) == {"If": 1, "Neg": 1, "Abs": 1}
