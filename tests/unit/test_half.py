"""Float16 where it pays: which nodes compute in it, what rounding costs, what would overflow."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hbxt_compress import pipeline
from hbxt_compress.artifact import Artifact
from hbxt_compress.costs.prediction import stage_costs
from hbxt_compress.errors import PlanError, RecipeError
from hbxt_compress.graph.capture import DummyInputs
from hbxt_compress.graph.export import export_component
from hbxt_compress.graph.parity import run_graph
from hbxt_compress.machine import Machine
from hbxt_compress.models import family_of
from hbxt_compress.plan import make_plan
from hbxt_compress.recipe import Recipe, load_recipe
from hbxt_compress.source import Source, locate
from hbxt_compress.stages.ranges import read_ranges
from hbxt_compress.store import Store
from tests.half_rounding import round_to_half

_LARGEST = 65504.0


def _source(folder: Path) -> Source:
    return locate(str(folder), hashed=False)


def _exported(source: Source, component: str, folder: Path, **how: object) -> Path:
    """The graph of a component in 16 bit; float32 products unless half=True."""
    family = family_of(source)
    module = family.load(source, component)
    graphs = family.graphs(source, component, module)
    export_component(folder, graphs, {}, precision=16, **how)  # type: ignore[arg-type]
    return folder / "model.onnx"


def _inputs(source: Source, component: str) -> dict[str, Tensor]:
    family = family_of(source)
    graphs = family.graphs(source, component, family.skeleton(source, component)).graphs
    return DummyInputs(graphs["model.onnx"].inputs, 5).all()


def _rounded(file: Path, inputs: dict[str, Tensor]) -> Tensor:
    """What the graph computes if float16 is really rounded to."""
    assert round_to_half(file)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {k: v.numpy() for k, v in inputs.items()})[0])


def _types(file: Path) -> dict[str, set[int]]:
    """Operator -> element types of its outputs."""
    proto = onnx.load(file, load_external_data=False)
    types = {one.name: one.type.tensor_type.elem_type for one in proto.graph.value_info}
    types |= {one.name: one.type.tensor_type.elem_type for one in proto.graph.output}
    found: dict[str, set[int]] = {}
    for node in proto.graph.node:
        found.setdefault(node.op_type, set()).update(types[out] for out in node.output)
    return found


def test_products_are_float16_and_all_else_is_float32(micro_wan: Path, tmp_path: Path) -> None:
    source = _source(micro_wan)
    file = _exported(source, "transformer", tmp_path / "half", half=True)
    half, full = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    for operator, types in _types(file).items():
        wanted = {half} if operator in ("MatMul", "MultiHeadAttention") else {full}
        assert types == ({half, full} if operator == "Cast" else wanted), operator
    proto = onnx.load(file, load_external_data=False)
    made = {out: node for node in proto.graph.node for out in node.output}
    casts = [node for node in proto.graph.node if node.op_type == "Cast"]
    twice = [one.name for one in casts if one.input[0] in made and made[one.input[0]] in casts]
    assert not twice
    stored = {one.name for one in proto.graph.initializer}
    assert not [one.name for one in casts if one.input[0] in stored], "weights are used as they lie"


@pytest.mark.parametrize("component", ["transformer", "vae_decoder"])
def test_what_rounding_costs_is_little_and_not_nothing(
    component: str, micro_wan: Path, tmp_path: Path
) -> None:
    source = _source(micro_wan)
    inputs = _inputs(source, component)
    exact = run_graph(_exported(source, component, tmp_path / "full"), inputs)[0]
    file = _exported(source, component, tmp_path / "half", half=True)
    assert torch.equal(run_graph(file, inputs)[0], exact) or component == "vae_decoder"
    got = _rounded(file, inputs)
    error = float((got - exact).norm() / exact.norm())
    assert 1e-5 < error < 2e-3


def test_a_weight_of_32_bit_and_integer_products_stay(micro_wan: Path, tmp_path: Path) -> None:
    recipe = _recipe("w8a8", float16="transformer")
    store = Store(tmp_path / "store")
    folder = pipeline.compress(recipe, str(micro_wan), store, machine=Machine())
    types = _types(folder / "transformer" / "model.onnx")
    assert types["MatMulInteger"] == {onnx.TensorProto.INT32}
    assert types["MultiHeadAttention"] == {onnx.TensorProto.FLOAT16}
    source = _source(micro_wan)
    family = family_of(source)
    graphs = family.graphs(source, "transformer", family.load(source, "transformer"))
    export_component(tmp_path / "32", graphs, {}, precision=32, half=True)
    assert _types(tmp_path / "32" / "model.onnx")["MatMul"] == {onnx.TensorProto.FLOAT}


@pytest.fixture(scope="module")
def overflowing(micro_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro model with a text encoder whose features pass float16's largest number."""
    folder = Path(shutil.copytree(micro_wan, tmp_path_factory.mktemp("overflow") / "wan"))
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    for name in weights:
        for end, times in (("wi_0.weight", 8), ("wi_1.weight", 8000)):
            if name.endswith(end):
                weights[name] = weights[name] * times
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def test_an_encoder_that_overflows_is_found_and_scaled(overflowing: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    recipe = _recipe("fp16", float16="*", calibration="tiny")
    folder = pipeline.compress(recipe, str(overflowing), store, machine=Machine())
    (found,) = (tmp_path / "store" / "ranges").glob("*/ranges.json")
    ranges = read_ranges(found.parent)
    assert max(ranges.values()) > 2 * _LARGEST
    assert min(ranges.values()) < _LARGEST / 16

    source = _source(overflowing)
    inputs = _inputs(source, "text_encoder")
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    exact = run_graph(_exported(source, "text_encoder", tmp_path / "full"), inputs)[0]
    assert bool(torch.isfinite(exact).all())
    blind = _exported(source, "text_encoder", tmp_path / "blind", half=True)
    assert not bool(torch.isfinite(_rounded(blind, inputs)).all())
    safe = Path(shutil.copytree(folder / "text_encoder", tmp_path / "safe")) / "model.onnx"
    got = _rounded(safe, inputs)
    assert float((got - exact).norm() / exact.norm()) < 3e-3


def test_ranges_are_what_a_plain_forward_shows(micro_wan: Path, tmp_path: Path) -> None:
    from hbxt_compress.prompts import load_prompts
    from hbxt_compress.runtime.text import PromptTokenizer
    from hbxt_compress.stages.ranges import ranges

    prompts = load_prompts("tiny")
    source = locate(str(micro_wan))
    entry = Store(tmp_path / "store").result(
        ranges, source=source, component="text_encoder", prompts=prompts, on=Machine()
    )
    found = json.loads((entry.folder / "ranges.json").read_text())
    encoder = family_of(source).load(source, "text_encoder")
    seen: dict[str, float] = {}
    tokenize = PromptTokenizer(source.folder / "tokenizer", family_of(source).text_length(source))
    for text in (*[prompt for prompt, _ in prompts.items()], ""):
        ids, mask = (torch.from_numpy(one) for one in tokenize(text))
        handles = []
        for name, module in encoder.named_modules():
            if isinstance(module, torch.nn.Linear):
                handles.append(module.register_forward_hook(partial(_note, seen, name, mask)))
        with torch.no_grad():
            encoder(ids, mask)
        for handle in handles:
            handle.remove()
    assert found == pytest.approx({f"text_encoder/{k}": v for k, v in seen.items()}, rel=1e-5)


def _note(
    seen: dict[str, float],
    name: str,
    mask: Tensor,
    _: object,
    given: tuple[Tensor, ...],
    output: Tensor,
) -> None:
    rows = [one[mask.bool()].abs().max().item() for one in (given[0], output)]
    seen[name] = max(*rows, seen.get(name, 0.0))


def test_manifest_and_plan_say_what_computes_in_float16(micro_wan: Path, tmp_path: Path) -> None:
    recipe = _recipe("fp16", float16="{transformer,transformer_2}")
    source = _source(micro_wan)
    family = family_of(source)
    planned = make_plan(recipe, family.layers(source), family.parameters(source))
    assert planned.half == {"transformer"}
    assert planned.to_json()["float16"] == ["transformer"]
    every = make_plan(
        _recipe("fp16", float16="*"), family.layers(source), family.parameters(source)
    )
    costs = stage_costs(_recipe("fp16", float16="*"), every, source, None, copied=False)
    assert "ranges" in {one.stage for one in costs}
    folder = pipeline.compress(recipe, str(micro_wan), Store(tmp_path / "s"), machine=Machine())
    manifest = Artifact.open(folder).manifest
    document = manifest.recipe["document"]
    assert isinstance(document, dict)
    assert document["export"]["float16"] == "{transformer,transformer_2}"
    told = manifest.targets["gfx1201"].settings["migraphx"]
    assert told["environment"] == {"MIGRAPHX_MLIR_USE_SPECIFIC_OPS": "attention"}
    assert manifest.targets["gfx1201"].nodes["fails"] == 0


def test_patterns_and_targets_that_name_nothing_are_refused(micro_wan: Path) -> None:
    source = _source(micro_wan)
    family = family_of(source)
    with pytest.raises(PlanError, match="'unet' names no component of text_encoder, transf"):
        make_plan(_recipe("fp16", float16="unet"), family.layers(source), family.parameters(source))
    with pytest.raises(ValueError, match=r"target 'gfx1202': unknown.*gfx1201"):
        _recipe("fp16", targets=("gfx1202",))
    with pytest.raises(ValueError, match="targets"):
        _recipe("fp16", targets=())
    with pytest.raises((ValueError, RecipeError)):
        _recipe("fp16", float16="{a,b")


def _recipe(name: str, *, calibration: str | None = None, **export: object) -> Recipe:
    document = load_recipe(name).model_dump()
    if calibration is not None:
        document["calibration"] = calibration
    return Recipe.model_validate({**document, "export": export})
