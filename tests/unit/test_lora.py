"""LoRAs are added as their formula says, to the layers they name, or are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hbxt_compress.errors import SourceError
from hbxt_compress.journal import file_sha256
from hbxt_compress.source import locate
from hbxt_compress.stages.import_model import import_model
from tests.originals import diffusers_lora

_FILE = "transformer/diffusion_pytorch_model.safetensors"
Merged = Callable[..., dict[str, Tensor]]
# layers as the authors' code names them: inputs, outputs
_LAYERS = {
    **{f"blocks.{i}.{a}.{p}": (128, 128)
       for i in range(2) for a in ("self_attn", "cross_attn") for p in "qkvo"},
    **{f"blocks.{i}.ffn.0": (128, 256) for i in range(2)},
    **{f"blocks.{i}.ffn.2": (256, 128) for i in range(2)},
    "text_embedding.0": (128, 128), "text_embedding.2": (128, 128),
    "time_embedding.0": (64, 128), "time_embedding.2": (128, 128),
    "time_projection.1": (128, 768), "head.head": (128, 16),
}  # fmt: skip
_Q, _OWN_Q = "blocks.0.attn1.to_q", "blocks.0.self_attn.q"


@pytest.fixture
def merged(micro_wan: Path, tmp_path: Path) -> Merged:
    """Merges tensors as a LoRA file into the micro model, gives its transformer's tensors."""

    def run(tensors: dict[str, Tensor], scale: float = 1.0, **how: Any) -> dict[str, Tensor]:
        path = tmp_path / how.pop("name", "lora.safetensors")
        save_file(tensors, path, metadata=how.pop("metadata", None))
        base = locate(str(how.pop("base", micro_wan)), hashed=False)
        return load_file(import_model(base, tmp_path / "out", loras=[(path, scale)], **how) / _FILE)

    return run


@pytest.fixture
def before(micro_wan: Path) -> dict[str, Tensor]:
    return load_file(micro_wan / _FILE)


def _pair(n_in: int, n_out: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return (
        0.1 * torch.randn(rank, n_in, generator=random),
        0.1 * torch.randn(n_out, rank, generator=random),
    )


def _file(down: str, up: str, prefix: str = "diffusion_model.", rank: int = 4) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for seed, (layer, (n_in, n_out)) in enumerate(_LAYERS.items()):
        a, b = _pair(n_in, n_out, rank, seed)
        tensors[f"{prefix}{layer}.{down}.weight"] = a
        tensors[f"{prefix}{layer}.{up}.weight"] = b
    return tensors


def _literal(weight: Tensor, down: Tensor, up: Tensor, factor: float) -> Tensor:
    """Number by number in float64, rounded twice at most: to float32, to the stored dtype."""
    w, a, b = (one.double().numpy() for one in (weight, down, up))
    out = np.empty_like(w)
    for o in range(w.shape[0]):
        for i in range(w.shape[1]):
            out[o, i] = w[o, i] + factor * sum(b[o, r] * a[r, i] for r in range(a.shape[0]))
    return torch.from_numpy(out)


@pytest.mark.parametrize(("down", "up"), [("lora_A", "lora_B"), ("lora_down", "lora_up")])
def test_every_layer_gets_what_diffusers_gives_it(
    down: str, up: str, merged: Merged, before: dict[str, Tensor]
) -> None:
    tensors = _file(down, up)
    for name, (_, n_out) in _LAYERS.items():
        tensors[f"diffusion_model.{name}.diff_b"] = torch.linspace(-1, 1, n_out)
    given = dict(tensors)
    converted = {
        name.removeprefix("transformer."): one for name, one in diffusers_lora(given).items()
    }
    expected = dict(before)
    for name in converted:
        layer, _, part = name.partition(".lora_")
        if part == "A.weight":
            product = converted[f"{layer}.lora_B.weight"] @ converted[name]
            expected[f"{layer}.weight"] = before[f"{layer}.weight"] + 0.8 * product
        elif part == "B.bias":
            expected[f"{layer}.bias"] = before[f"{layer}.bias"] + 0.8 * converted[name]
    changed = {name for name in before if not torch.equal(before[name], expected[name])}
    assert len(changed) == 2 * len(_LAYERS)
    found = merged(tensors, 0.8)
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


def test_every_number_is_the_formulas(merged: Merged, before: dict[str, Tensor]) -> None:
    down, up = _pair(128, 128, 4, 1)
    found = merged(
        {f"transformer.{_Q}.lora_A.weight": down, f"transformer.{_Q}.lora_B.weight": up,
         f"transformer.{_Q}.alpha": torch.tensor(2.0)},
        0.5,
    )  # fmt: skip
    expected = _literal(before[f"{_Q}.weight"], down, up, 0.5 * 2.0 / 4)
    torch.testing.assert_close(found[f"{_Q}.weight"].double(), expected, rtol=1e-6, atol=1e-8)
    for name in before:
        assert (name == f"{_Q}.weight") != torch.equal(found[name], before[name])


def test_a_sum_is_rounded_once(merged: Merged, micro_wan: Path, tmp_path: Path) -> None:
    """In bfloat16 1 + 3/1024 is 1, and that again; 1 + 6/1024 is 1 + 8/1024."""
    half = {name: one.to(torch.bfloat16) for name, one in load_file(micro_wan / _FILE).items()}
    half[f"{_Q}.weight"] = torch.ones(128, 128, dtype=torch.bfloat16)
    checkpoint = tmp_path / "half.safetensors"
    save_file(half, checkpoint)
    lora = {f"{_OWN_Q}.diff": torch.full((128, 128), 3 / 1024)}
    save_file(lora, tmp_path / "second.safetensors")
    out = import_model(
        locate(str(micro_wan), hashed=False), tmp_path / "twice", checkpoint=checkpoint,
        loras=[(tmp_path / "second.safetensors", 1.0)] * 2,
    )  # fmt: skip
    found = load_file(out / _FILE)
    assert found[f"{_Q}.weight"].dtype == torch.bfloat16
    assert (found[f"{_Q}.weight"].float() == 1 + 8 / 1024).all()
    assert torch.equal(found["proj_out.weight"], half["proj_out.weight"])
    told = json.loads((out / "imported.json").read_text())["loras"]
    assert [one["scale"] for one in told] == [1.0, 1.0]
    assert told[0]["files"][0]["sha256"] == file_sha256(tmp_path / "second.safetensors")


def test_all_spellings_are_one_lora(merged: Merged, tmp_path: Path) -> None:
    down, up = _pair(128, 128, 4, 1)
    found = []
    for a, b in (
        (f"transformer.{_Q}.lora_A.weight", f"transformer.{_Q}.lora_B.weight"),
        (f"base_model.model.{_Q}.lora_A.default.weight",
         f"base_model.model.{_Q}.lora_B.default.weight"),
        (f"diffusion_model.{_OWN_Q}.lora_down.weight", f"diffusion_model.{_OWN_Q}.lora_up.weight"),
        (f"model.diffusion_model.{_OWN_Q}.lora_A.weight",
         f"model.diffusion_model.{_OWN_Q}.lora_B.weight"),
        ("lora_unet_blocks_0_self_attn_q.lora_down.weight",
         "lora_unet_blocks_0_self_attn_q.lora_up.weight"),
    ):  # fmt: skip
        found.append(merged({a: down, b: up})[f"{_Q}.weight"])
        (tmp_path / "out").rename(tmp_path / f"done{len(found)}")
    assert all(torch.equal(one, found[0]) for one in found[1:])


def test_convolutions_norms_and_modulation(merged: Merged, before: dict[str, Tensor]) -> None:
    down, up = torch.randn(2, 4, 1, 2, 2), torch.randn(128, 2, 1, 1, 1)
    found = merged(
        {
            "patch_embedding.lora_down.weight": down,
            "patch_embedding.lora_up.weight": up,
            "blocks.1.norm3.diff": torch.full((128,), 0.25),
            "blocks.1.norm3.diff_b": torch.full((128,), 0.5),
            "blocks.0.modulation.diff": torch.full((1, 6, 128), 2.0),
        }
    )
    product = torch.einsum("or,rcthw->octhw", up.flatten(1), down)
    torch.testing.assert_close(
        found["patch_embedding.weight"], before["patch_embedding.weight"] + product,
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    for name, more in (
        ("blocks.1.norm2.weight", 0.25), ("blocks.1.norm2.bias", 0.5),
        ("blocks.0.scale_shift_table", 2.0),
    ):  # fmt: skip
        assert torch.equal(found[name], before[name] + more)


def _small() -> dict[str, Tensor]:
    down, up = _pair(128, 128, 4, 1)
    return {f"{_Q}.lora_A.weight": down, f"{_Q}.lora_B.weight": up}


@pytest.mark.parametrize("how", ["diffusers", "peft"])
def test_an_alpha_beside_the_tensors_counts(
    how: str, merged: Merged, before: dict[str, Tensor], tmp_path: Path
) -> None:
    if how == "diffusers":
        config = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})
        found = merged(_small(), metadata={"lora_adapter_metadata": config})
    else:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
        found = merged(_small(), name="adapter_model.safetensors")
    down, up = _pair(128, 128, 4, 1)
    assert torch.equal(found[f"{_Q}.weight"], before[f"{_Q}.weight"] + (up @ down) * 2.0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"use_dora": true}', "use_dora: True"),
        ('{"transformer.alpha_pattern": {"to_q": 2}}', "alpha_pattern"),
        ('{"lora_alpha": "8"}', "expected a number"),
        ('{"lora_alpha": true}', "expected a number"),
        ("[]", "not a JSON object"),
        ("x", "not valid JSON"),
        ("[" * 50_000, "nested too deeply"),
    ],
)
def test_what_a_configuration_asks_for_and_is_not_done_is_refused(
    text: str, told: str, merged: Merged
) -> None:
    with pytest.raises(SourceError, match=told):
        merged(_small(), metadata={"lora_adapter_metadata": text})


def test_all_keys_that_match_nothing_are_named(merged: Merged, tmp_path: Path) -> None:
    tensors = _small() | {
        "blocks.7.self_attn.q.lora_down.weight": torch.zeros(4, 128),
        "text_encoder.encoder.q.lora_A.weight": torch.zeros(4, 128),
        "blocks.0.self_attn.q.dora_scale": torch.zeros(1),
        "blocks.0.self_attn.norm_q.diff_b": torch.zeros(128),
        "blocks.0.self_attn.k.lora_A.weight": torch.zeros(4, 128),
        "blocks.0.self_attn.v.alpha": torch.tensor(4.0),
        "blocks.0.ffn.0.lora_A.weight": torch.zeros(4, 128),
        "blocks.0.ffn.0.lora_B.weight": torch.zeros(255, 4),
        "blocks.0.ffn.2.diff_b": torch.zeros(1),
        f"{_OWN_Q}.lora_up.weight": torch.zeros(128, 4),
    }
    with pytest.raises(SourceError) as caught:
        merged(tensors)
    told = str(caught.value)
    for line in (
        "blocks.7.self_attn.q.lora_down.weight: the transformer has no blocks.7.self_attn.q.weight",
        "text_encoder.encoder.q.lora_A.weight: the transformer has no",
        "dora_scale: no part of a LoRA",
        "norm_q.diff_b: the transformer has no blocks.0.self_attn.norm_q.bias",
        "blocks.0.attn1.to_k.weight: half a pair, only lora_A",
        "blocks.0.attn1.to_v.weight: an alpha without lora_A and lora_B",
        "blocks.0.ffn.net.0.proj.weight: [255, 4] times [4, 128] does not make [256, 128]",
        "blocks.0.ffn.net.2.bias: a difference of shape [1], expected [128]",
        "a second one for blocks.0.attn1.to_q.weight",
    ):
        assert line in told
    assert not (tmp_path / "out").exists()


def test_an_empty_file_is_refused(merged: Merged) -> None:
    with pytest.raises(SourceError, match="it holds no tensors"):
        merged({})


def test_what_a_lora_makes_infinite_is_refused(merged: Merged) -> None:
    tensors = _small()
    tensors[f"{_Q}.lora_B.weight"][0, 0] = float("nan")
    with pytest.raises(
        SourceError, match=r"to_q\.weight: holds NaN or infinity once lora\.safetensors is added"
    ):
        merged(tensors)


@pytest.mark.parametrize("told", [[1], {"format": 1}, None])
def test_metadata_that_is_no_text_is_refused(told: object, micro_wan: Path, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(_small(), path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps({"__metadata__": told, **json.loads(content[8 : 8 + length])}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    with pytest.raises(SourceError, match=r"lora\.safetensors: its __metadata__ is not text"):
        import_model(locate(str(micro_wan)), tmp_path / "out", loras=[(path, 1.0)])


def test_a_pair_of_rank_0_is_refused(merged: Merged) -> None:
    none = {f"{_Q}.lora_A.weight": torch.zeros(0, 128), f"{_Q}.lora_B.weight": torch.zeros(128, 0)}
    with pytest.raises(SourceError, match="rank 0"):
        merged(none)
