"""AMD GPUs as the kernel's compute driver lists them, without any library of ROCm's.

/sys/class/kfd/kfd/topology/nodes/N/properties has `gfx_target_version 110001` for gfx1101; nodes
without compute units are processors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Gpu", "find_gpus"]

_NODES = "sys/class/kfd/kfd/topology/nodes"
_VRAM = frozenset({"1", "2"})  # heap types of a memory bank: frame buffer, public and private


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU. target: gfx1201. vram_bytes: of its own memory; of an APU the part set aside."""

    target: str
    n_compute_units: int
    vram_bytes: int


def find_gpus(root: Path = Path("/")) -> tuple[Gpu, ...]:
    """What is there, in the driver's order; () without an AMD GPU or its driver."""
    nodes = sorted((root / _NODES).glob("*"), key=lambda path: (len(path.name), path.name))
    found = (_gpu(node) for node in nodes)
    return tuple(one for one in found if one is not None)


def _gpu(node: Path) -> Gpu | None:
    about = _properties(node / "properties")
    version, simds = _number(about, "gfx_target_version"), _number(about, "simd_count")
    if not version or not simds:
        return None
    major, minor, step = version // 10000, version // 100 % 100, version % 100
    banks = [_properties(path) for path in sorted((node / "mem_banks").glob("*/properties"))]
    sizes = (_number(one, "size_in_bytes") for one in banks if one.get("heap_type") in _VRAM)
    per_unit = _number(about, "simd_per_cu") or 2
    return Gpu(
        target=f"gfx{major}{minor:x}{step:x}",
        n_compute_units=simds // per_unit,
        vram_bytes=sum(sizes),
    )


def _number(about: Mapping[str, str], key: str) -> int:
    text = about.get(key, "")
    return int(text) if text.isdecimal() else 0


def _properties(path: Path) -> Mapping[str, str]:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:  # a node that this user may not read is one that it cannot use
        return {}
    return dict(line.split(maxsplit=1) for line in lines if len(line.split()) == 2)
