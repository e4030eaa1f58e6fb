"""The whole program: which results a command needs, in order. The store finds or makes each."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from hbxt_compress.algorithms import AnyDecoder, AnyDistiller
from hbxt_compress.costs.prediction import (
    Prediction,
    is_small,
    predict,
    require_room,
    stage_costs,
)
from hbxt_compress.costs.rates import find_rates
from hbxt_compress.costs.training import TrainingCost, training_costs
from hbxt_compress.errors import PlanError
from hbxt_compress.geometry import Geometry
from hbxt_compress.journal import file_sha256
from hbxt_compress.lightened import as_if_lightened
from hbxt_compress.machine import Machine
from hbxt_compress.models import family_of
from hbxt_compress.plan import (
    Plan,
    Shown,
    assumed_plan,
    make_plan,
    open_choices,
    refiners_for,
    require_own_trajectories,
)
from hbxt_compress.prompts import PromptSet, load_prompts
from hbxt_compress.publish import publish
from hbxt_compress.recipe import Recipe
from hbxt_compress.source import Source, locate
from hbxt_compress.stages.calibrate import calibrate
from hbxt_compress.stages.distill import STUDENT, distill
from hbxt_compress.stages.export import export
from hbxt_compress.stages.lighten import lighten
from hbxt_compress.stages.noise_clips import clip_geometry, noise_clips
from hbxt_compress.stages.probe import probe, read_damages
from hbxt_compress.stages.quantize import quantize
from hbxt_compress.stages.ranges import ranges
from hbxt_compress.stages.refine import refine
from hbxt_compress.stages.teach import teach
from hbxt_compress.stages.view import n_real_clips, view
from hbxt_compress.store import Entry, Missing, Store

__all__ = [
    "artifact_of",
    "compress",
    "foresee",
    "located",
    "plan",
    "plan_of",
    "published",
    "ranges_of",
    "require_room_for",
    "rounded_of",
    "status",
    "student_of",
    "training",
]

log = logging.getLogger(__name__)


def plan(recipe: Recipe, model: str, store: Store, *, machine: Machine) -> Plan:
    """What a recipe would do to every weight of a model.

    Reads nothing but file headers, unless the recipe has a budget: then the layers are measured.
    Those of a student that is still to be made cannot be: its plan is assumed, as by `foresee`.
    """
    found = locate(model, hashed=False)
    if recipe.budget is None:
        with as_if_lightened(found, recipe.decoder) as student:
            return plan_of(recipe, student, store, machine)
    source = located(model, store)
    try:
        student = student_of(recipe.distill, recipe.decoder, source, store.peek(), Machine())
    except Missing:
        log.warning("plan: the student is not made yet; its budget's smallest formats are assumed")
        with as_if_lightened(found, recipe.decoder) as student:
            return _assumed(recipe, student)
    return plan_of(recipe, student, store, machine)


def foresee(
    recipe: Recipe, model: str, store: Store, *, out: Path | None = None, renew: bool = False
) -> tuple[Plan, Prediction]:
    """What a run from an empty store would take; of the model only file headers are read.

    A budget's plan is assumed: its weights in their smallest formats. The machine is measured for
    some seconds, on the store's disk, unless that was done lately; renew: even then.
    """
    with as_if_lightened(locate(model, hashed=False), recipe.decoder) as source:
        planned = _assumed(recipe, source)
        prompts = None if planned.shown is None else load_prompts(recipe.calibration)
        costs = stage_costs(recipe, planned, source, prompts, copied=out is not None)
    rates = find_rates(store.root / "rates.json", renew=renew)
    return planned, predict(costs, rates, ())


def training(recipe: Recipe, model: str, ranks: Sequence[int]) -> list[TrainingCost]:
    """What each distiller of a recipe takes on so many ranks; only headers are read.

    Raises:
        PlanError: the recipe does not distil.
    """
    if not recipe.distill:
        raise PlanError(f"recipe {recipe.name}: has no `distill:`, so nothing is trained")
    source = locate(model, hashed=False)
    return training_costs(family_of(source), source, recipe.distill, ranks)


def require_room_for(recipe: Recipe, model: str, store: Store, *, out: Path | None = None) -> None:
    """Raises PlanError if memory or disk will not do for what is not done yet, with the numbers."""
    with as_if_lightened(locate(model, hashed=False), recipe.decoder) as source:
        planned = _assumed(recipe, source)
        if is_small(planned, source):
            return
        prompts = None if planned.shown is None else load_prompts(recipe.calibration)
        costs = stage_costs(recipe, planned, source, prompts, copied=out is not None)
    artifact_bytes = sum(one["after"] for one in planned.components().values())

    def check(done: Collection[str]) -> None:
        told = predict(costs, None, done)
        require_room(told, store.root, out, artifact_bytes, name=recipe.name)

    try:
        check(())
    except PlanError:  # only now is it worth hashing the model to find what is done already
        seen = status(recipe, model, store)
        check({stage for stage, _, state, _ in seen if state == "done"})


def compress(
    recipe: Recipe, model: str, store: Store, *, machine: Machine, out: Path | None = None,
    sizes: str | None = None,
) -> Path:  # fmt: skip
    """The folder of the artifact; in `out` if that is given, else inside the store.

    sizes: of the clips that it is to generate, as 704x1280x121,480x832x81; None: the model's own.
    """
    source = located(model, store)
    student = student_of(recipe.distill, recipe.decoder, source, store, machine)
    entry = artifact_of(recipe, student, store, machine, _clips(source, sizes))
    return published(store, entry, out, mark="manifest.json")


def status(recipe: Recipe, model: str, store: Store) -> list[tuple[str, str, str, str]]:
    """(stage, key, state, finished pieces) of each step, up to the first that is not done."""
    peek = store.peek()
    with suppress(Missing):
        source = located(model, store)
        student = student_of(recipe.distill, recipe.decoder, source, peek, Machine())
        artifact_of(recipe, student, peek, Machine(), _clips(source, None))
    return peek.seen


def located(model: str, store: Store, *, hashed: bool = True) -> Source:
    """The model's folder, found by the first rank."""
    return store.ranks.by_first(lambda: locate(model, store.memo, hashed=hashed))


def published(store: Store, entry: Entry, out: Path | None, *, mark: str) -> Path:
    """A result's folder, or that of its copy in `out`."""
    if out is None:
        return entry.folder
    return store.ranks.by_first(lambda: publish(entry, out, mark=mark))


def plan_of(recipe: Recipe, source: Source, store: Store, machine: Machine) -> Plan:
    """The plan of a recipe for a source; what its budget needs to know is measured."""
    family = family_of(source)
    layers, parameters = family.layers(source), family.parameters(source)
    if recipe.budget is None:
        planned = make_plan(recipe, layers, parameters)
        if not (planned.calibrated or planned.refine):
            return planned
        return replace(planned, shown=_shown(recipe, source, load_prompts(recipe.calibration)))
    prompts = load_prompts(recipe.calibration)
    shown = _shown(recipe, source, prompts)
    measured = store.result(
        probe,
        source=source,
        choices=open_choices(recipe, layers),
        trajectories=_states(prompts, source, store, machine),
        on=machine,
    )
    return replace(
        make_plan(recipe, layers, parameters, read_damages(measured.folder)), shown=shown
    )


def _assumed(recipe: Recipe, source: Source) -> Plan:
    """The plan, a budget's assumed, with what calibration will show."""
    family = family_of(source)
    planned = assumed_plan(recipe, family.layers(source), family.parameters(source))
    if recipe.budget is None and not (planned.calibrated or planned.refine):
        return planned
    return replace(planned, shown=_shown(recipe, source, load_prompts(recipe.calibration)))


def _shown(recipe: Recipe, source: Source, prompts: PromptSet) -> Shown:
    """What calibration will show, checked against the model and the recipe before anything runs."""
    family = family_of(source)
    clips = prompts.clips
    size = family.geometry(source) if clips is None else clip_geometry(family, source, clips)
    shown = Shown(
        name=prompts.name,
        n=len(prompts.prompts),
        n_held_out=prompts.held_out,
        n_states=len(family.sampler(source).observed(prompts.n_steps, prompts.observe)[1]),
        size=size,
        n_tokens=family.tokens(source, size),
        clips=() if clips is None else tuple(file.sha256 or "" for file in clips.files),
    )
    refine, _ = refiners_for(recipe, family.layers(source), family.parameters(source))
    require_own_trajectories(recipe, shown, refine)
    return shown


def _states(prompts: PromptSet, source: Source, store: Store, machine: Machine) -> Entry:
    """The states that the model is observed at: its own trajectories', or noised clips."""
    stage = calibrate if prompts.clips is None else noise_clips
    return store.result(stage, source=source, prompts=prompts, on=machine)


def _clips(source: Source, sizes: str | None) -> tuple[Geometry, ...]:
    own = family_of(source).geometry(source)
    return (own,) if sizes is None else Geometry.parse(sizes, own.fps)


def artifact_of(
    recipe: Recipe, source: Source, store: Store, machine: Machine, clips: Sequence[Geometry]
) -> Entry:
    """What a recipe makes of a source, its student already made."""
    family_of(source).buckets(source, clips)  # a size that it cannot take is refused at once
    planned = plan_of(recipe, source, store, machine)
    return store.result(
        export, source=source, model=source.model, plan=planned,
        rounded=rounded_of(recipe, planned, source, store, machine), recipe=recipe,
        clips=tuple(clips), ranges=ranges_of(recipe, planned, source, store, machine),
        licences={name: file_sha256(path) for name, path in source.licences.items()},
    )  # fmt: skip


def rounded_of(
    recipe: Recipe, planned: Plan, source: Source, store: Store, machine: Machine
) -> Entry | None:
    """The weights that a plan quantizes, rounded and tuned; None if it quantizes none."""
    rounded, shown, learned = None, {}, {}
    if planned.calibrated or planned.refine:
        prompts = load_prompts(recipe.calibration)
        trajectories = _states(prompts, source, store, machine)
        shown = {"trajectories": trajectories, "n_held_out": prompts.held_out}
        learned = {"n_first": prompts.statistics}
    if planned.quantized:
        rounded = store.result(
            quantize,
            source=source,
            layers=planned.quantized,
            prepare=recipe.prepare if planned.calibrated else (),
            **(shown | learned if planned.calibrated else {}),
            on=machine,
        )
    if planned.refine and rounded is not None:
        rounded = store.result(
            refine, source=source, quantized=rounded, how=planned.refine, **shown, on=machine
        )
    return rounded


def ranges_of(
    recipe: Recipe, planned: Plan, source: Source, store: Store, machine: Machine
) -> Mapping[str, Entry]:
    """How large a component's numbers get, where it computes in float16 and that is in doubt."""
    doubtful = sorted(planned.half & family_of(source).doubtful)
    if not doubtful:
        return {}
    prompts = load_prompts(recipe.calibration)
    return {
        component: store.result(
            ranges, source=source, component=component, prompts=prompts, on=machine
        )
        for component in doubtful
    }


def student_of(
    how: Sequence[AnyDistiller], decoder: AnyDecoder | None, source: Source, store: Store,
    machine: Machine,
) -> Source:  # fmt: skip
    """What is left of a model's way to its clips after distillation; itself without any."""
    student, sigmas = source, family_of(source).sampler(source).sigmas()
    for one in how:
        lessons = store.result(
            teach, source=source, prompts=load_prompts(one.prompts), n_clips=one.n_clips,
            levels=tuple(map(float, one.levels(sigmas))), on=machine,
        )  # fmt: skip
        made = store.result(
            distill, source=student, teacher=source, lessons=lessons, how=one, on=machine
        )
        student = _made_of(source, made, store)
    if decoder is not None:
        student = _lightened(decoder, student, store, machine)
    return student


def _lightened(how: AnyDecoder, source: Source, store: Store, machine: Machine) -> Source:
    """The model with a decoder that learnt from clips of its own, and real ones if it has any."""
    lessons = store.result(
        teach, source=source, prompts=load_prompts(how.prompts), n_clips=how.n_clips, levels=(),
        on=machine,
    )  # fmt: skip
    views = store.result(
        view, source=source, lessons=lessons, n_real=n_real_clips(source, how.n_real),
        features=how.wants_features, on=machine,
    )  # fmt: skip
    made = store.result(lighten, source=source, views=views, how=how, on=machine)
    return _made_of(source, made, store)


def _made_of(source: Source, made: Entry, store: Store) -> Source:
    """A student, called as its model is, under that model's licences."""
    student = located(str(made.folder / STUDENT), store)
    return replace(student, model=source.model, licences=source.licences)
