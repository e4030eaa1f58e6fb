"""Probe: damages that are zero where nothing arrives, fall with bits, and order layers rightly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hbxt_compress.algorithms.scales import search_scales
from hbxt_compress.errors import CalibrationError
from hbxt_compress.formats import FORMATS
from hbxt_compress.layers import LayerName, LayerSpec
from hbxt_compress.machine import Machine
from hbxt_compress.models import family_of
from hbxt_compress.plan import Choice
from hbxt_compress.source import Source
from hbxt_compress.stages import probe as probing
from hbxt_compress.stages import sensitivity
from hbxt_compress.stages.batches import text_batches, transformer_batches
from hbxt_compress.stages.probe import probe, read_damages
from hbxt_compress.stages.tape import Tape
from hbxt_compress.stages.walk import walk
from hbxt_compress.store import Entry, Work
from hbxt_compress.trajectories import load_trajectories
from tests.observed import changed, observed, source_of, with_two_experts

_RISING = ("int4-g128", "int4-g64", "int4-g32", "int8-channel")
_HEAD = ("transformer/condition_embedder.text_embedder.linear_1", "transformer/proj_out")
_Damages = dict[LayerName, dict[str, float]]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _mute(name: str, tensor: Tensor) -> Tensor:
    """Nothing that block 0's first attention or block 1's MLP computes goes any further.

    The other weights differ in size by layer, so that their damages do too.
    """
    if name.endswith(("blocks.0.attn1.to_out.0.weight", "blocks.1.ffn.net.2.weight")):
        return torch.zeros_like(tensor)
    if tensor.ndim == 2 and "to_out" in name:
        return tensor * (0.2 if "blocks.0" in name else 3.0)
    return tensor


@pytest.fixture(scope="module")
def source(micro_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return source_of(changed(micro_wan, tmp_path_factory.mktemp("mute") / "wan", _mute))


@pytest.fixture(scope="module")
def seen(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Entry:
    return observed(source, tmp_path_factory.mktemp("seen") / "t")


def _choices(source: Source, formats: tuple[str, ...] = (*_RISING, "fp16")) -> list[Choice]:
    """Of all linears in blocks, and two outside."""
    family = family_of(source)
    return [
        Choice(spec=spec, formats=formats)
        for spec in family.layers(source)
        if spec.kind == "linear" and (spec.block is not None or spec.name in _HEAD)
    ]


@pytest.fixture(scope="module")
def probed(source: Source, seen: Entry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probed")
    probe(Work(folder), source, _choices(source), seen, Machine())
    return folder


@pytest.fixture(scope="module")
def damages(probed: Path) -> _Damages:
    return {name: dict(row) for name, row in read_damages(probed).items()}


def test_every_choice_gets_a_damage_for_every_format(source: Source, damages: _Damages) -> None:
    assert damages.keys() == {choice.spec.name for choice in _choices(source)}
    for row in damages.values():
        assert row.keys() == {*_RISING, "fp16"}
        assert row["fp16"] == 0.0
        assert all(0 <= damage < 10 for damage in row.values())


def test_damage_falls_with_more_bits_for_every_layer(damages: _Damages) -> None:
    for name, row in damages.items():
        rising = [row[fmt] for fmt in _RISING]
        if any(rising):
            assert all(less < more for more, less in pairwise(rising)), name
            assert rising[-1] < 0.05 * rising[0]


def test_what_is_multiplied_by_zero_downstream_does_no_damage(damages: _Damages) -> None:
    muted = [f"transformer/blocks.0.attn1.to_{x}" for x in "qkv"]
    muted.append("transformer/blocks.1.ffn.net.0.proj")
    for name in muted:
        assert damages[LayerName(name)]["int4-g128"] < 1e-12, name
    others = [row["int4-g128"] for name, row in damages.items() if name not in muted]
    nothing = [damage for damage in others if damage == 0]
    assert len(nothing) == 2  # the layers of zeros themselves
    assert min(damage for damage in others if damage) > 1e-9


def _true_damage(source: Source, seen: Entry, spec: LayerSpec, fmt: str) -> float:
    """What the velocity really loses when a layer alone is rounded to nearest, its mean kept."""
    module = family_of(source).load(source, "transformer")
    chain = family_of(source).chain(source, "transformer", module)
    stations = walk(source, load_trajectories(seen.folder), 1, torch.device("cpu"))
    batches = next(s.sides.batches for s in stations if s.component == "transformer")
    layer = module.get_submodule(spec.module)
    rows: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _m, args, _o: rows.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        expected = [chain.whole(*batch.full) for batch in batches]
    handle.remove()
    grid = search_scales(layer.weight.data, FORMATS[fmt])
    lost_OI = layer.weight.data - grid.value(grid.levels(layer.weight.data))
    layer.weight.data -= lost_OI
    if layer.bias is not None:
        layer.bias.data += lost_OI @ torch.cat(rows).mean(0)
    lost = kept = 0.0
    for batch, v in zip(batches, expected, strict=True):
        with torch.no_grad():
            lost += batch.weight * float((chain.whole(*batch.full) - v).square().sum())
        kept += batch.weight * float(v.square().sum())
    return lost / kept


def test_damages_are_about_what_rounding_a_layer_alone_does(
    source: Source, seen: Entry, damages: _Damages
) -> None:
    """Feedback is expected to save some of it; layers are ordered as in truth."""
    pairs = []
    for choice in _choices(source):
        spec = choice.spec
        if spec.component == "transformer" and damages[spec.name]["int4-g64"] > 1e-12:
            true = _true_damage(source, seen, spec, "int4-g64")
            assert 0.2 < damages[spec.name]["int4-g64"] / true < 1.6, spec.name
            pairs.append((damages[spec.name]["int4-g64"], true))
    estimated, real = torch.tensor(pairs).log().T
    assert len(pairs) > 12
    assert float(torch.corrcoef(torch.stack([estimated, real]))[0, 1]) > 0.95
    assert float(real.max() - real.min()) > 3  # a factor of 20: there is something to order


def test_two_probes_write_the_same_and_the_order_of_choices_is_no_matter(
    source: Source, seen: Entry, probed: Path, tmp_path: Path
) -> None:
    probe(Work(tmp_path), source, _choices(source)[::-1], seen, Machine())
    written = (tmp_path / "damages.json").read_bytes()
    assert written == (probed / "damages.json").read_bytes()


def test_a_finished_probe_is_read_and_not_repeated(
    source: Source, seen: Entry, probed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "_damages", None)
    probe(Work(probed), source, _choices(source), seen, Machine())


def test_a_killed_probe_goes_on_and_ends_with_the_same_bytes(
    source: Source, seen: Entry, probed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at every fifth piece: of those, up to three are outside of blocks and run again."""
    left = [0]
    passed: list[str] = []

    @contextmanager
    def at(tape: Tape, piece: str) -> Iterator[None]:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        with entered(tape, piece):
            yield
        passed.append(piece)

    entered = Tape.at
    monkeypatch.setattr(Tape, "at", at)
    n_runs = 0
    while not (tmp_path / "damages.json").exists():
        left[0], n_runs = 5, n_runs + 1
        with suppress(KeyboardInterrupt):
            probe(Work(tmp_path), source, _choices(source), seen, Machine())
    assert n_runs > 2
    assert len([piece for piece in passed if piece != "loose"]) == 8  # two models, there and back
    assert (tmp_path / "damages.json").read_bytes() == (probed / "damages.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["damages.json"]


def test_nothing_but_the_result_is_left_behind(probed: Path) -> None:
    assert [path.name for path in probed.iterdir()] == ["damages.json"]


def test_text_layers_are_judged_by_what_reaches_the_velocity(
    source: Source, seen: Entry, damages: _Damages
) -> None:
    family = family_of(source)
    encoder = family.load(source, "text_encoder")
    chain = family.chain(source, "text_encoder", encoder)
    transformer = family.chain(source, "transformer", family.load(source, "transformer"))
    states = load_trajectories(seen.folder)
    sampler = family.sampler(source)

    @torch.no_grad()
    def velocities() -> list[tuple[float, Tensor]]:
        numbered = text_batches(states, 1)
        texts = {i: (out, out) for i, b in numbered for out in [chain.whole(*b.full)]}
        batches = transformer_batches(states, texts, 1, sampler, second=False)
        return [(b.weight, transformer.whole(*b.full)) for b in batches]

    expected, pairs = velocities(), []
    for name, row in damages.items():
        if not name.startswith("text_encoder/") or row["int4-g64"] == 0:
            continue
        layer = encoder.get_submodule(name.removeprefix("text_encoder/"))
        original = layer.weight.data
        grid = search_scales(original, FORMATS["int4-g64"])
        layer.weight.data = grid.value(grid.levels(original))
        both = list(zip(velocities(), expected, strict=True))
        lost = sum(weight * float((v - u).square().sum()) for (weight, v), (_, u) in both)
        true = lost / sum(weight * float(u.square().sum()) for _, (weight, u) in both)
        layer.weight.data = original
        pairs.append((row["int4-g64"], true))
    estimated, real = torch.tensor(pairs).log().T
    assert len(pairs) == 14
    assert float((estimated - real).abs().max()) < math.log(1.6)
    assert float(torch.corrcoef(torch.stack([estimated, real]))[0, 1]) > 0.95
    assert float(real.max() - real.min()) > 2.5  # a factor of 12


@pytest.mark.parametrize(
    ("name", "value", "moved"),
    [("WHOLE", 128, ("ffn.net.2", ".wo")), ("WEIGHTS", 1 << 12, ("",))],
)
def test_a_wide_layer_is_judged_by_slices_and_a_large_one_by_some_rows(
    source: Source, seen: Entry, damages: _Damages, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, name: str, value: int, moved: tuple[str, ...],
) -> None:  # fmt: skip
    monkeypatch.setattr(sensitivity, name, value)
    monkeypatch.setattr(sensitivity, "SLICE", 128)
    probe(Work(tmp_path), source, _choices(source), seen, Machine())
    for layer, row in read_damages(tmp_path).items():
        for fmt in _RISING:
            if not layer.endswith(moved):
                assert row[fmt] == damages[layer][fmt]
            elif damages[layer][fmt] > 1e-12:
                assert 0.85 < row[fmt] / damages[layer][fmt] < 1.2, (layer, fmt)


def test_experts_are_judged_each_by_its_own_steps(micro_wan: Path, tmp_path: Path) -> None:
    source = source_of(with_two_experts(micro_wan, tmp_path / "wan"))
    both = observed(source, tmp_path / "both", n_prompts=2, observe=(0, 2))
    layers = ("blocks.0.attn1.to_q", "SelfAttention.v")
    few = [c for c in _choices(source, ("int4-g64", "fp16")) if c.spec.name.endswith(layers)]
    few += [
        Choice(spec=spec, formats=("int4-g64", "fp16"))
        for spec in family_of(source).layers(source)
        if spec.name.endswith("condition_embedder.time_proj")  # its input has no tokens
    ]
    (tmp_path / "p").mkdir()
    probe(Work(tmp_path / "p"), source, few, both, Machine())
    found = {name: row["int4-g64"] for name, row in read_damages(tmp_path / "p").items()}
    assert len(found) == len(few) == 6
    for name, damage in found.items():  # at the one step of an expert a bias mends time_proj
        assert damage < 1e-12 if name.endswith("time_proj") else damage > 1e-9, name
    first, second = (found[LayerName(f"{e}/{layers[0]}")] for e in ("transformer", "transformer_2"))
    assert first != second  # one set of weights, other states


def test_the_decoders_convolutions_can_be_probed_too(
    source: Source, seen: Entry, tmp_path: Path
) -> None:
    specs = [s for s in family_of(source).layers(source) if s.component == "vae_decoder"][:2]
    choices = [Choice(spec=spec, formats=("int8-channel", "fp16")) for spec in specs]
    probe(Work(tmp_path), source, choices, seen, Machine())
    for row in read_damages(tmp_path).values():
        assert row["fp16"] == 0
        assert 0 < row["int8-channel"] < 0.01


def test_layers_that_no_observed_step_reaches_are_named(micro_wan: Path, tmp_path: Path) -> None:
    source = source_of(with_two_experts(micro_wan, tmp_path / "wan"))
    early = observed(source, tmp_path / "early", n_prompts=2, observe=(0,))
    few = [
        c
        for c in _choices(source, ("int4-g64", "fp16"))
        if c.spec.name.endswith("blocks.1.attn2.to_q")
    ]
    (tmp_path / "p").mkdir()
    with pytest.raises(CalibrationError, match=r"transformer_2/blocks\.1\.attn2\.to_q") as caught:
        probe(Work(tmp_path / "p"), source, few, early, Machine())
    assert "1 layers saw no input" in str(caught.value)
    assert not list((tmp_path / "p").glob("*.json"))


def test_one_prompt_is_not_enough_to_judge_by(source: Source, tmp_path: Path) -> None:
    alone = observed(source, tmp_path / "t", n_prompts=1)
    with pytest.raises(CalibrationError, match="two or more"):
        probe(Work(tmp_path), source, _choices(source), alone, Machine())


def test_tables_whose_inputs_are_no_features_are_refused(
    source: Source, seen: Entry, tmp_path: Path
) -> None:
    layers = family_of(source).layers(source)
    blind = [spec for spec in layers if spec.component != "vae_decoder" and spec.kind != "linear"]
    choices = [Choice(spec=spec, formats=("int8-channel", "fp16")) for spec in blind]
    assert {spec.kind for spec in blind} == {"embedding", "conv3d"}
    with pytest.raises(CalibrationError, match="cannot decide about these") as caught:
        probe(Work(tmp_path), source, choices, seen, Machine())
    assert "transformer/patch_embedding: its inputs are no features" in str(caught.value)
