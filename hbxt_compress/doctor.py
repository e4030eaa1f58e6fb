"""doctor: what this machine can run an artifact with, what is in the way, and what to do about it.

That a provider is listed proves nothing, so each one opens a graph of two nodes, alone and with
fallback switched off, and must get the right numbers.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Final, Literal, cast

import numpy as np

from hbxt_compress.errors import RuntimeUnavailable
from hbxt_compress.graph.table import table
from hbxt_compress.graph.two_nodes import INPUT, OUTPUT, write_two_nodes
from hbxt_compress.metrics import METRICS, Unavailable, WeightFiles
from hbxt_compress.runtime.gpus import Gpu, find_gpus
from hbxt_compress.runtime.session import Provider, installed_providers, open_session

__all__ = ["Finding", "examine"]

State = Literal["ok", "note", "fails"]
_GPU_PROVIDERS: Final = ("amdgpu", "migraphx", "rocm")
_ONE_OF: Final = re.compile(r"onnxruntime(-(?!ep-|extensions|genai|tools)[a-z0-9-]+)?$")
_OVERRIDE: Final = "HSA_OVERRIDE_GFX_VERSION"
_LIKE: Final = {  # family -> the chip of it that code is built for, as the override wants it
    "gfx103": ("gfx1030", "10.3.0"),
    "gfx110": ("gfx1100", "11.0.0"),
    "gfx115": ("gfx1151", "11.5.1"),
    "gfx120": ("gfx1201", "12.0.1"),
}
_HIDING: Final = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
_GB: Final = 1e9
_SLOW_LANE: Final = ("vmaf", "cvvdp", "vbench", "fvd_i3d")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at; remedy: what to do, where something is to be done."""

    about: str
    state: State
    what: str
    remedy: str = ""


def examine(
    store: Path,
    *,
    required: str | None = None,
    root: Path = Path("/"),
    packages: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[Finding, ...]:
    """All findings, in the order in which a person would look.

    required: a provider that must work. root, packages (name -> version) and environment stand for
    the machine's own where a test says so.
    """
    gpus, environment = find_gpus(root), os.environ if environment is None else environment
    installed = _installed() if packages is None else packages
    return (
        _machine(),
        *_wheels(installed),
        *_gpus(gpus, root, environment),
        *_rocm(root),
        *_providers(required, bool(gpus)),
        *_room(store),
        *_slow_lane(environment),
    )


def _installed() -> dict[str, str]:
    return {(one.metadata["Name"] or "").lower(): one.version for one in distributions()}


def _machine() -> Finding:
    what = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding(about="machine", state="ok", what=f"{what}, {os.cpu_count()} cores")


def _wheels(packages: Mapping[str, str]) -> Iterator[Finding]:
    """ONNX Runtime's wheels: all of them own one import name, so there must be one."""
    found = {name: v for name, v in sorted(packages.items()) if _ONE_OF.fullmatch(name)}
    named = ", ".join(f"{name} {version}" for name, version in found.items())
    if len(found) == 1:
        yield Finding(about="onnxruntime", state="ok", what=named)
    elif found:
        yield Finding(
            about="onnxruntime",
            state="fails",
            what=f"{len(found)} wheels own the name onnxruntime: {named}; it is chance which wins",
            remedy=f"pip uninstall -y {' '.join(found)}, then `make setup` (EXTRA=...)",
        )
    else:
        yield Finding(
            about="onnxruntime",
            state="fails",
            what="no wheel of it is installed",
            remedy="`make setup`, or pip install onnxruntime",
        )
    if torch := packages.get("torch"):
        kind = torch.partition("+")[2] or "no build tag"
        yield Finding(about="torch", state="ok", what=f"{torch} ({kind}): for compressing only")


def _gpus(gpus: tuple[Gpu, ...], root: Path, environment: Mapping[str, str]) -> Iterator[Finding]:
    if not gpus:
        yield Finding(
            about="GPU",
            state="note",
            what="no AMD GPU: graphs run on the CPU",
            remedy=""
            if (root / "dev/kfd").exists()
            else "with one, its driver amdgpu makes /dev/kfd",
        )
    for gpu in gpus:
        yield _support(gpu, environment)
    device = root / "dev/kfd"
    if gpus and not os.access(device, os.R_OK | os.W_OK):
        yield Finding(
            about="GPU",
            state="fails",
            what=f"{device} is not yours to open",
            remedy="sudo usermod -aG render,video $USER, and log in again",
        )
    for name in _HIDING:
        if name in environment:
            what = f"{name}={environment[name]} hides some GPUs, or all"
            yield Finding(about="GPU", state="note", what=what, remedy=f"unset {name}")


def _support(gpu: Gpu, environment: Mapping[str, str]) -> Finding:
    what = f"{gpu.target}, {gpu.n_compute_units} compute units, {gpu.vram_bytes / _GB:.1f} GB"
    set_to = environment.get(_OVERRIDE)
    if set_to:
        return Finding(
            about="GPU",
            state="note",
            what=f"{what}; {_OVERRIDE}={set_to} makes ROCm take it for another chip",
            remedy=f"if it hangs, or frames are wrong, unset {_OVERRIDE}",
        )
    if table("migraphx").computes_on(gpu.target):
        return Finding(about="GPU", state="ok", what=f"{what}; MIGraphX has code for it")
    like = next((one for family, one in _LIKE.items() if gpu.target.startswith(family)), None)
    help_ = "--provider cpu"
    if like is not None:
        help_ = (
            f"{_OVERRIDE}={like[1]} lets it pass for {like[0]}, at your own risk: instructions "
            f"that it lacks hang it or give wrong numbers; else {help_}"
        )
    return Finding(about="GPU", state="note", what=f"{what}; not on MIGraphX's list", remedy=help_)


def _rocm(root: Path) -> Iterator[Finding]:
    for version in sorted(root.glob("opt/rocm*/.info/version")):
        told = version.read_text(errors="replace").strip()
        yield Finding(about="ROCm", state="ok", what=f"{told} in {version.parents[1]}")
    for header in sorted(root.glob("opt/rocm*/include/migraphx/version.h")):
        text = header.read_text(errors="replace")
        parts = [
            re.search(rf"MIGRAPHX_VERSION_{part}\s+(\d+)", text)
            for part in ("MAJOR", "MINOR", "PATCH")
        ]
        told = ".".join(match[1] for match in parts if match)
        yield Finding(about="MIGraphX", state="ok", what=f"{told} in {header.parents[2]}")


def _providers(required: str | None, has_gpu: bool) -> Iterator[Finding]:
    installed = installed_providers()
    wanted: Iterable[str] = installed
    if required is not None and required not in installed:
        wanted = (*installed, required)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "two_nodes.onnx"
        write_two_nodes(path)
        for name in wanted:
            yield _tried(name, path, must=name in (required, "cpu") or has_gpu)


def _tried(name: str, path: Path, *, must: bool) -> Finding:
    """Whether a provider runs two nodes; where it must not, that it does not is no failure."""
    about = f"provider {name}"
    try:
        got = open_session(path, cast(Provider, name)).run(INPUT)["y"]
    except RuntimeUnavailable as error:
        what, _, remedy = str(error).rpartition("\n")
        return Finding(
            about=about,
            state="fails" if must else "note",
            what=" ".join(what.split()),
            remedy=remedy,
        )
    if not np.array_equal(got, OUTPUT):
        wrong = f"computes (x + 1) * 2 as {got.tolist()}, not {OUTPUT.tolist()}"
        return Finding(about=about, state="fails", what=wrong, remedy="do not use it")
    return Finding(about=about, state="ok", what="runs a graph of two nodes, and rightly")


def _room(store: Path) -> Iterator[Finding]:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    yield Finding(about="memory", state="ok", what=f"{pages * size / _GB:.1f} GB")
    there = store.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    yield Finding(about="disk", state="ok", what=f"{free / _GB:.1f} GB free for {store}")


def _slow_lane(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Metrics that need more than the project brings: what opens them, or how to get it."""
    files = WeightFiles.from_environment(environment)
    for start in _SLOW_LANE:
        opened: list[str] = []
        missing: dict[str, str] = {}
        for name in (name for name in METRICS if name.startswith(start)):
            try:
                opened.append(METRICS[name].load(files).extractor or name)
            except Unavailable as reason:
                what, colon, remedy = str(reason).rpartition(": ")
                missing[what if colon else remedy] = remedy if colon else ""
        about = f"metric {start}"
        for what, remedy in missing.items():
            yield Finding(about=about, state="note", what=what, remedy=remedy)
        if not missing:
            yield Finding(about=about, state="ok", what="; ".join(dict.fromkeys(opened)))
