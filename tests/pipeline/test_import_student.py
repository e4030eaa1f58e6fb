"""From a distilled checkpoint in the authors' naming to clips of its artifact, by the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hbxt_compress import cli, pipeline
from hbxt_compress.artifact import Artifact
from hbxt_compress.machine import Machine
from hbxt_compress.recipe import load_recipe
from hbxt_compress.runtime.generate import Runtime
from hbxt_compress.runtime.session import Session
from hbxt_compress.store import Store
from tests.originals import original_tensors

_RECIPE = """
name: student
summary: four bits for a student of three steps
calibration: tiny
rules:
  - {match: "transformer/blocks.*.ffn*", weights: int4-g32}
  - {match: "*", weights: keep, why: a test}
round: {use: rtn}
accept: {suite: tiny}
"""


def _hbxt(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def test_a_student_keeps_its_three_steps_from_checkpoint_to_clip(
    micro_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, lora, out = (tmp_path / name for name in ("a.pt", "b.safetensors", "student"))
    torch.save({"generator": {f"model.{n}": t for n, t in original_tensors().items()}}, checkpoint)
    save_file({"blocks.0.ffn.0.diff_b": torch.ones(256)}, lora)
    steps = ("--steps", "1000,750,500", "--lora", f"{lora}=0.5")
    assert _hbxt("import", checkpoint, "--base", micro_wan, "--out", out, *steps) == 0
    bias = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    before = original_tensors()["blocks.0.ffn.0.bias"]
    assert torch.equal(bias["blocks.0.ffn.net.0.proj.bias"], (before.float() + 0.5).bfloat16())

    path = tmp_path / "student.yaml"
    path.write_text(_RECIPE)
    store = Store(tmp_path / "store")
    artifact = pipeline.compress(load_recipe(str(path)), str(out), store, machine=Machine())
    sampler = Artifact.open(artifact).manifest.sampler
    assert (sampler.solver, sampler.n_steps, sampler.guidance) == ("renoise", 3, 1.0)
    assert sampler.levels == pytest.approx((1.0, 15 / 16, 5 / 6), abs=1e-12)
    forwards: list[float] = []
    run = Session.run

    def counted(self: Session, inputs: dict[str, np.ndarray], **needed: Any) -> Any:
        if "timestep" in inputs:
            forwards.append(float(inputs["timestep"].reshape(-1)[0]))
        return run(self, inputs, **needed)

    monkeypatch.setattr(Session, "run", counted)
    with Runtime.open(artifact) as runtime:
        runtime.generate("a red circle", check=False)
    assert forwards == pytest.approx([1000, 937.5, 2500 / 3], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--steps", "1000;750"), "--steps 1000;750: write whole numbers, such as 1000,750,500"),
        (("--steps", "750,1000"), "steps 750,1000: must fall within 1..1000"),
        (("--lora", "a.safetensors=x"), "--lora a.safetensors=x: 'x' is no number"),
        (("--lora", "nowhere.safetensors"), "nowhere.safetensors: no such file or folder"),
        (("nowhere.pt",), "nowhere.pt: no such file or folder"),
        ((), "nothing to import"),
    ],
)
def test_bad_input_is_one_message(
    arguments: tuple[str, ...], told: str, micro_wan: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    (tmp_path / "a.pt").touch()
    given = arguments if "--steps" not in arguments else (tmp_path / "a.pt", *arguments)
    assert _hbxt("import", "--base", micro_wan, "--out", out, *given) == 2
    said = capsys.readouterr().err
    assert told in said
    assert "Traceback" not in said
    assert not out.exists()
