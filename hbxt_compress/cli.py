"""The command line: options say where and how loud, recipes say what. Errors become exit codes.

Heavy imports happen inside the commands, so that `hbxt --help` answers at once.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import click

from hbxt_compress import ending
from hbxt_compress.cli_import import import_
from hbxt_compress.cli_quality import accept, bisect_, compare, evaluate, results
from hbxt_compress.cli_recipes import copy, recipes, show_recipe
from hbxt_compress.cli_release import explain_, push_, release_, verify
from hbxt_compress.errors import (
    CheckFailed,
    RuntimeUnavailable,
    UsageError,
)
from hbxt_compress.ranks import Ranks

if TYPE_CHECKING:
    from hbxt_compress.runtime.session import Provider

__all__ = [
    "BUILTIN", "check", "doctor", "generate", "hbxt", "main", "plan", "quantize", "status",
]  # fmt: skip

BUILTIN = "builtin/tiny-wan"
log = logging.getLogger(__name__)
_path = click.Path(path_type=Path)
_model = click.option("--model", default=BUILTIN, help="Model folder, or Hub id org/name@revision.")
_store = click.option(
    "--store", type=_path, default=Path(".hbxt"), envvar="HBXT_STORE", help="Folder of results."
)
_provider = click.Choice(["auto", "cpu", "migraphx", "rocm", "amdgpu"])
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
_threads = click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads; default: all cores."
)
_device = click.option(
    "--device",
    default="cpu",
    help="torch device that computes: cpu, or cuda (ROCm too); of several ranks each its own GPU.",
)
_geometry = click.option(
    "--geometry", help="Clip sizes, as 704x1280x121,480x832x81; default: the model's."
)
_SHARED: Final = ("plan", "quantize", "evaluate")  # commands that several ranks can run


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("-v", "--verbose", is_flag=True, help="Tell every step, not only progress.")
@click.option("--debug", is_flag=True, help="As -v, and show the traceback of an error.")
@click.version_option(package_name="hbxt-compress", prog_name="hbxt")
@click.pass_context
def hbxt(context: click.Context, verbose: bool, debug: bool) -> None:
    """Compress video diffusion models: quantize, export to ONNX, generate, measure the loss.

    Start with `hbxt quantize w4a16`, which needs no network and no GPU.
    """
    from hbxt_compress.progress import watch

    ranks = context.ensure_object(Ranks)
    if ranks.world > 1 and context.invoked_subcommand not in _SHARED:
        raise UsageError(
            f"{context.invoked_subcommand}: not for {ranks.world} ranks; run it without torchrun, "
            f"which is for {', '.join(_SHARED)}"
        )
    watch(logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING, ranks.rank)
    if not (verbose or debug):
        warnings.simplefilter("ignore")


@hbxt.command()
@click.argument("recipe")
@_model
@click.option("--layers", "every_layer", is_flag=True, help="A row for every layer.")
@click.option("--predict", "only_predict", is_flag=True, help="Stop before anything is measured.")
@click.option("--probe", "renew", is_flag=True, help="Measure the machine anew.")
@click.option("--out", type=_path, help="Count the copy that `quantize --out` would make.")
@click.option("--target", help="Only tell whether it fits a card: gfx1201, rx-9070-xt, ..., cpu.")
@click.option("--vram", help="Its memory, such as 16GB; default: the card's own.")
@click.option("--distill", is_flag=True, help="Only tell what training takes on several devices.")
@click.option("--ranks", "worlds", type=click.IntRange(1), multiple=True, help="Default: 1, 8, 16.")
@click.option("--tflops", type=click.FloatRange(0, min_open=True), help="Sustained, of a device.")
@_geometry
@_store
@_device
@_json
@click.pass_obj
def plan(
    ranks: Ranks, recipe: str, model: str, every_layer: bool, only_predict: bool, renew: bool,
    out: Path | None, target: str | None, vram: str | None, distill: bool,
    worlds: tuple[int, ...], tflops: float | None, geometry: str | None, store: Path,
    device: str, as_json: bool,
) -> None:  # fmt: skip
    """Show the fate of every weight, and what a run takes.

    What RECIPE does to each, why, and the sizes; time, memory and disk by stage, from some seconds
    of measuring this machine. Only file headers are read, unless the recipe has a budget to spend:
    then what the layers contribute is measured afterwards; with --predict their smallest formats
    are assumed instead.

    With --distill: memory of each of --ranks devices that train, and device hours.
    With --target: what is resident when, whether it fits, and the smallest change that makes it.
    """
    from hbxt_compress import pipeline, show
    from hbxt_compress.machine import Machine
    from hbxt_compress.recipe import load_recipe

    if distill:
        from hbxt_compress import show_training

        told_of = pipeline.training(load_recipe(recipe), model, worlds or (1, 8, 16))
        return show_training.costs(told_of, tflops, as_json)
    if worlds or tflops is not None:
        raise UsageError("--ranks and --tflops: of devices that train; say --distill, too")
    if target is not None:
        from hbxt_compress import show_fit
        from hbxt_compress.fit.answer import foretell

        answers = foretell(load_recipe(recipe), model, target, vram=vram, geometry=geometry)
        return show_fit.answers(answers, as_json)
    if (vram, geometry) != (None, None):
        raise UsageError("--vram and --geometry: say of which card with --target gfx1201, or cpu")
    from hbxt_compress.store import Store

    found, results = load_recipe(recipe), Store(store, ranks)
    if ranks.leads:
        planned, told = pipeline.foresee(found, model, results, out=out, renew=renew)
        if not as_json:
            show.prediction(found, told)
    if not only_predict:
        planned = pipeline.plan(found, model, results, machine=Machine(device=ranks.device(device)))
    if ranks.leads:
        show.plan(found, planned, as_json, every_layer=every_layer, told=told)
    return None


@hbxt.command()
@click.argument("recipe")
@_model
@click.option("--out", type=_path, help="Folder for the artifact; default: in the store.")
@_geometry
@click.option("--smoke", is_flag=True, help="First try all steps on two blocks of the model.")
@click.option("--force", is_flag=True, help="Run even if memory or disk will not do.")
@_store
@_device
@_threads
@_json
@click.pass_obj
def quantize(
    ranks: Ranks, recipe: str, model: str, out: Path | None, geometry: str | None,
    smoke: bool, force: bool,
    store: Path, device: str, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Compress a model as RECIPE says.

    The result is an artifact that `generate` runs. Finished steps are found, not repeated. Nothing
    starts if memory or disk will not do. `torchrun --nproc-per-node N -m hbxt_compress quantize
    ...` shares the work between N processes.
    """
    from hbxt_compress import pipeline, show
    from hbxt_compress.artifact import Artifact
    from hbxt_compress.machine import Machine
    from hbxt_compress.recipe import load_recipe
    from hbxt_compress.store import Store

    found, results = load_recipe(recipe), Store(store, ranks)
    machine = Machine(device=ranks.device(device), n_threads=threads)
    if not force and ranks.leads:
        pipeline.require_room_for(found, model, results, out=out)
    if smoke and ranks.leads:
        from hbxt_compress.smoke import try_out

        click.echo(try_out(found, model, results.root, machine=machine).text, err=True)
    folder = pipeline.compress(found, model, results, machine=machine, out=out, sizes=geometry)
    show.artifact(Artifact.open(folder, verify=False), as_json)


@hbxt.command()
@click.argument("artifact", type=_path)
@click.option("--prompt", required=True, help="What the clip shows.")
@click.option("--seed", type=click.IntRange(min=0), default=0)
@click.option("--steps", type=click.IntRange(1, 1000), help="Default: the model's own.")
@click.option("--guidance", type=click.FloatRange(0, 100), help="Default: the model's own.")
@click.option("--geometry", help="Clip size, one of the artifact's; default: its first.")
@click.option("--out", type=_path, default=Path("clip.mp4"))
@click.option("--tiled", is_flag=True, help="Decode frames tile by tile, in less memory.")
@click.option("--provider", type=_provider, default="auto", help="What runs the graphs.")
@click.option(
    "--cache",
    type=_path,
    envvar="HBXT_CACHE",
    help="Folder where prompts are kept encoded, at most 1 GB of them; default: hbxt/prompts in "
    "XDG_CACHE_HOME or ~/.cache.",
)
@click.option("--no-cache", is_flag=True, help="Encode the prompt anew and do not keep it.")
@_threads
def generate(
    artifact: Path, prompt: str, seed: int, steps: int | None, guidance: float | None,
    geometry: str | None, out: Path, tiled: bool, provider: Provider, cache: Path | None,
    no_cache: bool, threads: int | None,
) -> None:  # fmt: skip
    """Generate a clip with ARTIFACT.

    Ctrl-C or SIGTERM while frames are decoded leaves a clip of those that are finished; before that
    nothing is written.
    """
    if out.suffix.lower() != ".mp4":
        raise UsageError(f"--out {out}: clips are written as .mp4; give a name that ends so")
    from hbxt_compress import show
    from hbxt_compress.film import film
    from hbxt_compress.runtime.generate import Runtime
    from hbxt_compress.runtime.settings import cache_folder

    def step(done: int, total: int) -> None:
        log.info("step", extra={"progress": (done, total, "denoising")})

    def opened() -> Runtime:
        prompts = None if no_cache else cache or cache_folder() / "prompts"
        return Runtime.open(
            artifact, provider=provider, n_threads=threads, size=geometry, tiled=tiled,
            cache=prompts,
        )  # fmt: skip

    made = film(out, opened, prompt, seed=seed, n_steps=steps, guidance=guidance, progress=step)
    show.clip(out, *made)


@hbxt.command()
@click.argument("path", type=_path, metavar="ARTIFACT|FILE.onnx")
@click.option("--target", "targets", multiple=True, help="gfx1201, cpu, ...; may be repeated.")
@click.option("--runtime", help="What must run it; default: migraphx, on the target cpu cpu.")
@_json
def check(path: Path, targets: tuple[str, ...], runtime: str | None, as_json: bool) -> None:
    """Foretell what AMD's runtimes make of every node.

    Of an artifact's graphs, or of any ONNX file: runs, slow, falls_back, misparsed, fails, with the
    reason, by tables of what each runtime takes. Nothing is run. Exit 3: on a target something
    fails or is misparsed, or so much falls back that the whole graph does.
    """
    from hbxt_compress import show
    from hbxt_compress.graph.check import check_targets

    found = check_targets(path, targets, runtime)
    show.checked(path, found, as_json)
    if refused := [one.target for one in found if not one.passes]:
        raise CheckFailed(f"{path} will not do on {', '.join(refused)}; see the table above")


@hbxt.command()
@click.option("--provider", type=_provider, help="What must work here, or the exit code is 1.")
@_store
@_json
def doctor(provider: str | None, store: Path, as_json: bool) -> None:
    """Look at this machine: what runs a graph, and what is in the way.

    Wheels of ONNX Runtime and whether they clash, GPUs, ROCm, which providers really run two nodes,
    memory and disk, metrics that are optional; each with a remedy. Exit 1 if one must be mended.
    """
    from hbxt_compress import show
    from hbxt_compress.doctor import examine

    found = examine(store, required=None if provider == "auto" else provider)
    show.findings(found, as_json)
    if n_bad := sum(one.state == "fails" for one in found):
        raise RuntimeUnavailable(f"{n_bad} to be mended; see the table above")


@hbxt.command()
@click.argument("recipe")
@_model
@_store
@_json
def status(recipe: str, model: str, store: Path, as_json: bool) -> None:
    """Show which steps of RECIPE are done."""
    from hbxt_compress import pipeline, show
    from hbxt_compress.recipe import load_recipe
    from hbxt_compress.store import Store

    show.status(pipeline.status(load_recipe(recipe), model, Store(store)), as_json)


for _command in (
    evaluate, bisect_, accept, compare, results, import_, recipes, show_recipe, copy, release_,
    verify, explain_, push_,
):  # fmt: skip
    hbxt.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs and exits, see hbxt_compress.ending."""
    ending.run(hbxt, sys.argv[1:] if arguments is None else arguments)
