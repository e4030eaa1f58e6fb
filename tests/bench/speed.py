"""How fast the exported graphs run on this CPU beside the torch modules they come from.

    python tests/bench/speed.py [--threads 2] [--rounds 7] [--out build/bench]

A transformer of Wan2.1-1.3B's width with few blocks, a small UMT5 and Wan2.1's VAE decoder, all of
random weights. Everything that computes one thing takes a turn in every round, one process, so that
other load meets them alike; a ratio is that of the same round, given as median and range. Writes
speed.json and speed.md; `torch.compile` is left out where no C++ compiler is found.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from hbxt_compress.torchvision_ops import mend_torchvision

mend_torchvision()

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKLWan, WanTransformer3DModel  # noqa: E402
from markdown_table import markdown_table  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import UMT5Config, UMT5EncoderModel  # noqa: E402
from w8a8_speed import absmax, four_bits, weights  # noqa: E402

from hbxt_compress.formats.activations import ACTIVATIONS  # noqa: E402
from hbxt_compress.graph.capture import ComponentGraphs, DummyInputs, GraphSpec  # noqa: E402
from hbxt_compress.graph.export import export_component  # noqa: E402
from hbxt_compress.graph.parity import SESSION_OPTIONS  # noqa: E402
from hbxt_compress.models.wan_graph import text_encoder_graphs, transformer_graphs  # noqa: E402
from hbxt_compress.models.wan_vae_graph import vae_decoder_graphs  # noqa: E402
from hbxt_compress.runtime.session import open_session  # noqa: E402
from tests.small_vaes import bucket_of  # noqa: E402

__all__ = ["Row", "compete", "table"]

_EAGER = "torch eager"
_TOLERANCE = 1e-3  # of the largest number; graphs that are rounded are not compared
Run = Callable[[], object]
Inputs = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Seconds of every round. faster: than torch eager in the same round, median and range."""

    what: str
    who: str
    seconds: Sequence[float]
    faster: tuple[float, float, float]

    def to_json(self) -> dict[str, object]:
        return {
            "what": self.what,
            "who": self.who,
            "seconds": list(self.seconds),
            "median_s": statistics.median(self.seconds),
            "faster": dict(zip(("median", "least", "most"), self.faster, strict=True)),
        }


def compete(
    what: str,
    runs: Mapping[str, Run],
    n_rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """One row for each, the first the one that all are compared with; each has run once before.

    Whose turn is first changes from round to round.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(n_rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            began = clock()
            runs[name]()
            seconds[name].append(clock() - began)
    rows = []
    for name in names:
        ratios = [a / b for a, b in zip(seconds[names[0]], seconds[name], strict=True)]
        faster = (statistics.median(ratios), min(ratios), max(ratios))
        rows.append(Row(what=what, who=name, seconds=seconds[name], faster=faster))
    return rows


def table(rows: Sequence[Row]) -> list[str]:
    """The lines of a Markdown table."""
    titles = ("what", "who", "seconds", "spread", "times as fast as torch eager", "range")
    return markdown_table(
        titles,
        [
            (
                row.what,
                row.who,
                f"{statistics.median(row.seconds):.3f}",
                f"{min(row.seconds):.3f}..{max(row.seconds):.3f}",
                f"{row.faster[0]:.2f}",
                f"{row.faster[1]:.2f}..{row.faster[2]:.2f}",
            )
            for row in rows
        ],
    )


def in_torch(spec: GraphSpec, inputs: Inputs) -> Run:
    @torch.no_grad()
    def run() -> np.ndarray:
        return spec.reference(*(one.clone() for one in inputs.values()))[0].numpy()

    return run


def compiled(module: torch.nn.Module, inputs: Inputs) -> Run:
    faster = torch.compile(module)

    @torch.no_grad()
    def run() -> np.ndarray:
        return faster(*inputs.values(), return_dict=False)[0].numpy()

    return run


def exported(file: Path, inputs: Inputs, n_threads: int) -> Run:
    session = open_session(file, "cpu", n_threads=n_threads, config=SESSION_OPTIONS)
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    return lambda: session.run(feeds)[session.outputs[0]]


def transformer(
    *, heads: int = 12, ffn: int = 8960, layers: int = 4, tokens: int = 2048, text: int = 512
) -> tuple[WanTransformer3DModel, ComponentGraphs]:
    """Some blocks of a Wan transformer, by default as wide as those of the 1.3B model."""
    frames, rest = divmod(tokens, 256)
    if rest or not frames:
        raise SystemExit(f"--tokens {tokens}: must be a multiple of 256 (frames of 16x16)")
    module = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=128,
        in_channels=16, out_channels=16, text_dim=4096, freq_dim=256, ffn_dim=ffn,
        num_layers=layers,
    ).eval()  # fmt: skip
    return module, transformer_graphs(module, latent_shape=(16, frames, 32, 32), text_length=text)


def transformer_runs(args: argparse.Namespace, folder: Path) -> dict[str, Run]:
    """torch, torch compiled, the graph in float32, and what three recipes make of it."""
    module, graphs = transformer(
        heads=args.heads, ffn=args.ffn, layers=args.layers, tokens=args.tokens, text=args.text
    )
    spec = graphs.graphs["model.onnx"]
    inputs = DummyInputs(spec.inputs, 1).all()
    runs = {_EAGER: in_torch(spec, inputs)}
    if not args.no_compile:
        runs["torch.compile"] = compiled(module, inputs)
    token = ACTIVATIONS["int8-token"]
    rounded = {
        "w4a16-fast": (four_bits(module), {}),
        "w8a8": (weights(module, token, absmax(module, inputs)), token),
        "fp16": ({}, {}),
    }
    export_component(folder / "fp32", graphs, {}, precision=32)
    runs["ONNX fp32"] = exported(folder / "fp32" / "model.onnx", inputs, args.threads)
    for name, (payloads, activation) in rounded.items():
        given = dict.fromkeys(payloads, token.name) if activation else {}
        export_component(
            folder / name, graphs, payloads, precision=16, half=True, activations=given
        )
        runs[f"ONNX {name}"] = exported(folder / name / "model.onnx", inputs, args.threads)
    return runs


def simple_runs(graphs: ComponentGraphs, folder: Path, n_threads: int) -> dict[str, Run]:
    """torch and the float32 graph of a component's model.onnx."""
    spec = graphs.graphs["model.onnx"]
    inputs = DummyInputs(spec.inputs, 1).all()
    export_component(folder, graphs, {}, precision=32)
    return {
        _EAGER: in_torch(spec, inputs),
        "ONNX fp32": exported(folder / "model.onnx", inputs, n_threads),
    }


def text_encoder(args: argparse.Namespace) -> ComponentGraphs:
    config = UMT5Config(
        vocab_size=1000, d_model=1024, d_kv=64, d_ff=2816, num_layers=4, num_heads=16,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return text_encoder_graphs(UMT5EncoderModel(config).eval(), text_length=args.text)


def vae(_: argparse.Namespace) -> ComponentGraphs:
    module = AutoencoderKLWan(
        base_dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
        temperal_downsample=[False, True, True],
    ).eval()  # fmt: skip
    return vae_decoder_graphs(module, bucket_of(module, (5, 12, 12)))


def measure(args: argparse.Namespace, folder: Path) -> list[Row]:
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    contests: dict[str, Callable[[], dict[str, Run]]] = {
        "transformer step": lambda: transformer_runs(args, folder / "transformer"),
        "UMT5 encode": lambda: simple_runs(text_encoder(args), folder / "text", args.threads),
        "VAE step": lambda: simple_runs(vae(args), folder / "vae", args.threads),
    }
    rows: list[Row] = []
    for what, make in contests.items():
        runs = make()
        first = {name: np.asarray(run()) for name, run in runs.items()}
        for name in ("torch.compile", "ONNX fp32"):
            if name in first:
                off = np.abs(first[name] - first[_EAGER]).max() / np.abs(first[_EAGER]).max()
                if not off < _TOLERANCE:
                    raise SystemExit(f"{what}: {name} differs from torch by {off:.2g}")
        rows += compete(what, runs, args.rounds)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", type=int, default=12, help="of 128 features each")
    parser.add_argument("--ffn", type=int, default=8960)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--text", type=int, default=512, help="text tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    about = {key: value for key, value in vars(args).items() if key != "out"} | {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(table(rows)) + "\n"
    document = {"about": about, "rows": [row.to_json() for row in rows]}
    (args.out / "speed.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (args.out / "speed.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
