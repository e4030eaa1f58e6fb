"""What training is foretold to take, against tensors that are counted in a real step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.autograd.graph import saved_tensors_hooks

from hbxt_compress.algorithms.few_steps import FewSteps
from hbxt_compress.algorithms.guidance import Guidance
from hbxt_compress.algorithms.training import Net, Training
from hbxt_compress.cli import hbxt
from hbxt_compress.costs.training import TrainingCost, kept_by, training_costs
from hbxt_compress.models import family_of
from hbxt_compress.ranks import ALONE
from hbxt_compress.source import locate

ROWS = 3


def _how(**changed: object) -> Training:
    return Training(**{"batch": ROWS, "precision": "float32", **changed})  # type: ignore[arg-type]


def _told(model: Path, how: Training, ranks: tuple[int, ...] = (1,)) -> list[TrainingCost]:
    source = locate(str(model), hashed=False)
    return training_costs(family_of(source), source, [Guidance(train=how)], ranks)


def _step(model: Path, how: Training) -> tuple[Net, float, tuple[float, float, float]]:
    """A net after a real step; bytes saved for its gradients; the same by block."""
    source = locate(str(model), hashed=False)
    family = family_of(source)
    chain = family.chain(source, "transformer", family.load(source, "transformer"))
    net = Net(chain.module.requires_grad_(True), how)
    text = family.text_length(source), source.config("transformer/config.json")["text_dim"]
    x = torch.randn(ROWS, *family.latent_shape(source))
    t, given = torch.full((ROWS,), 500.0), torch.randn(ROWS, *text)
    own = {p.untyped_storage().data_ptr() for p in net.chosen.values()}
    saved: dict[int, torch.Tensor] = {}

    def pack(one: torch.Tensor) -> torch.Tensor:
        if one.untyped_storage().data_ptr() not in own:
            saved[one.untyped_storage().data_ptr()] = one
        return one

    with how.autocast(torch.device("cpu")), saved_tensors_hooks(pack, lambda one: one):
        out = chain.call(chain.module, x, t, given)
    n_bytes = sum(one.untyped_storage().nbytes() for one in saved.values())
    net.descend(out.square().mean(), 0.0)
    with how.autocast(torch.device("cpu")):
        counted = kept_by(chain.module, chain.blocks, lambda: chain.call(chain.module, x, t, given))
    return net, n_bytes, counted


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_holds_what_was_foretold(precision: str, micro_wan: Path) -> None:
    how = _how(precision=precision)
    (told,) = _told(micro_wan, how)
    net, saved, (every, given, block) = _step(micro_wan, how)
    student = told.networks[0]
    held = net.state()
    by_kind = {"weights": "value.", "average": "average.", "optimizer": "exp_"}
    for part, prefix in by_kind.items():
        n_bytes = sum(one.nbytes for name, one in held.items() if name.startswith(prefix))
        assert getattr(student, part) == n_bytes
    assert student.gradients == sum(p.nbytes for p in net.chosen.values())
    assert told.networks[1].total == student.weights  # the teacher: nothing but weights
    assert told.activations == pytest.approx(saved, rel=0.1)
    assert every == pytest.approx(saved, rel=0.01)
    assert told.activations_checkpointed == pytest.approx(given + block, rel=0.1)
    assert told.activations_checkpointed < told.activations
    assert told.gathered == 0


def test_checkpoints_change_memory_and_nothing_else(micro_wan: Path) -> None:
    plain, saved, _ = _step(micro_wan, _how())
    torch.manual_seed(0)
    nets = []
    for on in (False, True):
        torch.manual_seed(0)
        nets.append(_step(micro_wan, _how(checkpoint=on)))
    (one, many, _), (other, few, _) = nets
    assert few < 0.6 * many == 0.6 * saved
    for name, value in one.state().items():
        assert torch.equal(other.state()[name], value), name
    assert plain.ranks is ALONE


def test_a_module_that_cannot_run_again_is_refused() -> None:
    with pytest.raises(ValueError, match="checkpoint: Linear cannot run its blocks again"):
        Net(torch.nn.Linear(2, 2), _how(checkpoint=True))


def test_ranks_share_what_is_sharded(micro_wan: Path) -> None:
    one, three, two = _told(micro_wan, _how(), (1, 3, 2))
    assert three.networks[0].total == pytest.approx(one.networks[0].total / 3)
    assert three.activations == pytest.approx(one.activations / 3, rel=0.05)
    assert three.gathered > 0
    assert one.flops == three.flops
    assert one.flops_checkpointed / one.flops == pytest.approx((2 + 4) / (2 + 3))
    assert one.device_hours(2.0, checkpoint=False) == pytest.approx(
        (one.flops + one.teaching_flops) / 2e12 / 3600
    )
    assert one.problem is None
    assert two.problem == "a batch of 3 is no multiple of 2 ranks"


def test_what_trains_nothing_takes_one_rank(micro_wan: Path) -> None:
    source = locate(str(micro_wan), hashed=False)
    (told,) = training_costs(family_of(source), source, [FewSteps(n_steps=2)], (8,))
    assert (told.n_ranks, told.n_rows, told.activations) == (1, 0, 0.0)
    assert told.networks[0].total == 4 * told.n_parameters


RECIPE = """
name: few
summary: a test
calibration: tiny
distill: [{use: guidance, n_clips: 8, prompts: tiny, train: {batch: 6}}]
rules: [{match: "*", weights: keep, why: a test}]
accept: {suite: tiny}
"""


def test_the_command_tells_it(micro_wan: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "few.yaml"
    recipe.write_text(RECIPE)
    asked = ["plan", str(recipe), "--model", str(micro_wan), "--distill", "--tflops", "1"]
    ended = CliRunner().invoke(hbxt, [*asked, "--ranks", "1", "--ranks", "4", "--json"])
    assert ended.exit_code == 0, ended.output
    one, four = json.loads(ended.output)
    assert (one["distiller"], one["n_ranks"], four["n_ranks"]) == ("guidance", 1, 4)
    assert four["problem"] == "a batch of 6 is no multiple of 4 ranks"
    assert one["device_hours"]["checkpointed"] > one["device_hours"]["plain"] > 0
    assert one["bytes"]["plain"] > four["bytes"]["plain"]
    shown = CliRunner().invoke(hbxt, asked)
    assert "distill 1 of 1: guidance" in shown.output
    assert "student (trained), teacher" in shown.output
    assert "device hours at 1 TFLOP/s" in shown.output


def test_a_recipe_without_a_student_is_told_so(micro_wan: Path) -> None:
    asked = ["plan", "fp16", "--model", str(micro_wan), "--distill"]
    ended = CliRunner().invoke(hbxt, asked)
    assert ended.exit_code != 0
    assert "recipe fp16: has no `distill:`" in str(ended.exception)
