"""Tables: rounded, used and exported by rows, to what the whole would have given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hbxt_compress.algorithms.rtn import Rtn
from hbxt_compress.errors import CalibrationError, ExportError, PlanError, SourceError
from hbxt_compress.formats import FORMATS
from hbxt_compress.graph import storage
from hbxt_compress.graph.export import export_component
from hbxt_compress.graph.obeyed import check_component
from hbxt_compress.graph.parity import run_graph
from hbxt_compress.layers import LayerName
from hbxt_compress.machine import Machine
from hbxt_compress.models import family_of
from hbxt_compress.plan import LayerPlan, make_plan
from hbxt_compress.quantized import QuantizedModel
from hbxt_compress.recipe import Recipe
from hbxt_compress.source import Source
from hbxt_compress.stages import by_rows
from hbxt_compress.stages import quantize as quantizing
from hbxt_compress.stages.quantize import quantize
from hbxt_compress.stages.refine import refine
from hbxt_compress.stages.tables import use_tables
from hbxt_compress.store import Entry, Work
from hbxt_compress.weights import Weights
from tests.look_up import TABLE, export_table, look_up_graphs, round_table, write_table
from tests.observed import changed, observed, source_of

_NAME = LayerName("text_encoder/shared")
_BIAS = LayerName("text_encoder/encoder.block.1.layer.0.SelfAttention.relative_attention_bias")
_FORMATS = ("int8-row", "int4-row-g32")


@pytest.fixture
def source(micro_wan: Path) -> Source:
    return source_of(micro_wan)


def _plan(source: Source, formats: Mapping[LayerName, str], how: Rtn) -> list[LayerPlan]:
    specs = {spec.name: spec for spec in family_of(source).layers(source)}
    return [
        LayerPlan(spec=specs[name], weights=fmt, activations="keep", how=how, rule=0, reason="test")
        for name, fmt in formats.items()
    ]


def _quantized(source: Source, folder: Path, fmt: str, *shown: object) -> QuantizedModel:
    folder.mkdir()
    planned = _plan(source, {_NAME: fmt, _BIAS: "int8-row"}, Rtn())
    quantize(Work(folder), source, planned, Machine(), *shown)
    return QuantizedModel.load(folder)


@pytest.mark.parametrize("fmt", _FORMATS)
def test_a_table_is_rounded_by_rows_to_what_the_whole_gives(
    fmt: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_rows, "NUMBERS_AT_ONCE", 5 * 128 + 1)  # 5 rows, of 32
    found = _quantized(source, tmp_path / "q", fmt).weights
    assert [path.name for path in (tmp_path / "q").iterdir()] == ["text_encoder.tables.safetensors"]
    assert found.keys() == {_NAME, _BIAS}
    stored = family_of(source).weights(source, "text_encoder")
    for name, weight in found.items():
        whole_OI = stored.tensor(f"{name.removeprefix('text_encoder/')}.weight")
        own = FORMATS[weight.format]
        expected = Rtn().round(whole_OI, None, own).payload
        assert weight.payload.keys() == expected.keys()
        assert all(torch.equal(weight.payload[key], expected[key]) for key in expected)
        lost = (own.decode(expected) - whole_OI).double().square().sum()
        assert weight.loss.error == pytest.approx(float(lost / whole_OI.double().square().sum()))


def test_a_table_with_nan_or_a_rounder_that_refuses_is_named(
    micro_wan: Path, source: Source, tmp_path: Path
) -> None:
    def spoil(name: str, tensor: Tensor) -> Tensor:
        return tensor * float("nan") if name == f"{_NAME}.weight" else tensor

    spoilt = source_of(changed(micro_wan, tmp_path / "wan", spoil))
    with pytest.raises(SourceError, match=r"shared\.weight holds NaN or infinity"):
        _quantized(spoilt, tmp_path / "q", "int8-row")
    weighted = _plan(source, {_NAME: "int8-row"}, Rtn(search="weighted"))
    (tmp_path / "w").mkdir()
    with pytest.raises(CalibrationError, match=r"text_encoder/shared \[32, 128\].*calibrate"):
        quantize(Work(tmp_path / "w"), source, weighted, Machine())


def test_a_table_that_would_need_its_inputs_is_refused_by_the_plan(source: Source) -> None:
    rules = (
        {"match": "text_encoder/shared", "weights": "int8-row", "round": {"use": "gptq"}},
        {"match": "transformer/*", "weights": "int4-row-g128", "why": "test"},
        {"match": "*", "weights": "keep", "why": "test"},
    )
    recipe = Recipe.model_validate_json(
        json.dumps(
            {
                "name": "t", "summary": "s", "calibration": "tiny", "rules": rules,
                "round": {"use": "rtn"}, "accept": {"suite": "tiny"},
            }
        )
    )  # fmt: skip
    family = family_of(source)
    with pytest.raises(PlanError, match="inputs of a embedding are not observed") as caught:
        make_plan(recipe, family.layers(source), family.parameters(source))
    assert "int4-row-g128 stores only tables that are looked up, this is a linear" in str(
        caught.value
    )


def _decoded(source: Source, weights: QuantizedModel) -> nn.Module:
    """The text encoder with decoded tables in full, under every name."""
    module = family_of(source).load(source, "text_encoder")
    for name, weight in weights.weights.items():
        whole = nn.Parameter(FORMATS[weight.format].decode(weight.payload), requires_grad=False)
        module.get_submodule(name.removeprefix("text_encoder/")).weight = whole
        if name == _NAME:
            module.encoder.embed_tokens.weight = whole
    return module


@pytest.mark.parametrize("fmt", _FORMATS)
def test_a_module_looks_up_rows_as_if_it_had_the_decoded_table(
    fmt: str, source: Source, tmp_path: Path
) -> None:
    family, found = family_of(source), _quantized(source, tmp_path / "q", fmt)
    names = family.weights(source, "text_encoder").second_names
    assert names == {"encoder.embed_tokens.weight": "shared.weight"}
    ids, mask = torch.arange(16)[None] + 1, torch.ones(1, 16, dtype=torch.int64)
    expected = _decoded(source, found)(ids, mask).last_hidden_state
    module = family.load(source, "text_encoder")
    before = module(ids, mask).last_hidden_state
    use_tables(module, "text_encoder", found.weights, names)
    assert torch.equal(module(ids, mask).last_hidden_state, expected)
    assert not torch.allclose(expected, before, rtol=1e-3, atol=1e-3)


def test_later_layers_are_rounded_knowing_what_a_table_lost(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The walk's second model looks rows up in the quantized table; refine passes tables on."""
    seen, outputs = observed(source, tmp_path / "seen"), {}
    walk = quantizing.walk

    def watched(*arguments: object):
        for station in walk(*arguments):
            yield station
            if station.piece == "tail":
                outputs[station.component] = station.sides

    monkeypatch.setattr(quantizing, "walk", watched)
    found = _quantized(source, tmp_path / "q", "int4-row-g32", (), seen, 1)
    sides = outputs["text_encoder"]
    module = _decoded(source, found)
    for batch, (full, half) in zip(sides.batches, sides.outputs, strict=True):
        ids, mask = batch.half
        expected = module(ids, mask).last_hidden_state * mask[..., None]
        torch.testing.assert_close(half, expected, rtol=1e-4, atol=1e-4)
        assert float((half - full).norm()) > 0.01 * float(full.norm())
    (tmp_path / "r").mkdir()
    entry = Entry(folder=tmp_path / "q", stage="quantize", key="k", digest="d")
    refine(Work(tmp_path / "r"), source, entry, seen, 1, (), Machine())
    passed_on = QuantizedModel.load(tmp_path / "r" / "text_encoder.safetensors").weights
    assert passed_on.keys() == found.weights.keys()
    for name, weight in found.weights.items():
        assert all(torch.equal(passed_on[name].payload[k], t) for k, t in weight.payload.items())


@pytest.mark.parametrize("fmt", ["fp16", "int8-row", "int4-row-g128"])
def test_an_exported_table_gives_the_decoded_rows_whether_written_whole_or_by_parts(
    fmt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(tmp_path / "t", 1000, 256)
    rounded = round_table(tmp_path / "t", fmt, Rtn()) if "row" in fmt else None
    whole = export_table(tmp_path / "t", fmt, rounded)
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    monkeypatch.setattr(storage, "_NUMBERS_AT_ONCE", 300 * 256)
    parts = export_table(tmp_path / "t", fmt, rounded)
    assert {path.name: path.read_bytes() for path in parts.iterdir()} == files
    assert check_component(parts) == ()
    if rounded is None:
        table = FORMATS[fmt].decode(
            FORMATS[fmt].encode(Weights(tmp_path / "t").tensor("table.weight"), torch.ones(()))
        )
    else:
        table = FORMATS[fmt].decode(rounded.weights[TABLE].payload)
    ids = torch.tensor([[0, 999, 299, 300, 301, 17, 0]])
    (got,) = run_graph(parts / "model.onnx", {"x": ids})
    assert torch.equal(got, F.embedding(ids, table))
    first = onnx.load(parts / "model.onnx", load_external_data=False).graph.node[0]
    assert first.op_type == "Gather"  # the table itself is looked up as it is stored
    assert len(files["model.onnx.data"]) == FORMATS[fmt].bytes((1000, 256))


def test_a_table_beyond_float16_is_named_and_so_is_one_that_is_looked_up_twice(
    tmp_path: Path,
) -> None:
    write_table(tmp_path / "t", 1000, 256)
    (file,) = (tmp_path / "t").glob("*.safetensors")
    table = Weights(tmp_path / "t").tensor("table.weight")
    table[700, 3] = 7e4
    save_file({"table.weight": table}, file)
    with pytest.raises(ExportError, match=r"net/table.*70000.*65504"):
        export_table(tmp_path / "t", "fp16", None)
    with pytest.raises(ExportError, match=r"table: two operators look up .*\[1000, 256\]"):
        export_component(tmp_path / "out", look_up_graphs(1000, 256, twice=True), {}, precision=16)


def test_rows_are_read_alone_and_checked(tmp_path: Path) -> None:
    table = torch.arange(40.0).reshape(10, 4).bfloat16()
    table[7, 1] = float("inf")
    save_file({"a": table}, tmp_path / "t.safetensors")
    weights = Weights(tmp_path)
    rows = weights.rows("a", 2, 5)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, table[2:5].float())
    assert torch.equal(weights.rows("a", 8, 99), table[8:].float())
    with pytest.raises(SourceError, match=r"t\.safetensors: a holds NaN or infinity"):
        weights.rows("a", 5, 8)


_MEASURE = """
import re, sys
from pathlib import Path
from hbxt_compress.algorithms.rtn import Rtn
from hbxt_compress.quantized import QuantizedModel
from tests.look_up import export_table, round_table

def peak():  # not ru_maxrss, which a child takes over from the process that started it
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

def growth(step):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in memory
    before = peak()
    step()
    return peak() - before

small, large = map(Path, sys.argv[1:])
how = Rtn(search="none")
export_table(small, "int8-row", round_table(small, "int8-row", how))
print(
    growth(lambda: export_table(large, "fp16", None)),
    growth(lambda: round_table(large, "int8-row", how)),
    growth(lambda: export_table(large, "int8-row", QuantizedModel.open(large / "int8-row.block"))),
)
"""


@pytest.mark.timeout(180)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts peak memory")
def test_a_table_is_never_whole_in_float32(tmp_path: Path) -> None:
    """60000 x 512 numbers: 123 MB in float32, 31 in 8 bit. A small table warms everything up."""
    n_rows, n_features = 60000, 512
    write_table(tmp_path / "small", 3000, n_features)
    write_table(tmp_path / "large", n_rows, n_features)
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "small"), str(tmp_path / "large")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    export_16, rounding, export_8 = map(int, run.stdout.split())
    n_numbers = n_rows * n_features
    assert export_16 < 2 * n_numbers  # bytes: half of it in float32
    assert rounding < 3 * n_numbers  # its codes are kept
    assert export_8 < n_numbers
    table = Weights(tmp_path / "large").unchecked("table.weight")
    ids = torch.tensor([[0, 1, 31337, 59999, 2048, 2047, 5]])
    (got,) = run_graph(tmp_path / "large" / "out-fp16" / "model.onnx", {"x": ids})
    assert torch.equal(got, F.embedding(ids, table).half().float())
    codes = QuantizedModel.open(tmp_path / "large" / "int8-row.block").weights[TABLE]
    (got,) = run_graph(tmp_path / "large" / "out-int8-row" / "model.onnx", {"x": ids})
    rows = {key: tensor[ids.flatten()] for key, tensor in codes.payload.items()}
    decoded = FORMATS["int8-row"].decode(rows)[None]
    assert float((got - decoded).norm()) <= 1e-6 * float(decoded.norm())
    assert float((got - F.embedding(ids, table)).norm()) < 0.01 * float(decoded.norm())
    assert np.isclose(codes.loss.error, 0, atol=1e-4)
