"""Every distiller makes a whole model folder, and a killed run the same one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hbxt_compress.algorithms import DISTILLERS
from hbxt_compress.algorithms.dmd import Dmd
from hbxt_compress.algorithms.few_steps import FewSteps
from hbxt_compress.algorithms.guidance import Guidance
from hbxt_compress.algorithms.training import Training
from hbxt_compress.algorithms.trajectory import Trajectory
from hbxt_compress.errors import CalibrationError
from hbxt_compress.machine import Machine
from hbxt_compress.models import family_of
from hbxt_compress.prompts import load_prompts
from hbxt_compress.source import Source, locate
from hbxt_compress.stages import distill as stage
from hbxt_compress.stages.distill import STUDENT, distill
from hbxt_compress.stages.teach import teach
from hbxt_compress.store import Entry, Store
from tests.watching import killed_at

_SHORT = Training(
    n_steps=130, batch=4, rate=1e-3, judge_every=60, average=0.9, warmup=5, compiled=False
)
SMALL = {
    "guidance": Guidance(train=_SHORT, n_clips=16, prompts="tiny"),
    "trajectory": Trajectory(
        noise_levels=(1.0, 0.8), train=_SHORT, n_clips=16, own_states=0.4, prompts="tiny"
    ),
    "dmd": Dmd(
        noise_levels=(1.0, 0.8),
        train=_SHORT.model_copy(update={"betas": (0.0, 0.99), "average": 0.5}),
        critic_rate=2e-3,
        critic_steps=2,
        critic_first=20,
        n_clips=64,
        prompts="tiny",
    ),
    "solver": FewSteps(n_steps=2, tune=_SHORT, n_clips=8, prompts="tiny"),
}


def made(store: Store, folder: Path, name: str) -> Entry:
    how, source = SMALL[name], locate(str(folder))
    lessons = store.result(
        teach, source=source, prompts=load_prompts(how.prompts), n_clips=how.n_clips,
        levels=tuple(how.levels(family_of(source).sampler(source).sigmas().tolist())), on=Machine(),
    )  # fmt: skip
    return store.result(
        distill, source=source, teacher=source, lessons=lessons, how=how, on=Machine()
    )


def student_of(entry: Entry) -> Source:
    return locate(str(entry.folder / STUDENT))


def test_each_is_tried_here() -> None:
    assert set(SMALL) == set(DISTILLERS)


@pytest.mark.parametrize("name", DISTILLERS)
def test_students_are_models_of_their_family(name: str, micro_wan: Path, tmp_path: Path) -> None:
    entry = made(Store(tmp_path / "store"), micro_wan, name)
    student, original = student_of(entry), locate(str(micro_wan))
    family = family_of(student)
    assert family.layers(student) == family.layers(original)
    sampler = family.sampler(student)
    assert (sampler.guidance, sampler.solver) != (3.0, "unipc")  # what the original runs on
    changed = {n for n in original.files if student.files[n] != original.files[n]}
    trained = {"transformer/diffusion_pytorch_model.safetensors"} if name != "solver" else set()
    assert changed == trained
    for component in family.components(student):
        family.load(student, component)
    assert json.loads((entry.folder / "distilled.json").read_text())


@pytest.fixture(scope="module", params=DISTILLERS)
def undisturbed(
    request: pytest.FixtureRequest, micro_wan: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Entry]:
    name = str(request.param)
    return name, made(Store(tmp_path_factory.mktemp(name) / "store"), micro_wan, name)


@pytest.mark.parametrize("until", [60, 101, 129])
def test_a_killed_training_ends_the_same(
    until: int, undisturbed: tuple[str, Entry], micro_wan: Path, tmp_path: Path
) -> None:
    (name, whole), store = undisturbed, Store(tmp_path / "store")
    with killed_at(until):
        made(store, micro_wan, name)
    again = made(store, micro_wan, name)
    assert again.digest == whole.digest
    lines = (again.folder / "training.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, 131))


@pytest.mark.parametrize(
    ("name", "solver", "n_steps"), [("guidance", "unipc", 3), ("trajectory", "euler", 2)]
)
def test_trained_students_near_their_teacher_without_guidance(
    name: str, solver: str, n_steps: int, micro_wan: Path, tmp_path: Path
) -> None:
    entry = made(Store(tmp_path / "store"), micro_wan, name)
    measured = json.loads((entry.folder / "distilled.json").read_text())
    assert measured["held_out_error"] < 0.9 * measured["held_out_error_before"]
    sampler = family_of(student_of(entry)).sampler(student_of(entry))
    assert (sampler.solver, sampler.n_steps, sampler.guidance) == (solver, n_steps, 1)


def test_two_experts_are_not_trained(tmp_path: Path) -> None:
    from tests.micro import write_micro_wan

    folder = write_micro_wan(tmp_path / "wan", two_experts=True)
    with pytest.raises(CalibrationError, match="two experts has no distillers that train it yet"):
        made(Store(tmp_path / "store"), folder, "guidance")


def test_a_loss_that_is_not_finite_is_told_with_its_batch(
    micro_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = stage.FullModel.velocity

    def broken(self, x, timestep, *rest):
        found = answer(self, x, timestep, *rest)
        return found * float("nan") if torch.is_tensor(timestep) and torch.rand(()) < 0.1 else found

    monkeypatch.setattr(stage.FullModel, "velocity", broken)
    torch.manual_seed(0)
    with pytest.raises(CalibrationError, match=r"step \d+: loss nan.*batch-\d+\.checkpoint"):
        made(Store(tmp_path / "store"), micro_wan, "guidance")
