"""Export without a component in memory: the same bytes, and the memory of one weight."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hbxt_compress.errors import ExportError, SourceError
from hbxt_compress.formats import FORMATS, WeightFormat
from hbxt_compress.graph.capture import ComponentGraphs, GraphSpec, TensorSpec, capture
from hbxt_compress.graph.export import export_component
from hbxt_compress.layers import LayerName
from hbxt_compress.models import family_of
from hbxt_compress.plan import Plan, make_plan
from hbxt_compress.quantized import Loss, QuantizedModel, QuantizedWeight
from hbxt_compress.recipe import load_recipe
from hbxt_compress.source import Source, locate
from hbxt_compress.stages import export as stage

_COMPONENTS = ("text_encoder", "transformer", "vae_decoder")


@pytest.fixture
def source(micro_wan: Path) -> Source:
    return locate(str(micro_wan))


@pytest.mark.parametrize("component", _COMPONENTS)
def test_a_skeleton_has_no_weights_but_every_buffer(component: str, source: Source) -> None:
    family = family_of(source)
    skeleton, loaded = family.skeleton(source, component), family.load(source, component)
    assert not skeleton.training
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))  # one is tied
    assert parameters.keys() == dict(loaded.named_parameters()).keys()
    for name, parameter in loaded.named_parameters():
        assert parameters[name].is_meta
        assert parameters[name].shape == parameter.shape
        assert not parameters[name].requires_grad
    buffers = dict(loaded.named_buffers())
    assert component != "transformer" or "rope.freqs_cos" in buffers
    for name, buffer in skeleton.named_buffers():
        assert torch.equal(buffer, buffers[name])


@pytest.mark.parametrize(
    ("component", "name"),
    [
        *(("transformer", name) for name in ("fp32", "int8-channel", "int4-g64-asym-r16")),
        ("text_encoder", "fp16"),
        ("vae_decoder", "int8-channel"),
    ],
)
def test_a_skeleton_is_exported_to_the_bytes_of_the_loaded_component(
    component: str, name: str, source: Source, tmp_path: Path
) -> None:
    family, fmt = family_of(source), FORMATS[name]
    loaded, stored = family.load(source, component), family.weights(source, component)
    planned = {}
    for layer in family.layers(source) if name.startswith("int") else ():
        if layer.component == component and fmt.fits(layer) is None:
            weight_OI = stored.tensor(f"{layer.name.split('/', 1)[1]}.weight").flatten(1)
            planned[layer.name] = (fmt, _nearest(weight_OI, fmt))
    assert bool(planned) == name.startswith("int")
    precision = 32 if name == "fp32" else 16
    whole = family.graphs(source, component, loaded)
    export_component(tmp_path / "whole", whole, planned, precision=precision)
    hollow = family.graphs(source, component, family.skeleton(source, component))
    export_component(tmp_path / "hollow", hollow, planned, precision=precision, read=stored.tensor)
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "hollow").iterdir())
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "hollow" / file).read_bytes()


def _nearest(weight_OI: Tensor, fmt: WeightFormat) -> dict[str, Tensor]:
    if fmt.group is None:
        return dict(fmt.encode(weight_OI, weight_OI.abs().amax(1) / 127))
    return dict(fmt.encode(weight_OI, weight_OI.unflatten(1, (-1, fmt.group)).abs().amax(2) / 7))


def test_a_weight_is_read_once_and_one_with_a_payload_never(source: Source, tmp_path: Path) -> None:
    family, fmt = family_of(source), FORMATS["int8-channel"]
    stored = family.weights(source, "transformer")
    asked: Counter[str] = Counter()

    def read(parameter: str) -> Tensor:
        asked[parameter] += 1
        return stored.tensor(parameter)

    graphs = family.graphs(source, "transformer", family.skeleton(source, "transformer"))
    rounded = "blocks.1.ffn.net.2"
    payload = _nearest(stored.tensor(f"{rounded}.weight"), fmt)
    planned = {LayerName(f"transformer/{rounded}"): (fmt, payload)}
    assert stored.shape(f"{rounded}.weight") == (128, 256)
    capture_small = 1 << 10
    with pytest.MonkeyPatch.context() as patch:  # so that a micro model has large weights
        patch.setattr("hbxt_compress.graph.capture._SMALL", capture_small)
        export_component(tmp_path, graphs, planned, precision=16, read=read)
    large = {n for n in stored.names if math.prod(stored.shape(n)) > capture_small}
    assert len(large) > 20
    expected = dict.fromkeys(large - {f"{rounded}.weight"}, 1)
    assert {name: n for name, n in asked.items() if name in large} == expected


def _changed(micro_wan: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    folder = tmp_path / "changed"
    shutil.copytree(micro_wan, folder)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("proj_out.weight"), r"missing: proj_out\.weight"),
        (lambda t: t.update(odd=torch.ones(1)), r"unexpected: odd"),
        (
            lambda t: t.update({"proj_out.bias": torch.ones(3)}),
            r"proj_out\.bias: has shape \[3\], expected \[16\]",
        ),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_files_that_disagree_with_the_config_are_refused_unread(
    change: Callable[[dict[str, Tensor]], None], message: str, micro_wan: Path, tmp_path: Path
) -> None:
    source = locate(str(_changed(micro_wan, tmp_path, change)))
    family = family_of(source)
    for build in (family.skeleton, family.load):
        with pytest.raises(SourceError, match=f"weights and config.json disagree:\\s.*{message}"):
            build(source, "transformer")


def _write(folder: Path, source: Source, recipe: str, quantized: QuantizedModel) -> None:
    stage.write_component(
        family_of(source), source, "transformer", _plan(source, recipe), quantized, folder
    )


def _plan(source: Source, recipe: str) -> Plan:
    family = family_of(source)
    return make_plan(load_recipe(recipe), family.layers(source), family.parameters(source))


def test_nan_in_a_weight_stops_the_export_by_name(micro_wan: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.1.attn1.to_q.weight"][3, 4] = float("nan")

    source = locate(str(_changed(micro_wan, tmp_path, spoil)))
    with pytest.raises(SourceError, match=r"blocks\.1\.attn1\.to_q\.weight holds NaN"):
        _write(tmp_path / "out", source, "fp16", QuantizedModel(weights={}))


def test_tuned_parameters_replace_those_of_the_source(source: Source, tmp_path: Path) -> None:
    floats = {"transformer/blocks.0.attn1.norm_q.weight": torch.full((128,), 3.25)}
    _write(tmp_path / "plain", source, "fp16", QuantizedModel(weights={}))
    _write(tmp_path / "tuned", source, "fp16", QuantizedModel(weights={}, floats=floats))
    plain, tuned = (
        (tmp_path / name / "model.onnx").read_bytes()
        + (tmp_path / name / "model.onnx.data").read_bytes()
        for name in ("plain", "tuned")
    )
    value = torch.full((128,), 3.25).numpy().tobytes()
    assert value in tuned
    assert value not in plain
    lost = {"transformer/blocks.0.attn1.norm_x.weight": torch.ones(128)}
    with pytest.raises(ExportError, match=r"1 tuned parameters .*\s.*norm_x\.weight"):
        _write(tmp_path / "lost", source, "fp16", QuantizedModel(weights={}, floats=lost))


def test_a_quantized_bias_is_tuned_too() -> None:
    weight = QuantizedWeight(
        format="fp16", payload={}, shape=(2, 2), loss=Loss(error=0.0), bias_O=torch.ones(2)
    )
    quantized = QuantizedModel(
        weights={LayerName("net/a"): weight, LayerName("other/a"): weight},
        floats={"net/b.weight": torch.zeros(1).half()},
    )
    tuned = stage._tuned("net", quantized)
    assert {name: tensor.dtype for name, tensor in tuned.items()} == {
        "a.bias": torch.float32,
        "b.weight": torch.float32,
    }


def test_a_component_too_large_to_run_in_torch_says_that_it_was_not_compared(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    compared = []
    monkeypatch.setattr(stage, "require_parity", lambda folder, *_, **__: compared.append(folder))
    caplog.set_level(logging.WARNING, "hbxt_compress")
    _write(tmp_path / "small", source, "fp32", QuantizedModel(weights={}))
    assert compared == [tmp_path / "small"]
    assert not caplog.messages
    monkeypatch.setattr(stage, "_LARGEST_FOR_PARITY", 1000)
    _write(tmp_path / "large", source, "fp32", QuantizedModel(weights={}))
    assert compared == [tmp_path / "small"]
    (message,) = caplog.messages
    assert message.startswith("export: transformer: not compared with torch")


class _Net(nn.Module):
    def __init__(self, constant: bool = False) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.scale = nn.Parameter(torch.full((300,), 2.0))
        self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        return x * self.model.scale + (torch.full((300,), 0.5) * x.sum() if self.constant else 0.0)


def _spec(module: nn.Module) -> GraphSpec:
    shape = TensorSpec(shape=(1, 300))
    return GraphSpec(module=module, inputs={"x": shape}, outputs=["y"], reference=lambda x: (x,))


def test_tracing_leaves_the_module_its_parameters_even_if_it_fails() -> None:
    class Broken(_Net):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken")

    for module in (_Net(), Broken()):
        before = module.model.scale
        if isinstance(module, Broken):
            with pytest.raises(Exception, match="broken"):
                capture(_spec(module))
        else:
            capture(_spec(module))
        assert module.model.scale is before
        assert torch.equal(before, torch.full((300,), 2.0))


def test_a_parameter_without_a_value_or_of_another_shape_is_named(tmp_path: Path) -> None:
    module = _Net()
    module.model.scale = nn.Parameter(torch.empty(300, device="meta"))
    component = ComponentGraphs(component="net", graphs={"model.onnx": _spec(module)})
    with pytest.raises(ExportError, match=r"model\.scale: should have .*no value"):
        export_component(tmp_path, component, {}, precision=32)
    with pytest.raises(ExportError, match=r"model\.scale: should have shape \[300\].*\[2\]"):
        export_component(tmp_path, component, {}, precision=32, read=lambda _: torch.ones(2))


_MEASURE = """
import re, sys
from pathlib import Path
from hbxt_compress.models import family_of
from hbxt_compress.plan import make_plan
from hbxt_compress.quantized import QuantizedModel
from hbxt_compress.recipe import load_recipe
from hbxt_compress.source import locate
from hbxt_compress.stages.export import write_component

peaks = []
for folder in sys.argv[1:]:
    source = locate(folder, hashed=False)
    family = family_of(source)
    plan = make_plan(load_recipe("fp16"), family.layers(source), family.parameters(source))
    out = Path(folder) / "out"
    write_component(family, source, "transformer", plan, QuantizedModel(weights={}), out)
    # not ru_maxrss, which a child takes over from the process that started it
    status = Path("/proc/self/status").read_text()
    peaks.append(1024 * int(re.search(r"VmHWM:\\s*(\\d+)", status)[1]))
print(*peaks)
"""


@pytest.mark.timeout(180)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts peak memory")
def test_export_takes_the_memory_of_a_weight_not_of_the_model(
    micro_wan: Path, tmp_path: Path
) -> None:
    """After a micro model has warmed up imports and tracer, one of 100 million weights follows."""
    small, large = tmp_path / "small", tmp_path / "large"
    shutil.copytree(micro_wan, small)
    shutil.copytree(micro_wan, large)
    n_weights = _widen(large / "transformer", width=1024, ffn=4096, n_blocks=6)
    assert n_weights > 100_000_000
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(small), str(large)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    before, after = map(int, run.stdout.split())
    assert (large / "out" / "model.onnx.data").stat().st_size > 2 * n_weights
    assert after - before < 2 * n_weights  # bytes: half of them all in float32


def _widen(folder: Path, *, width: int, ffn: int, n_blocks: int) -> int:
    """Makes a transformer folder that of a larger model in bfloat16; how many weights it has."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"num_attention_heads": width // 64, "ffn_dim": ffn, "num_layers": n_blocks}
    path.write_text(json.dumps(config))
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        shapes = {
            name: tensor.shape
            for name, tensor in WanTransformer3DModel.from_config(config).state_dict().items()
        }
    noise = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensors = {}
    for number, (name, shape) in enumerate(shapes.items()):
        own = (noise + number).roll(number) / (8 * (number + 1))  # no two with equal bytes
        tensors[name] = own.repeat(-(-shape.numel() // len(own)))[: shape.numel()].reshape(shape)
    (old,) = folder.glob("*.safetensors")
    old.unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = {name: tensors[name].contiguous().clone() for name in part}
        save_file(shard, folder / f"model-{number:05}-of-00002.safetensors")
    return sum(tensor.numel() for tensor in tensors.values())
