"""Two ranks that torchrun starts: the artifact of one process; one killed; another number goes on.

Ranks talk through gloo, on this machine. Only the order in which they sum differs.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hbxt_compress import pipeline
from hbxt_compress.artifact import Artifact
from hbxt_compress.machine import Machine
from hbxt_compress.quantized import QuantizedModel, QuantizedWeight
from hbxt_compress.recipe import load_recipe
from hbxt_compress.store import Entry, Store
from tests.forked import wait_for

RECIPE = """
name: ranks
summary: layers that share an input, a preparer, tables and blind weights
calibration: tiny
rules:
  - match: "transformer/blocks.*.attn1.*"
    weights: int4-g64
  - match: "text_encoder/shared"
    weights: int8-row
    round: {use: rtn}
    why: a table is rounded blindly
  - match: "text_encoder/encoder.block.0.layer.0.SelfAttention.{q,k,v,o}"
    weights: int4-g64
  - match: "*"
    weights: keep
    why: the test is about ranks
prepare: [{use: permute}]
round: {use: gptq, damping: [0.01], correct: [0.5]}
accept: {suite: tiny, limits: {psnr: 5.0}}
"""
_TIES = 1e-3  # of all codes
pytestmark = pytest.mark.timeout(900)  # four starts of torch, on a machine that may be busy


class _Exports(Exception):
    pass


class _NotExporting(Store):
    def result(self, stage: Callable[..., None], **arguments: object) -> Entry:
        if stage.__name__ == "export":
            raise _Exports
        return super().result(stage, **arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, micro_wan: Path) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "ranks.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path, micro_wan: Path) -> Path:
    """The store of one process."""
    return _quantize_alone(folder, micro_wan, folder / "alone")


def _quantize_alone(folder: Path, model: Path, root: Path) -> Path:
    """A store in which one process has stopped before it exports."""
    recipe, store = load_recipe(str(folder / "ranks.yaml")), _NotExporting(root)
    with pytest.raises(_Exports):
        pipeline.compress(recipe, str(model), store, machine=Machine())
    return root


@pytest.fixture(scope="module")
def killed(folder: Path, micro_wan: Path) -> tuple[Path, int, str]:
    """The store, exit code and words of two ranks, of which the second one is killed."""
    store = folder / "killed"

    def kill(torchrun: subprocess.Popen[bytes]) -> None:
        first = "quantize/*.partial/*.000.safetensors"
        wait_for(lambda: any(store.glob(first)) or torchrun.poll() is not None, 400)
        if torchrun.poll() is None:
            os.kill(_rank(torchrun.pid, 1), signal.SIGKILL)

    return store, *_two_ranks(folder, micro_wan, store, kill)


def _two_ranks(
    folder: Path,
    model: Path,
    store: Path,
    act: Callable[[subprocess.Popen[bytes]], None] = lambda _: None,
) -> tuple[int, str]:
    """Exit code and words of `torchrun ... quantize`; act is given torchrun."""
    log, out = folder / f"{store.name}.log", folder / f"{store.name}.artifact"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "hbxt_compress", "quantize", folder / "ranks.yaml",
        "--model", model, "--store", store, "--out", out,
    ]  # fmt: skip
    with (
        log.open("w") as said,
        subprocess.Popen(list(map(str, command)), stdout=said, stderr=said) as process,
    ):
        try:
            act(process)
            code = process.wait(400)
        finally:
            process.kill()
    return code, log.read_text()


def _rank(torchrun: int, rank: int) -> int:
    """The process of a rank, by the environment that torchrun gave it."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    (found,) = [
        int(child)
        for child in children
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    ]
    return found


def _weights(store: Path) -> dict[str, QuantizedWeight]:
    (folder,) = [path for path in store.glob("quantize/*") if path.is_dir()]
    return dict(QuantizedModel.load(folder).weights)  # type: ignore[arg-type]


def _require_alike(found: dict[str, QuantizedWeight], expected: dict[str, QuantizedWeight]) -> None:
    """Scales and biases to 1e-6, codes but for ties, notes, and nothing else."""
    assert found.keys() == expected.keys()
    n_codes = n_other = 0
    for name, one in expected.items():
        other = found[name]
        assert other.payload.keys() == one.payload.keys()
        n_codes += one.payload["codes"].numel()
        n_other += int((one.payload["codes"] != other.payload["codes"]).sum())
        for key in one.payload.keys() - {"codes"}:
            pair = other.payload[key].double(), one.payload[key].double()
            torch.testing.assert_close(*pair, rtol=1e-6, atol=0)
        if one.bias_O is not None:
            torch.testing.assert_close(other.bias_O, one.bias_O, rtol=1e-5, atol=1e-6)
        assert other.loss.error == pytest.approx(one.loss.error, rel=1e-6)
    assert n_other <= _TIES * n_codes


@pytest.fixture(scope="module")
def both(folder: Path, micro_wan: Path, killed: tuple[Path, int, str]) -> Path:
    """The store of two ranks that go on where two were killed."""
    store = folder / "both"
    shutil.copytree(killed[0], store)
    code, said = _two_ranks(folder, micro_wan, store)
    assert code == 0, said
    assert said.count("artifact: ") == 1
    assert "warning" not in said
    return store


def test_a_killed_rank_is_told_once_and_by_name(killed: tuple[Path, int, str]) -> None:
    store, code, said = killed
    assert code == 1
    assert said.count("error: rank 1 of 2 is gone") == 1, said
    assert "any number of ranks" in said
    (partial,) = store.glob("quantize/*.partial")
    assert f"pieces are finished under {partial}; once this is mended, the same command" in said
    ours = [line for line in said.splitlines() if "hbxt_compress/" in line]
    assert not ours, ours


def test_two_ranks_give_what_one_process_gives(alone: Path, both: Path, folder: Path) -> None:
    _require_alike(_weights(both), _weights(alone))
    Artifact.open(folder / "both.artifact", verify=True)


def test_one_process_goes_on_where_two_ranks_were_killed(
    alone: Path, killed: tuple[Path, int, str], folder: Path, micro_wan: Path
) -> None:
    root = folder / "one"
    shutil.copytree(killed[0], root)
    finished = list(root.glob("quantize/*.partial/*.safetensors"))
    before = {path.name: path.stat().st_ino for path in finished}
    _quantize_alone(folder, micro_wan, root)
    _require_alike(_weights(root), _weights(alone))
    (quantized,) = [path for path in root.glob("quantize/*") if path.is_dir()]
    assert before
    assert {name: (quantized / name).stat().st_ino for name in before} == before
