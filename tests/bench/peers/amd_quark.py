"""AMD Quark's ModelQuantizer on the torch module.

RTN and SVDQuant quantize the diffusers module as it is. GPTQ, GPTAQ, Qronos and AutoRound walk over
the decoder blocks of a language model and replay the *last* sample's other arguments for every
sample, which would mix up Wan's text and timestep, so they get wan.Packed. Quark's AWQ and
SmoothQuant fold scales into the operation before a layer; Wan's norms have no weights to take them.
Bytes are those of what export_safetensors writes for the blocks' weights. It refuses wan.Packed,
and leaves the codes of layers that were quantized inside it in 16 bit in the diffusers module that
shares them: those codes and zero points are counted as the 4 bits that the other methods store.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import host
import torch
import wan
from quark.torch import ModelQuantizer, export_safetensors
from quark.torch.quantization.config.config import (
    GPTAQConfig,
    GPTQConfig,
    QConfig,
    QronosConfig,
    SVDQuantConfig,
)
from quark.torch.quantization.config.template import QuantizationSchemeCollection
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader

_INSIDE = [
    *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2"),
]
_WIDER = {"weight torch.float16": 4, "zero_point torch.int32": 8}  # than the 4 bits they need
_OTHERS = ["condition_embedder*", "proj_out*"]


def _first(batch: list[Any]) -> Any:
    return batch[0]


def _quantize(case: host.Case, scheme: str, algorithm: Any = None) -> host.Outcome:
    # SVDQuant stores its factors in the model's dtype, and rounds a float32 model to bfloat16
    svd = isinstance(algorithm, SVDQuantConfig)
    dtype = torch.float16 if svd else torch.float32
    whole = wan.load(case.transformer, dtype)
    model: nn.Module = whole
    packed = algorithm is not None and not svd
    rows: list[dict[str, torch.Tensor]] = wan.samples(case.inputs, dtype)
    if packed:
        model = wan.Packed(model, rows)
        rows = [{"hidden_states": row} for row in model.rows]
    config = QConfig(
        global_quant_config=QuantizationSchemeCollection().get_scheme(scheme).config,
        exclude=_OTHERS,
        algo_config=[algorithm] if algorithm else [],
    )
    calls = DataLoader(rows, batch_size=1, collate_fn=_first)
    with case.clock:
        model = ModelQuantizer(config).quantize_model(model, calls)
        model = ModelQuantizer.freeze(model)
    weights = {}
    for name, layer in wan.linears(model).items():
        if name.endswith((".layer", ".correction.l1", ".correction.l2")):
            continue
        weight = layer.weight.float()
        if hasattr(layer, "correction"):
            low = layer.correction
            weight = weight + low.l2.weight.float() @ low.l1.weight.float()
        weights[name] = weight
    settings = {"scheme": scheme, "algorithm": algorithm}
    stored = _exported((whole if packed else model).half(), case.out / "export")
    if packed:
        stored = {kind: size // _WIDER.get(kind, 1) for kind, size in stored.items()}
    return host.Outcome(wan.to_numpy(weights), stored, settings)


def _exported(model: nn.Module, folder: Path) -> dict[str, int]:
    export_safetensors(model, str(folder), weight_format="real_quantized")
    stored: dict[str, int] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if name.startswith("blocks.") and tensor.ndim >= 2 and "scale_shift" not in name:
                    kind = f"{name.rsplit('.', 1)[-1]} {tensor.dtype}"
                    stored[kind] = stored.get(kind, 0) + tensor.nbytes
    return stored


def _walk(kind: Any, **options: Any) -> Any:
    return kind(inside_layer_modules=_INSIDE, model_decoder_layers="blocks", **options)


METHODS = {
    "RTN int4 g128": partial(_quantize, scheme="int4_wo_128"),
    "RTN uint4 g128": partial(_quantize, scheme="uint4_wo_128"),
    "GPTQ int4 g128": partial(_quantize, scheme="int4_wo_128", algorithm=_walk(GPTQConfig)),
    "GPTQ int4 g64": partial(_quantize, scheme="int4_wo_64", algorithm=_walk(GPTQConfig)),
    "GPTAQ int4 g64": partial(_quantize, scheme="int4_wo_64", algorithm=_walk(GPTAQConfig)),
    "Qronos int4 g64": partial(_quantize, scheme="int4_wo_64", algorithm=_walk(QronosConfig)),
    "SVDQuant w4a16 rank 32": partial(
        _quantize,
        scheme="int4_wo_64",
        algorithm=SVDQuantConfig(svd_rank=32, exclude_patterns=_OTHERS),
    ),
}

if __name__ == "__main__":
    host.run("amd-quark", METHODS)
