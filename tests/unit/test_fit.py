"""Whether a model fits: stages, cards, changes, and the command that tells."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from hbxt_compress.cli import hbxt
from hbxt_compress.errors import HbxtError, SourceError, UsageError
from hbxt_compress.fit.answer import Asker
from hbxt_compress.fit.cards import CPU, GIB, Card, Room, cards, find_room, memory_bytes
from hbxt_compress.fit.changes import Fitter, Setting, smaller_clips
from hbxt_compress.fit.constants import stored_bytes
from hbxt_compress.fit.lowered import Lowerer
from hbxt_compress.fit.residency import Residency, fuses_attention, measure_stage, measure_stages
from hbxt_compress.fit.roofline import ATTENTION, estimate
from hbxt_compress.geometry import Geometry
from hbxt_compress.graph.table import targets
from hbxt_compress.recipe import load_recipe
from hbxt_compress.show_fit import lines
from hbxt_compress.source import locate

_GPU = "gfx1201"


@pytest.fixture(scope="module")
def lowerer(micro_wan: Path) -> Lowerer:
    return Lowerer(source=locate(str(micro_wan), hashed=False))


def _room(n_bytes: int, target: str = _GPU) -> Room:
    card = None if target == CPU else cards().cards[0]
    return Room(target=target, card=card, n_bytes=n_bytes, most_bytes=n_bytes, reserve_bytes=0)


def test_cards_are_targets_that_runtimes_know_and_have_names_of_their_own() -> None:
    known, found = set(targets()), cards().cards
    assert {card.gfx for card in found} <= known
    assert len({card.short for card in found}) == len(found)
    for card in found:
        assert 0 < min(card.memory_gb) <= max(card.memory_gb)
        assert card.tflops.keys() == {"float32", "float16", "int8"}
        assert card.tflops["float32"] < card.tflops["float16"] <= card.tflops["int8"]


def test_a_target_is_a_gfx_name_a_card_or_the_processor() -> None:
    assert find_room(_GPU).name == "Radeon RX 9070 XT"
    assert find_room("rx-9060-xt-8gb").n_bytes == 8 * GIB
    assert find_room("gfx1151").most_bytes > find_room("gfx1151").n_bytes
    assert find_room(_GPU, "12GB").n_bytes == 12 * GIB
    assert find_room(CPU).card is None
    assert find_room(CPU, "2GB").usable_bytes == 2 * GIB


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("16GB", 16 << 30), ("1.5 gib", 3 << 29), ("800MB", 800 << 20), ("2", 2 << 30)],
)
def test_sizes_of_memory(text: str, n_bytes: int) -> None:
    assert memory_bytes(text) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "GB", "0", "-1GB", "16TB", "1e9", "16 gigs", "nan", "9999999GB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="give a size such as 16GB"):
        memory_bytes(text)


def test_graphs_are_those_of_the_export_to_the_byte(lowerer: Lowerer) -> None:
    """Bytes of weights as planned; vectors and scalars that all layers share are beside them."""
    clip = lowerer.family.geometry(lowerer.source)
    for name in ("fp16", "w4a16-fast", "w8a8", "w8a8-static"):
        recipe = load_recipe(name)
        planned = lowerer.plan(recipe).components()
        for component, sizes in planned.items():
            stored = max(map(stored_bytes, lowerer.graphs(recipe, component, clip).values()))
            assert stored == pytest.approx(sizes["after"], rel=0.06), (name, component)


def test_recipes_leave_a_trace_as_it_was(micro_wan: Path) -> None:
    lowerer = Lowerer(source=locate(str(micro_wan), hashed=False))
    clip = lowerer.family.geometry(lowerer.source)

    def types(recipe: str) -> list[str]:
        (model,) = lowerer.graphs(load_recipe(recipe), "transformer", clip).values()
        return [str(value.dtype) for node in model.graph for value in node.outputs]

    before = types("fp32")
    assert "FLOAT16" not in before
    assert "FLOAT16" in types("fp16")
    assert types("fp32") == before


def test_every_shape_is_known(lowerer: Lowerer) -> None:
    clip = lowerer.family.geometry(lowerer.source)
    for component in lowerer.family.components(lowerer.source):
        for target in (_GPU, CPU):
            graphs = lowerer.graphs(load_recipe("w4a16"), component, clip)
            for stage in measure_stages(component, graphs, target):
                assert 0 < stage.weight_bytes < 10e6
                assert 0 < stage.value_bytes < 20e6 + (1 << 28) * (target == CPU)


def test_values_grow_with_tokens_and_scores_with_their_square(lowerer: Lowerer) -> None:
    clip = lowerer.family.geometry(lowerer.source)
    taken = []
    for n_frames in (5, 13, 29):
        longer = replace(clip, n_frames=n_frames)
        (model,) = lowerer.graphs(load_recipe("fp16"), "transformer", longer).values()
        fused, whole = (
            measure_stage("transformer", "model.onnx", model, _GPU, fused=one)
            for one in (True, False)
        )
        on_cpu = measure_stage("transformer", "model.onnx", model, CPU)
        taken.append((fused.value_bytes, whole.value_bytes, on_cpu.value_bytes))
        assert fused.weight_bytes == whole.weight_bytes
        card = cards().cards[0]
        assert estimate(card, fused.done).total <= estimate(card, whole.done).total
        assert 0 < estimate(card, fused.done).seconds[ATTENTION] < estimate(card, fused.done).total
    for column in zip(*taken, strict=True):
        assert list(column) == sorted(column)
    assert taken[2][0] > taken[1][0] > taken[0][0]
    tokens = [lowerer.family.tokens(lowerer.source, replace(clip, n_frames=n)) for n in (5, 13, 29)]
    assert taken[2][0] < 1.5 * taken[0][0] * tokens[2] / tokens[0]


def test_attention_is_fused_where_the_runtime_sees_to_it() -> None:
    assert all(fuses_attention(card.gfx) for card in cards().cards)


def test_one_graph_at_a_time_takes_the_largest_and_all_the_sum(lowerer: Lowerer) -> None:
    clip = lowerer.family.geometry(lowerer.source)
    stages = tuple(
        stage
        for component in lowerer.family.components(lowerer.source)
        for stage in measure_stages(
            component, lowerer.graphs(load_recipe("w8a16"), component, clip), _GPU
        )
    )
    assert [one.name for one in stages] == [
        "text_encoder", "transformer", "vae_decoder, first frame", "vae_decoder",
    ]  # fmt: skip
    sizes = [one.n_bytes for one in stages]
    assert Residency(stages=stages, loading="all kept").peak_bytes == sum(sizes)
    one_by_one = Residency(stages=stages, loading="one after the other")
    assert one_by_one.peak_bytes == max(sizes) == one_by_one.worst.n_bytes


def test_the_smallest_change_is_tried_first_and_only_what_is_needed_is_named(
    micro_wan: Path,
) -> None:
    asker = Asker(locate(str(micro_wan), hashed=False))
    recipe = load_recipe("fp16")
    (clip,) = asker.geometries(None)
    plenty = asker.answer(recipe, clip, _room(GIB))
    assert plenty.changes == ()
    assert plenty.found == plenty.asked == Setting(recipe="fp16", clip=clip)
    whole = plenty.residency.peak_bytes
    assert asker.answer(recipe, clip, _room(whole)).changes == ()
    tight = asker.answer(recipe, clip, _room(whole - 1))
    assert tight.changes == ("one graph open at a time",)
    assert tight.residency.peak_bytes < whole
    tighter = asker.answer(recipe, clip, _room(tight.residency.peak_bytes - 1))
    assert tighter.found is not None
    assert tighter.changes[0] == "one graph open at a time"
    assert len(tighter.changes) == 2
    assert tighter.residency.peak_bytes < tight.residency.peak_bytes
    nothing = asker.answer(recipe, clip, _room(1000))
    assert nothing.found is None
    assert nothing.to_json()["fits_with"] is None


def test_frames_are_decoded_whole_or_in_tiles_and_not_both(lowerer: Lowerer) -> None:
    clip = Geometry(height=512, width=288, n_frames=5, fps=8.0)
    fitter = Fitter(lowerer)
    whole, tiled = (
        fitter.residency(Setting(recipe="fp16", clip=clip, tiled=one), _GPU).stages
        for one in (False, True)
    )
    titles = [stage.name for stage in whole]
    assert titles == [stage.name for stage in tiled]
    assert len(titles) == len(set(titles)) == 4
    before, after = (found[-1].value_bytes for found in (whole, tiled))
    assert 0.3 * before < after < 0.6 * before  # a tile has 256 x 256 pixels


def test_smaller_clips_keep_the_shape_and_are_sizes_the_model_takes(lowerer: Lowerer) -> None:
    clip = replace(lowerer.family.geometry(lowerer.source), height=192, width=320)
    found = list(smaller_clips(lowerer, clip))
    assert found
    areas = [one.height * one.width for one in found]
    assert areas == sorted(areas, reverse=True)
    assert areas[0] < clip.height * clip.width
    for one in found:
        assert lowerer.family.tokens(lowerer.source, one) > 0
    assert abs(math.log(found[0].width / found[0].height / (320 / 192))) < 0.2


def test_products_count_at_the_rate_of_their_numbers(lowerer: Lowerer) -> None:
    clip = replace(lowerer.family.geometry(lowerer.source), n_frames=29)
    kinds = {}
    for name in ("fp32", "fp16", "w8a8-static"):
        (model,) = lowerer.graphs(load_recipe(name), "transformer", clip).values()
        done = measure_stage("transformer", "model.onnx", model, _GPU).done
        kinds[name] = {one.computed for one in done if one.flops and one.kind == "linear"}
        card = Card(
            name="Radeon slow", gfx=_GPU, memory_gb=(1.0,), bandwidth_gbs=1e9,
            tflops={"float32": 1.0, "float16": 2.0, "int8": 4.0}, remarks="",
        )  # fmt: skip
        total = sum(one.flops / (1e12 * card.tflops[one.computed]) for one in done)
        assert estimate(card, done).total == pytest.approx(total, rel=1e-3)
    assert kinds["fp32"] == {"float32"}
    assert "float16" in kinds["fp16"]
    assert "int8" in kinds["w8a8-static"]


def _told(*arguments: str) -> object:
    result = CliRunner().invoke(hbxt, ["plan", *arguments], catch_exceptions=True)
    if isinstance(result.exception, HbxtError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_tells_of_each_size(micro_wan: Path) -> None:
    sizes = ("--geometry", "32x32x5,32x48x9", "--target", _GPU, "--json")
    first, second = json.loads(str(_told("fp16", "--model", str(micro_wan), *sizes)))
    assert (first["geometry"], second["geometry"]) == ("32x32x5", "32x48x9")
    assert first["fits"]
    assert first["card"] == "Radeon RX 9070 XT"
    assert first["peak_bytes"] < second["peak_bytes"]
    assert first["estimated_seconds_per_step"] > 0


def test_an_answer_is_told_in_words(micro_wan: Path) -> None:
    asker = Asker(locate(str(micro_wan), hashed=False))
    (clip,) = asker.geometries(None)
    recipe = load_recipe("w4a16-fast")
    told = "\n".join(lines(asker.answer(recipe, clip, find_room(_GPU))))
    assert "Radeon RX 9070 XT (gfx1201), 16 GB: fits" in told
    assert "estimate, not measured" in told
    assert "an assumption" in told
    told = "\n".join(lines(asker.answer(recipe, clip, find_room(CPU, "1GB"))))
    assert "fits" in told
    assert "estimate" not in told
    told = "\n".join(lines(asker.answer(recipe, clip, _room(1000))))
    assert "does not fit: vae_decoder takes" in told


@pytest.mark.parametrize(
    ("arguments", "kind", "match"),
    [
        (("--target", "gfx1202"), UsageError, "did you mean 'gfx1201'|did you mean 'gfx1200'"),
        (("--target", _GPU, "--vram", "much"), UsageError, "give a size such as 16GB"),
        (("--target", _GPU, "--geometry", "32x32"), UsageError, "height x width x frames"),
        (("--target", _GPU, "--geometry", "33x32x5"), SourceError, "must be a multiple of .*32"),
        (("--geometry", "32x32x5"), UsageError, "--target"),
        (("--vram", "16GB"), UsageError, "--target"),
    ],
)
def test_bad_options_are_told(
    arguments: tuple[str, ...], kind: type[Exception], match: str, micro_wan: Path
) -> None:
    with pytest.raises(kind, match=match):
        _told("fp16", "--model", str(micro_wan), *arguments)
