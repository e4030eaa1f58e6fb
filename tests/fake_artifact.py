"""A whole artifact with random little graphs, for tests that need the runtime but no real model.

The graphs have exactly the inputs and outputs of a real export and arithmetic simple enough to be
redone in numpy: see `text_features`, `velocity` and `decoded`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from hbxt_compress.artifact import Artifact, record_files, write_manifest
from hbxt_compress.geometry import Geometry
from hbxt_compress.manifest import SCHEMA, Bucket, FileRecord, LayerFate, Manifest
from hbxt_compress.sampler import SamplerSpec
from hbxt_compress.tile import Tile

__all__ = [
    "LATENT_SHAPE",
    "TEXT_LENGTH",
    "decoded",
    "make_artifact",
    "rewrite_manifest",
    "text_features",
    "velocity",
]

_PROMPTS = ("a red circle moving left on black", "blue square moving right", "white background")
WORDS = sorted({word for prompt in _PROMPTS for word in prompt.split()})
TEXT_LENGTH, TEXT_DIM = 8, 4
LATENT_SHAPE = (3, 3, 2, 2)  # C T H W: 9 frames of 16 x 16
MEAN, STD = (0.1, -0.2, 0.3), (1.5, 0.5, 2.0)
SAMPLER = SamplerSpec(solver="unipc", n_steps=3, shift=3.0, guidance=4.0)


def make_artifact(
    folder: Path,
    *,
    sampler: SamplerSpec = SAMPLER,
    fault: str = "",
    session: dict[str, str] | None = None,
    tile: Tile | None = None,
) -> Path:
    """Writes the artifact and returns its folder; it has graphs for a tile if one is given.

    fault: "" or what the decoder or transformer does wrong: "black", "constant", "nan", "vae nan".
    """
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    _write_tokenizer(folder / "tokenizer")
    scheduler = {"_class_name": "UniPCMultistepScheduler", "flow_shift": sampler.shift}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    _write_text_encoder(folder / "text_encoder")
    _write_transformer(folder / "transformer", seed=1, fault=fault)
    if sampler.boundary is not None:
        _write_transformer(folder / "transformer_2", seed=2, fault=fault)
    sizes = {("model_first.onnx", "model.onnx"): LATENT_SHAPE[2:]}
    if tile is not None:
        sizes[tile.first, tile.next] = (tile.height // 8, tile.width // 8)
    _write_vae(folder / "vae_decoder", fault, sizes)
    write_manifest(folder, _manifest(folder, sampler, session or {}, tile))
    return folder


def rewrite_manifest(folder: Path, **changes: object) -> None:
    """Records the folder's files anew in its manifest, with other fields changed as asked."""
    manifest = Artifact.open(folder, verify=False).manifest if not changes else None
    document = json.loads((folder / "manifest.json").read_text())
    del document["digest"]
    manifest = manifest or Manifest.from_json(document)
    files: tuple[FileRecord, ...] = record_files(folder)
    write_manifest(folder, replace(manifest, **{"files": files, **changes}))


def text_features(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What the text encoder's features are after the padding was zeroed: float32 1 L D."""
    return ((_table()[ids] + 1) * mask[..., None]).astype(np.float32)


def velocity(x: np.ndarray, timestep: float, text: np.ndarray, *, seed: int = 1) -> np.ndarray:
    """What the transformer (seed 1) or the second expert (seed 2) answers to 1 C T H W."""
    a, b, c = _gains(seed)
    mood = text.mean(axis=(1, 2)).reshape(1, 1, 1, 1, 1)
    return (x * a + mood * b + np.float32(timestep / 1000) * c).astype(np.float32)


def decoded(latents: np.ndarray) -> np.ndarray:
    """The frames, float32 T H W 3 in -1..1, of latents C T H W."""
    z = latents * _column(STD)[0] + _column(MEAN)[0]
    mixed = np.einsum("oc,cthw->othw", _mix(), z)
    times = [mixed[:, :1]]
    for t in range(1, mixed.shape[1]):  # four frames from the one before to this one
        before, now = mixed[:, t - 1 : t], mixed[:, t : t + 1]
        times += [before * (1 - s) + now * s for s in (0.25, 0.5, 0.75, 1.0)]
    frames = np.concatenate(times, axis=1).repeat(8, axis=2).repeat(8, axis=3)
    return np.clip(frames, -1, 1).transpose(1, 2, 3, 0).astype(np.float32)


def _table() -> np.ndarray:
    return np.random.default_rng(10).standard_normal((len(WORDS) + 3, TEXT_DIM)).astype(np.float32)


def _gains(seed: int) -> tuple[np.ndarray, ...]:
    values = np.random.default_rng(seed).uniform(-1, 1, (3, 1, LATENT_SHAPE[0], 1, 1, 1))
    return tuple(values.astype(np.float32))


def _mix() -> np.ndarray:
    return np.random.default_rng(20).uniform(-0.5, 0.5, (3, LATENT_SHAPE[0])).astype(np.float32)


def _column(values: Sequence[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)[None, :, None, None, None]


def _write_tokenizer(folder: Path) -> None:
    folder.mkdir()
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _write_text_encoder(folder: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["mask"], ["one"], keepdims=0),  # uses the mask; is 1
        helper.make_node("Add", ["rows", "one"], ["last_hidden_state"]),
    ]
    inputs = [_int("input_ids", (1, TEXT_LENGTH)), _int("attention_mask", (1, TEXT_LENGTH))]
    outputs = [_float("last_hidden_state", (1, TEXT_LENGTH, TEXT_DIM))]
    _save(folder, {"model.onnx": (nodes, inputs, outputs)}, {"table": _table()})


def _write_transformer(folder: Path, *, seed: int, fault: str) -> None:
    a, b, c = _gains(seed)
    weights = {"a": a, "b": b, "c": c, "thousand": np.array(1000, dtype=np.float32)}
    if fault == "nan":
        weights["thousand"] = np.array(0, dtype=np.float32)  # t / 0 is inf, inf - inf is NaN
        weights["c"] = np.full_like(c, np.inf)
    nodes = [
        helper.make_node("ReduceMean", ["encoder_hidden_states"], ["mood"], keepdims=0),
        helper.make_node("Mul", ["hidden_states", "a"], ["scaled"]),
        helper.make_node("Mul", ["mood", "b"], ["moody"]),
        helper.make_node("Div", ["timestep", "thousand"], ["time"]),
        helper.make_node("Mul", ["time", "c"], ["timed"]),
        helper.make_node("Add", ["scaled", "moody"], ["sum"]),
        helper.make_node("Add", ["sum", "timed"], ["out_hidden_states"]),
    ]
    inputs = [
        _float("hidden_states", (1, *LATENT_SHAPE)),
        _float("timestep", (1,)),
        _float("encoder_hidden_states", (1, TEXT_LENGTH, TEXT_DIM)),
    ]
    outputs = [_float("out_hidden_states", (1, *LATENT_SHAPE))]
    _save(folder, {"model.onnx": (nodes, inputs, outputs)}, weights)


def _write_vae(folder: Path, fault: str, sizes: dict[tuple[str, str], tuple[int, int]]) -> None:
    n_channels = LATENT_SHAPE[0]
    mix = {"": _mix(), "vae nan": _mix() * np.nan}.get(fault, _mix() * 0)
    offset = {"black": -1.0, "constant": 0.5}.get(fault, 0.0)
    steps = np.array([0.25, 0.5, 0.75, 1.0], dtype=np.float32).reshape(1, 1, 4, 1, 1)
    weights = {
        "mix": mix.astype(np.float32).reshape(3, n_channels, 1, 1, 1),
        "offset": np.array(offset, dtype=np.float32),
        "steps": steps,
        "scales": np.array([1, 1, 1, 8, 8], dtype=np.float32),
        "low": np.array(-1, dtype=np.float32),
        "high": np.array(1, dtype=np.float32),
        "one": np.array(1, dtype=np.float32),
    }
    tail = [
        helper.make_node("Conv", ["blend", "mix"], ["mixed"], kernel_shape=[1, 1, 1]),
        helper.make_node("Add", ["mixed", "offset"], ["shifted"]),
        helper.make_node(
            "Resize",
            ["shifted", "", "scales"],
            ["large"],
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        ),
        helper.make_node("Clip", ["large", "low", "high"], ["sample"]),
        helper.make_node("Identity", ["latent_sample"], ["cache_out_0"]),
    ]
    first = [
        helper.make_node("Identity", ["latent_sample"], ["blend"]),
        *tail,
        helper.make_node("Identity", ["one"], ["cache_out_1"]),
    ]
    steady = [  # before + step * (latent - before); cache 1 counts the latent frames
        helper.make_node("Sub", ["latent_sample", "cache_in_0"], ["change"]),
        helper.make_node("Mul", ["change", "steps"], ["moved"]),
        helper.make_node("Add", ["cache_in_0", "moved"], ["blend"]),
        *tail,
        helper.make_node("Add", ["cache_in_1", "one"], ["cache_out_1"]),
    ]
    graphs = {}
    for names, (height, width) in sizes.items():
        latent, size = (1, n_channels, 1, height, width), (height * 8, width * 8)
        latent_in = _float("latent_sample", latent)
        caches_out = [_float("cache_out_0", latent), _float("cache_out_1", ())]
        caches_in = [_float("cache_in_0", latent), _float("cache_in_1", ())]
        samples = [_float("sample", (1, 3, n_frames, *size)) for n_frames in (1, 4)]
        graphs[names[0]] = (first, [latent_in], [samples[0], *caches_out])
        graphs[names[1]] = (steady, [latent_in, *caches_in], [samples[1], *caches_out])
    _save(folder, graphs, weights)


def _save(folder: Path, graphs: dict[str, tuple], weights: dict[str, np.ndarray]) -> None:
    """The graphs of a component, each with the weights it uses, all in one model.onnx.data."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    content, tensors = b"", {}
    for name, weight in weights.items():
        tensor = helper.make_tensor(name, TensorProto.FLOAT, weight.shape, weight.tobytes(), True)
        tensors[name] = tensor
        if name == "scales":  # shape inference reads it
            continue
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        extent = {"location": "model.onnx.data", "offset": len(content), "length": weight.nbytes}
        for key, value in extent.items():
            tensor.external_data.add(key=key, value=str(value))
        content += weight.tobytes()
    (folder / "model.onnx.data").write_bytes(content)
    for file, (nodes, inputs, outputs) in graphs.items():
        used = {name for node in nodes for name in node.input}
        own = [tensor for name, tensor in tensors.items() if name in used]
        graph = helper.make_graph(nodes, "fake", inputs, outputs, initializer=own)
        opsets = [helper.make_opsetid("", 17)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        (folder / file).write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(folder / file))


def _manifest(
    folder: Path, sampler: SamplerSpec, session: dict[str, str], tile: Tile | None
) -> Manifest:
    components = sorted(path.parent.name for path in folder.glob("*/model.onnx"))
    return Manifest(
        schema=SCHEMA,
        recipe={"name": "fake", "digest": "0" * 64, "document": {}},
        source={"model": "fake", "family": "wan", "files": {}},
        components={name: {"before": 100, "after": 50} for name in components},
        sampler=sampler,
        buckets=(
            Bucket(
                geometry=Geometry(height=16, width=16, n_frames=9, fps=8.0),
                latent_shape=LATENT_SHAPE,
                transformer="model.onnx",
                first="model_first.onnx",
                next="model.onnx",
                tile=tile,
            ),
        ),
        text_length=TEXT_LENGTH,
        latents_mean=MEAN,
        latents_std=STD,
        layers=(
            LayerFate(
                name="transformer/blocks.0.attn1.to_q",
                format="int4-g128",
                activations="keep",
                how="gptq (damping 0.01)",
                reason="rule 2",
                shape=(4, 4),
                bytes_before=32,
                bytes_after=10,
                error=0.01,
                held_out=0.012,
                g1_db=3.0,
                g2_db=2.0,
                limit_db=4.0,
            ),
        ),
        lineage=({"stage": "export", "digest": "1" * 64},),
        made_with={"hbxt_compress": "0"},
        session=session,
        targets={},
        files=record_files(folder),
    )


def _float(name: str, shape: Sequence[int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _int(name: str, shape: Sequence[int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT64, shape)
