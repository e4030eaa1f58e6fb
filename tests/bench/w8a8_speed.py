"""How much faster a Wan transformer step is with fewer bits in weights or inputs, on this CPU.

    python tests/bench/w8a8_speed.py [--heads 12 --ffn 8960 --tokens 1024 ...] [--json ROWS.jsonl]

Exports one transformer of random weights (Wan2.1-1.3B's width, few blocks) in float32 and with
every linear of its blocks in each format, then runs all graphs in turn, again and again, in one
process: other load on the machine meets them alike. Says the ratio of median times, also of the
processor's (the fairer one on a busy machine, with --threads 1), and how far each velocity is from
the float32 graph's. Weights are random, so that distance is no quality claim.

w4a16 and w4a8 are one graph with int4 weights; w4a8 lets ONNX Runtime's kernel round the inputs to
8 bit in blocks as well (accuracy_level 4), which is all of W4A8 that any of the runtimes has.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from hbxt_compress.torchvision_ops import mend_torchvision

mend_torchvision()

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402
import torch  # noqa: E402
from diffusers import WanTransformer3DModel  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from hbxt_compress.algorithms.scales import search_scales  # noqa: E402
from hbxt_compress.formats import FORMATS, WeightFormat  # noqa: E402
from hbxt_compress.formats.activations import ACTIVATIONS, ActivationFormat  # noqa: E402
from hbxt_compress.graph.capture import ComponentGraphs, DummyInputs  # noqa: E402
from hbxt_compress.graph.export import export_component  # noqa: E402
from hbxt_compress.graph.parity import SESSION_OPTIONS  # noqa: E402
from hbxt_compress.layers import LayerName  # noqa: E402
from hbxt_compress.models.wan_graph import transformer_graphs  # noqa: E402

Payloads = dict[LayerName, tuple[WeightFormat, Mapping[str, Tensor]]]
_INT8, _INT4 = FORMATS["int8-channel"], FORMATS["int4-g128"]
_INT8_PRODUCTS = 4  # MatMulNBits' accuracy_level: inputs are rounded to int8


def linears(transformer: nn.Module) -> dict[str, nn.Linear]:
    """The linears of the blocks by module path."""
    found = {path: m for path, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    return {path: module for path, module in found.items() if path.startswith("blocks.")}


@torch.no_grad()
def absmax(transformer: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The largest absolute value of each input feature of each linear, in one call."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, path=path: seen.update({path: args[0].abs().flatten(0, -2).amax(0)})
        )
        for path, module in linears(transformer).items()
    ]
    transformer(*inputs.values(), return_dict=False)
    for hook in hooks:
        hook.remove()
    return seen


def weights(
    transformer: nn.Module, activation: ActivationFormat | None, largest: Mapping[str, Tensor]
) -> Payloads:
    """Every linear of the blocks in int8-channel, its input rounded by `activation` or not."""
    found: Payloads = {}
    for path, module in linears(transformer).items():
        weight_OI = module.weight.detach().float()
        payload = dict(_INT8.encode(weight_OI, weight_OI.abs().amax(1) / 127))
        if activation is not None:
            payload |= activation.payload(largest[path])
        found[LayerName(f"transformer/{path}")] = (_INT8, payload)
    return found


def four_bits(transformer: nn.Module) -> Payloads:
    """Every linear of the blocks in int4-g128."""
    found: Payloads = {}
    for path, module in linears(transformer).items():
        grid = search_scales(module.weight.detach().float(), _INT4)
        payload = _INT4.store(grid.levels(module.weight.detach()), grid.scales_OG, grid.zeros_OG)
        found[LayerName(f"transformer/{path}")] = (_INT4, payload)
    return found


def with_8_bit_inputs(file: Path) -> None:
    """Sets accuracy_level 4 on every MatMulNBits of a graph, in place."""
    model = onnx.load(file, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            node.attribute.append(onnx.helper.make_attribute("accuracy_level", _INT8_PRODUCTS))
    onnx.save(model, file)


def exported(
    folder: Path,
    component: ComponentGraphs,
    planned: Payloads,
    activation: ActivationFormat | None,
) -> Path:
    """The graph's file, checked against the target's rules as every export is."""
    inputs = {} if activation is None else dict.fromkeys(planned, activation.name)
    export_component(folder, component, planned, precision=32, activations=inputs)
    return folder / "model.onnx"


def opened(file: Path, n_threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = n_threads, 1
    options.log_severity_level = 3
    for key, value in SESSION_OPTIONS.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def sqnr_db(reference: np.ndarray, got: np.ndarray) -> float:
    noise = np.square(got.astype(np.float64) - reference).mean()
    return float(10 * np.log10(np.square(reference.astype(np.float64)).mean() / noise))


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """One row for each variant, the float32 graph first."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=args.heads, attention_head_dim=128,
        in_channels=16, out_channels=16, text_dim=4096, freq_dim=256, ffn_dim=args.ffn,
        num_layers=args.layers,
    ).eval()  # fmt: skip
    frames, rest = divmod(args.tokens, 256)
    if rest or not frames:
        raise SystemExit(f"--tokens {args.tokens}: must be a multiple of 256 (frames of 16x16)")
    component = transformer_graphs(
        transformer, latent_shape=(16, frames, 32, 32), text_length=args.text
    )
    inputs = DummyInputs(component.graphs["model.onnx"].inputs, 1).all()
    largest = absmax(transformer, inputs)
    sessions = {}
    for index, variant in enumerate(("fp32", *args.variants)):
        activation = ACTIVATIONS.get(variant.removeprefix("w8:"))
        planned: Payloads = {}
        if variant.startswith("w4"):
            planned = four_bits(transformer)
        elif variant != "fp32":
            planned = weights(transformer, activation, largest)
        file = exported(folder / f"{index}", component, planned, activation)
        if variant == "w4a8":
            with_8_bit_inputs(file)
        sessions[variant] = opened(file, args.threads)
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    velocity = {variant: session.run(None, feeds)[0] for variant, session in sessions.items()}
    seconds: dict[str, list[float]] = {variant: [] for variant in sessions}
    busy: dict[str, list[float]] = {variant: [] for variant in sessions}
    for _ in range(args.repeats):
        for variant, session in sessions.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            session.run(None, feeds)
            seconds[variant].append(time.perf_counter() - began)
            busy[variant].append(time.process_time() - began_cpu)
    return [
        {
            "variant": variant,
            "seconds": statistics.median(found),
            "fastest_s": min(found),
            "speed_up": statistics.median(seconds["fp32"]) / statistics.median(found),
            "fastest_speed_up": min(seconds["fp32"]) / min(found),
            "cpu_speed_up": statistics.median(busy["fp32"]) / statistics.median(busy[variant]),
            "velocity_sqnr_db": None
            if variant == "fp32"
            else sqnr_db(velocity["fp32"], velocity[variant]),
            "width": 128 * args.heads,
            "ffn": args.ffn,
            "layers": args.layers,
            "tokens": args.tokens,
            "text": args.text,
            "threads": args.threads,
            "repeats": args.repeats,
            "machine": platform.processor() or platform.machine(),
            "onnxruntime": onnxruntime.__version__,
        }
        for variant, found in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", type=int, default=12, help="of 128 features each")
    parser.add_argument("--ffn", type=int, default=8960)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--text", type=int, default=512, help="text tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--variants", nargs="+", default=["w8:int8-token"],
        choices=["w4a16", "w4a8", "w8a16", *(f"w8:{name}" for name in ACTIVATIONS)],
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="append a line for each variant to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    for row in rows:
        distance = row["velocity_sqnr_db"]
        sys.stdout.write(
            f"{row['variant']:14} {row['seconds']:8.3f} s {row['speed_up']:6.2f}x"
            f"  fastest {row['fastest_speed_up']:.2f}x  processor time {row['cpu_speed_up']:.2f}x"
            + (f"  velocity {distance:.1f} dB\n" if distance is not None else "\n")
        )
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        with args.json.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, sort_keys=True) + "\n" for row in rows)


if __name__ == "__main__":
    main()
