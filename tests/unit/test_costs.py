"""Predictions grow with the model and with what is shown; nothing is run to make one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from hbxt_compress import pipeline
from hbxt_compress.algorithms.gptq import Gptq
from hbxt_compress.costs import prediction, rates
from hbxt_compress.costs.counting import count
from hbxt_compress.costs.prediction import Prediction, predict, require_room, stage_costs
from hbxt_compress.costs.rounding import blind_bytes, gptq_work
from hbxt_compress.costs.stages import StageCost, compiling_s
from hbxt_compress.costs.work import KINDS, Rates, Work
from hbxt_compress.errors import PlanError
from hbxt_compress.layers import LayerKind, LayerName, LayerSpec
from hbxt_compress.plan import LayerPlan, Plan
from hbxt_compress.prompts import load_prompts
from hbxt_compress.recipe import load_recipe
from hbxt_compress.source import BUILTIN, Source, locate

EVEN = Rates(machine="even", per_second=dict.fromkeys(KINDS, 1e9), n_cores=2, is_compiled=True)


def _costs(model: Path | str, name: str, *, n_prompts: int | None = None) -> list[StageCost]:
    recipe, source = load_recipe(name), locate(str(model), hashed=False)
    planned: Plan = pipeline._assumed(recipe, source)
    prompts = load_prompts(recipe.calibration)
    if n_prompts is not None and planned.shown is not None:
        planned = replace(planned, shown=replace(planned.shown, n=n_prompts))
    return stage_costs(recipe, planned, source, prompts, copied=True)


def _told(costs: list[StageCost]) -> Prediction:
    return predict(costs, EVEN, ())


def test_a_larger_model_takes_more_of_everything(micro_wan: Path) -> None:
    small, large = (_told(_costs(model, "tiny")) for model in (micro_wan, BUILTIN))
    assert [one.stage for one in small.stages] == [one.stage for one in large.stages]
    for one, other in zip(small.stages, large.stages, strict=True):
        assert one.peak_rss_bytes <= other.peak_rss_bytes
        assert one.seconds is not None
        assert other.seconds is not None
        assert one.disk_bytes <= other.disk_bytes
        assert 0 <= one.seconds < other.seconds < math.inf


def test_more_prompts_take_longer(micro_wan: Path) -> None:
    few, many = (_told(_costs(micro_wan, "tiny", n_prompts=n)) for n in (3, 30))
    for stage in ("calibrate", "quantize"):
        short, long = (
            next(one.seconds for one in told.stages if one.stage == stage) for told in (few, many)
        )
        assert short is not None
        assert long is not None
        assert short < long


def test_what_is_done_is_not_counted_again(micro_wan: Path) -> None:
    costs = _costs(micro_wan, "tiny")
    whole, rest = predict(costs, EVEN, ()), predict(costs, EVEN, {"calibrate", "quantize"})
    assert {one.stage for one in whole.stages} - {one.stage for one in rest.stages} == {
        "calibrate", "quantize",
    }  # fmt: skip
    assert rest.seconds is not None
    assert whole.seconds is not None
    assert rest.seconds < whole.seconds
    assert predict(costs, None, ()).seconds is None


def test_counting_is_exact_for_a_layer_that_one_can_count_by_hand() -> None:
    layer = nn.Linear(64, 32, device="meta")
    out, counted = count(lambda: layer(torch.empty(8, 64)).relu())
    assert out.shape == (8, 32)
    assert counted.flops == 2 * 8 * 64 * 32
    assert counted.moved == 2 * 8 * 32 * 4  # relu reads and writes
    assert counted.peak_bytes == 2 * 8 * 32 * 4


def test_the_work_of_gptq_grows_as_the_cube_of_its_inputs() -> None:
    narrow, wide = (gptq_work(Gptq(), 4096, n, 128, judged=True) for n in (2560, 5120))
    kinds = {"float32": 4.0, "factor32": 8.0, "feed_column": 2.0}
    for kind, factor in kinds.items():
        ratio = wide.amounts[kind] / narrow.amounts[kind]  # type: ignore[index]
        assert factor / 2 < ratio <= 1.01 * factor


def test_work_adds_up_and_refuses_unknown_kinds() -> None:
    work = Work.of(read=1e9) + Work.of(read=1e9, hash=2e9) * 2
    assert work.seconds(EVEN) == pytest.approx(7.0)
    with pytest.raises(ValueError, match=r"no kinds of work: reed; known: read"):
        Work.of(reed=1)


def test_compiling_is_counted_once_for_each_kind_of_search() -> None:
    assert compiling_s(0, cached=False) == 0
    assert compiling_s(1, cached=True) < compiling_s(2, cached=True)
    assert compiling_s(1, cached=True) < compiling_s(1, cached=False)


def test_rates_are_remembered_for_the_same_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Path] = []

    def measure(folder: Path) -> Rates:
        measured.append(folder)
        return replace(EVEN, machine=rates._machine())

    monkeypatch.setattr(rates, "measure_rates", measure)
    memo = tmp_path / "store" / "rates.json"
    first, again = rates.find_rates(memo), rates.find_rates(memo)
    assert first.per_second == again.per_second
    assert measured == [memo.parent]
    rates.find_rates(memo, renew=True)
    monkeypatch.setattr(rates, "_machine", lambda: "another")
    rates.find_rates(memo)
    assert len(measured) == 3


def test_room_is_checked_on_both_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = predict(
        [StageCost(stage="export", work=Work(), peak_bytes=5e9, kept_bytes=3e9),
         StageCost(stage="copy", work=Work(), peak_bytes=1e9, kept_bytes=3e9)],
        None, (),
    )  # fmt: skip
    store, out = tmp_path / "store", tmp_path / "out"
    monkeypatch.setattr(prediction, "free_memory", lambda: 6 * 10**9)
    monkeypatch.setattr(prediction, "free_bytes", lambda _: 4 * 10**9)
    with pytest.raises(PlanError, match=r"disk: 6.0 GB for .*store, 4.0 GB are free"):
        require_room(told, store, out, 3 * 10**9, name="r")
    monkeypatch.setattr(prediction, "_device", lambda path: len(str(path)))
    require_room(told, store, out, 3 * 10**9, name="r")
    monkeypatch.setattr(prediction, "free_memory", lambda: 4 * 10**9)
    with pytest.raises(PlanError, match=r"memory: 5.0 GB at the peak of export, 4.0 GB are avail"):
        require_room(told, store, out, 3 * 10**9, name="r")


def test_a_small_model_is_not_counted(
    micro_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(*_: object, **__: object) -> None:
        raise AssertionError("counted")

    monkeypatch.setattr(pipeline, "stage_costs", counted)
    from hbxt_compress.store import Store

    pipeline.require_room_for(load_recipe("w4a16"), str(micro_wan), Store(tmp_path))
    source: Source = locate(str(micro_wan), hashed=False)
    monkeypatch.setattr(prediction, "free_memory", lambda: 10**9)
    assert not prediction.is_small(pipeline._assumed(load_recipe("w4a16"), source), source)


def test_a_table_is_rounded_in_the_memory_of_its_codes() -> None:
    def layer(kind: LayerKind, weights: str) -> LayerPlan:
        name = LayerName(f"text_encoder/{kind}")
        spec = LayerSpec(name=name, kind=kind, shape=(1000, 128), dtype="F16", block=None)
        return LayerPlan(
            spec=spec, weights=weights, activations="keep", how=None, rule=0, reason=""
        )

    table, linear = layer("embedding", "int4-row-g128"), layer("linear", "int4-g128")
    assert blind_bytes([table]) == table.bytes_after < 0.6 * 128_000
    assert blind_bytes([linear]) == (1.5 + 3) * 128_000
    assert blind_bytes([table, linear, linear]) == table.bytes_after + 6 * 128_000
