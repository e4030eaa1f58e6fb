"""`hbxt doctor` on machines made of files: clashes, cards, rights, what providers really do."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hbxt_compress import doctor
from hbxt_compress.cli import main
from hbxt_compress.doctor import Finding, examine
from hbxt_compress.errors import RuntimeUnavailable
from hbxt_compress.runtime.gpus import find_gpus

_ONE: Mapping[str, str] = {"onnxruntime": "1.32.0", "torch": "2.13.0+cpu", "onnxruntime-genai": "1"}


def _node(root: Path, number: int, version: int, simds: int, *banks: tuple[int, int]) -> None:
    """A node of the compute driver; banks: heap type and bytes."""
    folder = root / f"sys/class/kfd/kfd/topology/nodes/{number}"
    folder.mkdir(parents=True)
    properties = (
        f"cpu_cores_count 0\nsimd_count {simds}\nsimd_per_cu 2\ngfx_target_version {version}\n"
    )
    (folder / "properties").write_text(properties)
    for i, (heap, size) in enumerate(banks):
        bank = folder / f"mem_banks/{i}"
        bank.mkdir(parents=True)
        (bank / "properties").write_text(f"heap_type {heap}\nsize_in_bytes {size}\n")


def _looked_at(root: Path, packages: Mapping[str, str] = _ONE, **environment: str) -> list[Finding]:
    found = examine(root / "store", root=root, packages=packages, environment=environment)
    return list(found)


def _of(found: list[Finding], about: str) -> list[Finding]:
    return [one for one in found if one.about == about]


def test_cards_are_read_from_the_driver(tmp_path: Path) -> None:
    _node(tmp_path, 0, 0, 0)  # the processor
    _node(tmp_path, 1, 120001, 128, (1, 17_095_983_104))
    _node(tmp_path, 2, 110501, 80, (2, 103_079_215_104), (3, 5))
    _node(tmp_path, 10, 90402, 1216, (1, 1 << 37))
    _node(tmp_path, 11, 90010, 416, (1, 1 << 36))
    found = find_gpus(tmp_path)
    assert [one.target for one in found] == ["gfx1201", "gfx1151", "gfx942", "gfx90a"]
    assert [one.n_compute_units for one in found] == [64, 40, 608, 208]
    assert found[0].vram_bytes == 17_095_983_104
    assert found[1].vram_bytes == 103_079_215_104, "registers are no memory"
    assert find_gpus(tmp_path / "nothing") == ()


def test_a_driver_that_says_nonsense_lists_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "sys/class/kfd/kfd/topology/nodes/1"
    folder.mkdir(parents=True)
    (folder / "properties").write_bytes(b"\xff\xfe gfx_target_version\nx")
    assert find_gpus(tmp_path) == ()


def test_optional_metrics_are_noted_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("imageio_ffmpeg", "pycvvdp"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = {
        about: _of(_looked_at(tmp_path), f"metric {about}")
        for about in ("vmaf", "cvvdp", "vbench", "fvd_i3d")
    }
    assert all(len(each) == 1 for each in found.values()), "one row for all that lack the same"
    assert {each[0].state for each in found.values()} == {"note"}
    assert found["vmaf"][0].what == "no package imageio-ffmpeg"
    assert found["cvvdp"][0].remedy == "pip install 'hbxt-compress[slow]'"
    assert "HBXT_VBENCH" in found["vbench"][0].remedy
    assert found["fvd_i3d"][0].what == "no i3d_torchscript.pt"
    assert "HBXT_I3D" in found["fvd_i3d"][0].remedy


def test_an_optional_metric_that_opens_is_named_with_its_extractor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ffmpeg"
    path.write_text("#!/bin/sh\necho 'ffmpeg version 0 x'; echo ' .. libvmaf  VV->V'\n")
    path.chmod(0o755)
    stub = SimpleNamespace(get_ffmpeg_exe=lambda: str(path))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", stub)
    [vmaf] = _of(_looked_at(tmp_path), "metric vmaf")
    assert (vmaf.state, vmaf.what) == ("ok", "vmaf_v0.6.1 in ffmpeg version 0")


def test_without_a_gpu_it_says_so_plainly_and_nothing_fails(tmp_path: Path) -> None:
    found = _looked_at(tmp_path)
    [gpu] = _of(found, "GPU")
    assert (gpu.state, gpu.what) == ("note", "no AMD GPU: graphs run on the CPU")
    [wheel] = _of(found, "onnxruntime")
    assert (wheel.state, wheel.what) == ("ok", "onnxruntime 1.32.0")
    [cpu] = _of(found, "provider cpu")
    assert cpu.state == "ok"
    assert all(one.state != "fails" for one in found)


@pytest.mark.parametrize(
    ("packages", "says"),
    [
        ({"onnxruntime": "1.32.0", "onnxruntime-rocm": "1.22.2"}, "2 wheels own the name"),
        ({"torch": "2.13.0"}, "no wheel of it"),
    ],
)
def test_wheels_that_clash_or_lack_fail(
    tmp_path: Path, packages: Mapping[str, str], says: str
) -> None:
    [wheel] = _of(_looked_at(tmp_path, packages), "onnxruntime")
    assert wheel.state == "fails"
    assert says in wheel.what
    assert "make setup" in wheel.remedy


def test_a_card_that_is_supported_but_closed_to_the_user(tmp_path: Path) -> None:
    _node(tmp_path, 1, 120001, 128, (1, 16_000_000_000))
    card, rights = _of(_looked_at(tmp_path), "GPU")
    assert card.state == "ok"
    assert card.what == "gfx1201, 64 compute units, 16.0 GB; MIGraphX has code for it"
    assert rights.state == "fails"
    assert "usermod -aG render,video" in rights.remedy
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    assert len(_of(_looked_at(tmp_path), "GPU")) == 1


def test_a_card_off_the_list_is_told_what_may_help_and_its_risk(tmp_path: Path) -> None:
    _node(tmp_path, 1, 100304, 32, (1, 4_000_000_000))
    card = _of(_looked_at(tmp_path), "GPU")[0]
    assert card.state == "note"
    assert "gfx1034" in card.what
    assert "HSA_OVERRIDE_GFX_VERSION=10.3.0" in card.remedy
    assert "at your own risk" in card.remedy
    card = _of(_looked_at(tmp_path, HSA_OVERRIDE_GFX_VERSION="10.3.0"), "GPU")[0]
    assert "makes ROCm take it for another chip" in card.what


def test_hidden_cards_are_told(tmp_path: Path) -> None:
    hidden = _of(_looked_at(tmp_path, HIP_VISIBLE_DEVICES=""), "GPU")[-1]
    assert "HIP_VISIBLE_DEVICES= hides" in hidden.what
    assert hidden.remedy == "unset HIP_VISIBLE_DEVICES"


def test_versions_of_rocm_and_migraphx(tmp_path: Path) -> None:
    (tmp_path / "opt/rocm-7.2.4/.info").mkdir(parents=True)
    (tmp_path / "opt/rocm-7.2.4/.info/version").write_text("7.2.4-1\n")
    header = tmp_path / "opt/rocm-7.2.4/include/migraphx/version.h"
    header.parent.mkdir(parents=True)
    header.write_text(
        "#define MIGRAPHX_VERSION_MAJOR 2\n#define MIGRAPHX_VERSION_MINOR 15\n"
        "#define MIGRAPHX_VERSION_PATCH 0\n"
    )
    found = _looked_at(tmp_path)
    assert _of(found, "ROCm")[0].what.startswith("7.2.4-1 in ")
    assert _of(found, "MIGraphX")[0].what.startswith("2.15.0 in ")


def test_a_provider_that_only_pretends_fails_where_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "installed_providers", lambda: ("rocm", "cpu"))
    [rocm] = _of(_looked_at(tmp_path), "provider rocm")
    assert rocm.state == "note", "no GPU, none is expected"
    assert "asked for ROCMExecutionProvider" in rocm.what or "rocm" in rocm.what
    found = examine(tmp_path, required="rocm", root=tmp_path, packages=_ONE, environment={})
    assert _of(list(found), "provider rocm")[0].state == "fails"
    _node(tmp_path, 1, 120001, 128, (1, 16_000_000_000))
    assert _of(_looked_at(tmp_path), "provider rocm")[0].state == "fails"


def test_a_provider_that_computes_wrongly_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong:
        def run(self, _: object) -> dict[str, np.ndarray]:
            return {"y": np.array([4, 7], np.float32)}

    monkeypatch.setattr(doctor, "open_session", lambda *_: Wrong())
    [cpu] = _of(_looked_at(tmp_path), "provider cpu")
    assert cpu.state == "fails"
    assert "as [4.0, 7.0], not [4.0, 6.0]" in cpu.what


def test_what_cannot_be_opened_is_told_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeUnavailable("two_nodes.onnx cannot run:\n  cpu: broken\nbuy another one")

    monkeypatch.setattr(doctor, "open_session", refuse)
    [cpu] = _of(_looked_at(tmp_path), "provider cpu")
    assert (cpu.state, cpu.remedy) == ("fails", "buy another one")
    assert "cpu: broken" in cpu.what


def test_the_command_ends_with_1_where_a_provider_is_required_that_is_not_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--provider", "amdgpu", "--store", str(tmp_path), "--json"])
    assert ended.value.code == 1
    told = capsys.readouterr()
    found = {one["about"]: one for one in json.loads(told.out)}
    assert found["provider amdgpu"]["state"] == "fails"
    assert "1 to be mended" in told.err
