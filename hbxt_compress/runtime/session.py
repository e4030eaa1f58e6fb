"""ONNX Runtime sessions with an honest choice of execution provider.

ONNX Runtime's list of available providers proves nothing (a ROCm build without ROCm lists ROCm and
computes on the CPU), and its Python wrapper retries on the CPU with a printed line. So a GPU is
asked for alone, with fallback switched off twice, and what the session uses is read back from it.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import logging
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import (
    EPFail,
    Fail,
    InvalidArgument,
    RuntimeException,
)
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NotImplemented_

from hbxt_compress.errors import ArtifactError, RuntimeUnavailable, UsageError, listing
from hbxt_compress.heap import keep_apart
from hbxt_compress.manifest import REMEDY
from hbxt_compress.runtime.settings import ProviderSettings

__all__ = ["AMDGPU_LIBRARY", "Provider", "Session", "installed_providers", "open_session"]

_log = logging.getLogger(__name__)

Provider = Literal["auto", "cpu", "migraphx", "rocm", "amdgpu"]
AMDGPU_LIBRARY = "HBXT_AMDGPU_LIBRARY"  # environment variable: path of the plug-in's library

_NAMES: Mapping[str, str] = {
    "amdgpu": "AMDGPUExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
_GPUS = ("amdgpu", "migraphx", "rocm")  # in order of preference
_AMDGPU_MODULE = "onnxruntime_ep_amdgpu"
_REMEDIES: Mapping[str, str] = {
    "migraphx": "install ROCm with MIGraphX and the wheel onnxruntime-migraphx (it replaces "
    "onnxruntime), or choose --provider cpu",
    "rocm": "install ROCm and the wheel onnxruntime-rocm (it replaces onnxruntime; the newest is "
    "1.22), or better use migraphx, or choose --provider cpu",
    "amdgpu": f"install onnxruntime >= 1.24 and the AMD GPU plug-in, name its library in "
    f"{AMDGPU_LIBRARY}, or choose --provider cpu",
}


# what a graph ends with that opened but does not run; they have no common base
_FAILURES = (Fail, InvalidArgument, NotImplemented_, RuntimeException, EPFail, ValueError)


class Session:
    """One graph, opened; `provider` is the short name of what really runs it."""

    def __init__(self, inner: ort.InferenceSession, provider: str, name: str = "graph") -> None:
        self._inner = inner
        self._name = name
        self.provider = provider
        self.input_shapes = {one.name: tuple(one.shape) for one in inner.get_inputs()}
        self.outputs = tuple(one.name for one in inner.get_outputs())

    def run(
        self, inputs: Mapping[str, np.ndarray], **needed: tuple[int | None, ...]
    ) -> dict[str, np.ndarray]:
        """Every output by name. needed: those that must be there, with shapes; None: any size.

        Raises:
            ArtifactError: the graph has other inputs or outputs, or fails on these numbers.
            RuntimeUnavailable: it fails on a GPU, or for want of memory.
        """
        if inputs.keys() != self.input_shapes.keys():
            wanted, given = (", ".join(sorted(names)) for names in (self.input_shapes, inputs))
            raise ArtifactError(f"{self._name}: takes {wanted}; expected {given}; {REMEDY}")
        try:
            found = self._inner.run(None, dict(inputs))
        except _FAILURES as error:
            damaged = self.provider == "cpu" and "alloc" not in str(error)
            kind = ArtifactError if damaged else RuntimeUnavailable
            raise kind(f"{self._name}: fails on {self.provider}: {_short(error)}") from error
        outputs = dict(zip(self.outputs, found, strict=True))
        for name, shape in needed.items():
            self._require(name, outputs.get(name), shape)
        return outputs

    def _require(self, name: str, found: object, shape: tuple[int | None, ...]) -> None:
        """Raises ArtifactError unless an output is an array of floats of a shape."""
        wanted = f"{name} of shape {['any' if n is None else n for n in shape]}"
        if not isinstance(found, np.ndarray):
            raise ArtifactError(f"{self._name}: has no output {wanted}; {REMEDY}")
        same = len(found.shape) == len(shape) and all(
            n in (None, m) for n, m in zip(shape, found.shape, strict=True)
        )
        if not same or not np.issubdtype(found.dtype, np.floating):
            told = f"{found.dtype} {list(found.shape)}"
            raise ArtifactError(f"{self._name}: gives {told} as {wanted}; {REMEDY}")

    def close(self) -> None:
        """Frees the graph and its weights, whoever still holds the session; it cannot run again."""
        del self._inner


def installed_providers() -> tuple[str, ...]:
    """Short names of what this onnxruntime has, built in or as plug-in; no proof that it works."""
    built = set(ort.get_available_providers())
    found = [short for short in _GPUS if _NAMES[short] in built]
    if "amdgpu" not in found and _amdgpu_library() is not None:
        found.insert(0, "amdgpu")
    return (*found, "cpu")


def open_session(
    path: Path,
    provider: Provider = "auto",
    *,
    n_threads: int | None = None,
    config: Mapping[str, str] | None = None,
    settings: Mapping[str, ProviderSettings] | None = None,
) -> Session:
    """The graph opened on the provider asked for, never silently on another one.

    `auto` is the first of amdgpu, migraphx, rocm that is installed and opens the graph; the CPU
    only where none of them is installed. config: session config entries, all applied as they are.
    n_threads: of the CPU; None leaves it to ONNX Runtime. settings: by provider what it is told.

    Raises:
        UsageError: a provider of another name.
        RuntimeUnavailable: the provider is not installed, does not work here or refuses the graph.
        ArtifactError: the CPU, which takes every graph, refuses it: it is damaged.
    """
    if provider not in get_args(Provider):
        raise UsageError(f"provider {provider!r}: must be one of {', '.join(get_args(Provider))}")
    installed = installed_providers()
    candidates: Sequence[str] = (provider,)
    if provider == "auto":
        candidates = installed[:-1] or ("cpu",)
    reasons = []
    for candidate in candidates:
        if candidate not in installed:
            reasons.append(f"{candidate}: not part of onnxruntime {ort.__version__} here")
            continue
        try:
            session = _open(
                path, candidate, n_threads, config or {}, (settings or {}).get(candidate)
            )
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            reasons.append(f"{candidate}: {_short(error)}")
            continue
        _log.info("%s/%s runs on %s", path.parent.name, path.name, session.provider)
        return session
    remedy = _REMEDIES.get(candidates[0], "check the artifact with `hbxt verify`")
    kind = ArtifactError if tuple(candidates) == ("cpu",) else RuntimeUnavailable
    raise kind(
        f"{path.parent.name}/{path.name} cannot run with provider {provider} (installed: "
        f"onnxruntime {ort.__version__} with {', '.join(installed)}):\n{listing(reasons)}\n{remedy}"
    )


def _open(
    path: Path,
    provider: str,
    n_threads: int | None,
    config: Mapping[str, str],
    told: ProviderSettings | None,
) -> Session:
    told = told or ProviderSettings()
    told.set_variables()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # every failure reaches the user as an exception
    options.inter_op_num_threads = 1
    if provider == "cpu":
        # what a run allocates goes back when it is done with: an arena would keep the most that any
        # moment took, a pattern all of it twice, and reuse a value's bytes until the last of them
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        options.enable_mem_reuse = False
        keep_apart()
    # an idle graph's threads would keep the cores busy while the next graph runs
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if n_threads is not None:
        options.intra_op_num_threads = n_threads
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    if provider == "cpu" and _saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    name = _NAMES[provider]
    if provider != "cpu":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        ort.set_default_logger_severity(4)  # a provider that cannot load complains there, too
    if provider == "amdgpu" and name not in ort.get_available_providers():
        options.add_provider_for_devices(_amdgpu_devices(), dict(told.options))
        inner = ort.InferenceSession(str(path), options, enable_fallback=0)
    else:
        inner = ort.InferenceSession(
            str(path), options, providers=[(name, dict(told.options))], enable_fallback=0
        )
    inner.disable_fallback()
    used = inner.get_providers()
    if used[0] != name:
        del inner
        gc.collect()
        raise RuntimeError(f"asked for {name}, but the session runs on {', '.join(used)}")
    return Session(inner, provider, f"{path.parent.name}/{path.name}")


def _saturates() -> bool:
    """Whether this processor may add uint8 x int8 products in 16 bit: x86 without VNNI does.

    There ONNX Runtime must be told to multiply exactly, which elsewhere would cost half the speed.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    about = Path("/proc/cpuinfo")
    return not about.is_file() or "vnni" not in about.read_text(errors="replace")


def _amdgpu_devices() -> list[object]:
    """The first AMD GPU that the plug-in offers, registered if it was not."""
    name = _NAMES["amdgpu"]
    if not _devices(name):
        library = _amdgpu_library()
        ort.register_execution_provider_library(name, library)
    devices = _devices(name)
    if not devices:
        raise RuntimeError(f"the plug-in of {name} finds no GPU")
    return devices[:1]


def _devices(name: str) -> list[object]:
    return [device for device in ort.get_ep_devices() if device.ep_name == name]


def _amdgpu_library() -> str | None:
    """Path of the plug-in's library: the environment variable, else the plug-in's own package."""
    if not hasattr(ort, "register_execution_provider_library"):
        return None
    if path := os.environ.get(AMDGPU_LIBRARY):
        return path
    if importlib.util.find_spec(_AMDGPU_MODULE) is None:
        return None
    module = importlib.import_module(_AMDGPU_MODULE)
    return str(module.get_library_path()) if hasattr(module, "get_library_path") else None


def _short(error: Exception) -> str:
    """The first line of onnxruntime's message without its source file and status code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^.*\[ONNXRuntimeError\] : \d+ : \w+ : ", "", lines[0]) if lines else repr(error)
