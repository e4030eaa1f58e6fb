"""--smoke: a recipe is tried on two blocks first, and what breaks there never starts in full."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hbxt_compress import pipeline, smoke
from hbxt_compress.errors import ExportError
from hbxt_compress.machine import Machine
from hbxt_compress.models import family_of
from hbxt_compress.recipe import load_recipe
from hbxt_compress.smoke import shortened, try_out
from hbxt_compress.source import BUILTIN, locate


def test_a_shortened_model_is_whole_but_for_its_depth(tmp_path: Path) -> None:
    source = locate(BUILTIN, hashed=False)
    short = locate(str(shortened(source, tmp_path / "short", texts=("a red", ""))), hashed=False)
    family = family_of(source)
    blocks = {spec.block for spec in family.layers(short) if spec.component == "transformer"}
    assert blocks == {None, 0, 1}
    wanted = {spec.name: spec.shape for spec in family.layers(source)}
    for spec in family.layers(short):
        if spec.kind != "embedding":
            assert wanted[spec.name] == spec.shape
    table = next(spec for spec in family.layers(short) if spec.name == "text_encoder/shared")
    assert table.shape[0] <= wanted[table.name][0]
    for component in family.components(short):
        family.skeleton(short, component)
    whole, part = (family.weights(one, "transformer") for one in (source, short))
    name = "blocks.1.attn1.to_q.weight"
    assert whole.tensor(name).equal(part.tensor(name))
    assert family.sampler(short).n_steps == 4


def test_a_recipe_runs_end_to_end_on_two_blocks(tmp_path: Path, micro_wan: Path) -> None:
    done = try_out(load_recipe("tiny"), str(micro_wan), tmp_path / "store", machine=Machine())
    assert done.seconds > 0
    assert "2 blocks" in done.text
    assert list((tmp_path / "store").iterdir()) == []


def test_what_breaks_at_export_is_found_before_the_whole_model_is_begun(
    tmp_path: Path, micro_wan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in micro_wan.rglob("*"):
        to = broken / path.relative_to(micro_wan)
        to.mkdir(exist_ok=True) if path.is_dir() else to.write_bytes(path.read_bytes())
    (weights,) = (broken / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["blocks.1.ffn.net.2.weight"][0, 0] = 1e5  # float16 ends at 65504
    save_file(tensors, weights, metadata={"format": "pt"})
    asked: list[str] = []
    compress = pipeline.compress

    def noted(recipe: object, model: str, *args: object, **named: object) -> Path:
        asked.append(model)
        return compress(recipe, model, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(smoke.pipeline, "compress", noted)
    with pytest.raises(ExportError, match=r"blocks\.1\.ffn\.net\.2.*65504") as caught:
        try_out(load_recipe("fp16"), str(broken), tmp_path / "store", machine=Machine())
    assert "found by --smoke" in str(caught.value.__notes__)
    assert str(broken) not in asked
    assert json.loads((broken / "transformer" / "config.json").read_text())["num_layers"] == 2
