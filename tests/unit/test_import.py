"""Checkpoints of others become model folders: diffusers' own conversion's bytes, or a refusal."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hbxt_compress.errors import DiskFull, HbxtError, SourceError, UsageError
from hbxt_compress.journal import file_sha256
from hbxt_compress.models import family_of
from hbxt_compress.models.wan_original import original_name
from hbxt_compress.source import locate
from hbxt_compress.stages import import_model as stage
from hbxt_compress.stages.import_model import import_model
from tests.micro import write_micro_wan
from tests.originals import (
    WanTransformer3DModel,
    diffusers_names,
    original_shapes,
    original_tensors,
)

_FILE = "transformer/diffusion_pytorch_model.safetensors"
Imported = Callable[..., dict[str, Tensor]]


@pytest.fixture
def imported(micro_wan: Path, tmp_path: Path) -> Imported:
    """Imports a checkpoint, gives the transformer's tensors."""

    def run(checkpoint: Path | None, **how: Any) -> dict[str, Tensor]:
        out = import_model(
            locate(str(micro_wan), hashed=False), tmp_path / "out", checkpoint=checkpoint, **how
        )
        return load_file(out / _FILE)

    return run


@pytest.fixture
def original(tmp_path: Path) -> Path:
    path = tmp_path / "student.safetensors"
    save_file(original_tensors(), path)
    return path


def _same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def _left(folder: Path) -> list[str]:
    """What an import left beside its inputs."""
    return sorted(path.name for path in folder.iterdir() if "out" in path.name)


def test_the_names_of_the_whole_5b_model_are_those_of_diffusers() -> None:
    shapes = original_shapes(
        dim=3072, ffn=14336, n_layers=30, channels=48, text=4096, freq=256
    )  # the published config
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    converted = diffusers_names(dict(empty))
    assert {name: original_name(name) for name in converted} == {
        name: next(own for own in shapes if empty[own] is tensor)
        for name, tensor in converted.items()
    }
    with torch.device("meta"):
        module = WanTransformer3DModel(
            num_attention_heads=24, attention_head_dim=128, in_channels=48, out_channels=48,
            ffn_dim=14336, num_layers=30,
        )  # fmt: skip
    assert {n: t.shape for n, t in module.state_dict().items()} == {
        n: t.shape for n, t in converted.items()
    }
    assert len(shapes) == 825


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_file_has_the_bytes_of_diffusers_conversion(
    dtype: torch.dtype, micro_wan: Path, tmp_path: Path
) -> None:
    path, expected = tmp_path / "student.safetensors", tmp_path / "expected.safetensors"
    save_file(original_tensors(dtype), path)
    source = locate(str(micro_wan), hashed=False)
    out = import_model(source, tmp_path / "out", checkpoint=path)
    converted = diffusers_names(original_tensors(dtype))
    save_file(converted, expected, metadata={"format": "pt"})
    assert (out / _FILE).read_bytes() == expected.read_bytes()


def test_mixed_dtypes_are_written_as_safetensors_writes_them(
    imported: Imported, tmp_path: Path
) -> None:
    tensors = original_tensors()
    tensors |= {n: t.float() for n, t in tensors.items() if "modulation" in n or "norm" in n}
    path = tmp_path / "student.safetensors"
    save_file(tensors, path)
    imported(path)
    expected = tmp_path / "expected.safetensors"
    converted = diffusers_names(dict(tensors))
    save_file(converted, expected, metadata={"format": "pt"})
    assert (tmp_path / "out" / _FILE).read_bytes() == expected.read_bytes()


def test_everything_else_is_the_bases(imported: Imported, original: Path, micro_wan: Path) -> None:
    tensors = imported(original)
    base, out = locate(str(micro_wan)), locate(str(original.parent / "out"))
    assert {n: d for n, d in out.files.items() if base.files.get(n) != d}.keys() == {
        _FILE, "imported.json",
    }  # fmt: skip
    module = WanTransformer3DModel.from_pretrained(out.folder / "transformer")
    assert torch.equal(
        module.state_dict()["blocks.1.norm2.weight"], tensors["blocks.1.norm2.weight"].float()
    )
    assert family_of(out).sampler(out) == family_of(base).sampler(base)
    family_of(out).load(out, "transformer")


def _prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in original_tensors().items()}


@pytest.mark.parametrize(
    "prefix",
    ["model.", "model.diffusion_model.", "generator.", "generator_ema.model.",
     "model._fsdp_wrapped_module."],
)  # fmt: skip
def test_prefixes_are_stripped(prefix: str, imported: Imported, tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    save_file(_prefixed(prefix), path)
    _same(imported(path), diffusers_names(original_tensors()))


def test_wrappers_within_names_are_stripped(imported: Imported, tmp_path: Path) -> None:
    wrapped = {
        f"model.{n.replace('blocks.1.', 'blocks.1._fsdp_wrapped_module.')}": t
        for n, t in original_tensors().items()
    }
    torch.save({"generator": wrapped, "step": 4000}, tmp_path / "student.pt")
    _same(imported(tmp_path / "student.pt"), diffusers_names(original_tensors()))


def test_one_of_several_models_of_a_training_run(imported: Imported, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    first, average = original_tensors(), original_tensors(seed=4)
    torch.save({"generator": first, "generator_ema": average, "critic": {"x": first}}, path)
    with pytest.raises(UsageError, match="--part generator or --part generator_ema"):
        imported(path)
    with pytest.raises(UsageError, match=r"--part generators: .*no such model; it has generator"):
        imported(path, part="generators")
    found = imported(path, part="generator_ema")
    _same(found, diffusers_names(dict(average)))


def test_diffusers_own_names_stay(imported: Imported, tmp_path: Path) -> None:
    expected = diffusers_names(original_tensors())
    path = tmp_path / "student.safetensors"
    save_file(expected, path)
    _same(imported(path), expected)


def test_shards_are_those_of_the_index(imported: Imported, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    tensors = original_tensors()
    names = sorted(tensors)
    weight_map = {n: f"part-{int(i >= 20)}.safetensors" for i, n in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, folder / file)
    save_file(original_tensors(seed=9), folder / "old.safetensors")  # which no index names
    with pytest.raises(SourceError, match="several files hold the same tensors"):
        imported(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (folder / "LICENSE").write_text("Apache")
    (folder / "NOTICES").write_text("Open RAIL-MS")
    _same(imported(folder), diffusers_names(tensors))
    assert (tmp_path / "out" / "NOTICES").read_text() == "Open RAIL-MS"
    assert (tmp_path / "out" / "LICENSE").read_text() == "Apache"
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(SourceError, match=r"are missing.*(\n.*)*part-1\.safetensors"):
        import_model(locate(str(tmp_path / "out")), tmp_path / "out2", checkpoint=folder)


def test_all_that_does_not_fit_is_named_at_once(imported: Imported, tmp_path: Path) -> None:
    tensors = original_tensors()
    del tensors["time_projection.1.bias"]
    tensors["blocks.0.self_attn.k_img.weight"] = torch.zeros(2)
    tensors["blocks.1.ffn.0.weight"] = torch.zeros(3, 128)
    tensors["head.head.bias"] = tensors["head.head.bias"].to(torch.int32)
    path = tmp_path / "student.safetensors"
    save_file(tensors, path)
    with pytest.raises(SourceError) as caught:
        imported(path)
    told = str(caught.value)
    for line in (
        "4 tensors are not as",
        "missing: time_projection.1.bias",
        "unexpected: blocks.0.self_attn.k_img.weight",
        "blocks.1.ffn.0.weight: has shape [3, 128], expected [256, 128]",
        "head.head.bias: is I32, expected one of F32, F16, BF16",
    ):
        assert line in told
    assert not _left(tmp_path)


def test_both_names_of_a_tensor_are_one_too_many(imported: Imported, tmp_path: Path) -> None:
    tensors = original_tensors()
    tensors["proj_out.bias"] = tensors["head.head.bias"] + 1
    save_file(tensors, tmp_path / "student.safetensors")
    with pytest.raises(SourceError, match=r"a second one for proj_out\.bias"):
        imported(tmp_path / "student.safetensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(
    bad: float, imported: Imported, tmp_path: Path
) -> None:
    tensors = original_tensors()
    tensors["blocks.0.self_attn.o.weight"][5, 6] = bad
    tensors["head.modulation"][0, 1, 2] = bad
    save_file(tensors, tmp_path / "student.safetensors")
    with pytest.raises(
        SourceError, match=r"attn1\.to_out\.0\.weight: holds NaN(.*\n.*)*scale_shift_table: holds"
    ):
        imported(tmp_path / "student.safetensors")
    assert not _left(tmp_path)


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("evil",)


def test_pickled_objects_are_never_loaded(
    imported: Imported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"generator": original_tensors(), "config": _Evil()}, tmp_path / "student.pt")
    with pytest.raises(SourceError, match="which could run code and are not loaded"):
        imported(tmp_path / "student.pt")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.pt", b"", "damaged, or not written by torch"),
        ("a.pth", b"PK\3\4 cut short", "damaged, or not written by torch"),
        ("a.bin", b"garbage", "a.bin: (damaged|holds objects)"),
        ("a.safetensors", b"short", "not a safetensors file"),
        ("a.ckpt", b"x", "not a checkpoint; expected a folder or one of .safetensors"),
        ("a.safetensors.index.json", b"x", "not a checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_said(
    name: str, content: bytes, told: str, imported: Imported, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=told):
        imported(tmp_path / name)


def test_a_state_dict_without_names_and_a_missing_path(imported: Imported, tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(SourceError, match="holds no tensors by name"):
        imported(tmp_path / "list.pt")
    with pytest.raises(SourceError, match="no such file or folder"):
        imported(tmp_path / "nowhere.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"no \.safetensors file in it"):
        imported(tmp_path / "empty")


def test_an_existing_folder_is_never_overwritten(imported: Imported, original: Path) -> None:
    out = original.parent / "out"
    out.mkdir()
    with pytest.raises(UsageError, match="exists and is not overwritten"):
        imported(original)
    assert not list(out.iterdir())


def test_two_experts_are_refused(original: Path, tmp_path: Path) -> None:
    base = write_micro_wan(tmp_path / "base", two_experts=True, residual_vae=False)
    with pytest.raises(SourceError, match="has two experts"):
        import_model(locate(str(base)), tmp_path / "out", checkpoint=original)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"steps": (500, 750)}, "steps 500,750: must fall within 1..1000"),
        ({"steps": (1001, 750)}, "must fall"),
        ({"steps": (500, 0)}, "must fall"),
        ({"steps": (500, 500)}, "must fall"),
        ({"steps": (1000,), "shift": 0.0}, "shift 0.0: must be a positive number"),
        ({"steps": (1000,), "shift": float("nan")}, "must be a positive number"),
        ({"shift": 5.0}, "of which steps"),
        ({"loras": [(Path("a"), float("inf"))]}, "a=inf"),
    ],
)
def test_senseless_options(
    how: dict[str, Any], told: str, imported: Imported, original: Path
) -> None:
    with pytest.raises(UsageError, match=told):
        imported(original, **how)
    assert not _left(original.parent)


def test_nothing_to_import(imported: Imported) -> None:
    with pytest.raises(UsageError, match="nothing to import"):
        imported(None)


@pytest.mark.parametrize(
    ("shift", "levels"), [(None, (1.0, 0.9375, 0.8333)), (10.0, (1.0, 0.9677, 0.9091))]
)
def test_the_students_sampler_and_what_was_imported(
    shift: float | None, levels: tuple[float, ...], imported: Imported, original: Path
) -> None:
    imported(original, steps=(1000, 750, 500), shift=shift)
    out = locate(str(original.parent / "out"))
    spec = family_of(out).sampler(out)
    assert (spec.solver, spec.n_steps, spec.guidance) == ("renoise", 3, 1.0)
    assert spec.levels == pytest.approx(levels, abs=5e-5)
    told = out.config("imported.json")
    assert told["weights"]["files"] == [
        {"name": original.name, "bytes": original.stat().st_size, "sha256": file_sha256(original)}
    ]
    assert told["sampler"]["shift"] == (shift or 5.0)
    assert told["loras"] == []


def test_a_full_disk_leaves_nothing(
    imported: Imported, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage.disk, "_free_bytes", lambda _: 1000)
    with pytest.raises(DiskFull, match=r"MB are needed; make room"):
        imported(original)
    assert not _left(original.parent)


def test_a_checkpoint_that_changes_meanwhile_is_noticed(
    imported: Imported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "student.pt"
    torch.save(original_tensors(), path)
    write = stage.write_tensors

    def meanwhile(*given: Any) -> None:
        write(*given)
        os.utime(path)

    monkeypatch.setattr(stage, "write_tensors", meanwhile)
    with pytest.raises(SourceError, match=r"student\.pt: changed while it was read"):
        imported(path)
    assert not _left(tmp_path)


def test_killed_at_any_tensor_there_is_no_half_folder_and_the_next_is_the_same(
    micro_wan: Path, original: Path, tmp_path: Path
) -> None:
    source = locate(str(micro_wan), hashed=False)
    expected = locate(str(import_model(source, tmp_path / "whole", checkpoint=original))).files
    n_tensors = len(original_tensors())
    for at in (0, n_tensors // 2, n_tensors - 1):
        if (child := os.fork()) == 0:
            _killed_at(at, source, tmp_path / "out", original)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert not (tmp_path / "out").exists()
    out = import_model(source, tmp_path / "out", checkpoint=original)
    assert locate(str(out)).files == expected
    assert _left(tmp_path) == ["out"]


def _killed_at(at: int, source: Any, out: Path, original: Path) -> None:
    finite, seen = stage._finite, []

    def kill(tensor: Tensor) -> bool:
        seen.append(1)
        if len(seen) > at:
            os.kill(os.getpid(), signal.SIGKILL)
        return finite(tensor)

    stage._finite = kill
    with contextlib.suppress(HbxtError):
        import_model(source, out, checkpoint=original)
    os._exit(0)


def _archive(path: Path, pickled: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02}K\x01K\x02s.",  # a dict without tensors
        b"\x80\x02" + b"(" * 10_000 + b".", b"\x80\x02X\xff\xff\xff\x7f", b"", b"}s.",
        b"\x80\x02K\x01R.", b"\x80\x02h\x05.", b"\x80\x02X\x01\x00\x00\x00\xff.",
        b"\x80\x02K\x01Q.", b"\x80\x02\x86.",
    ],
)  # fmt: skip
def test_a_damaged_pickle_is_no_traceback(
    pickled: bytes, imported: Imported, tmp_path: Path
) -> None:
    _archive(tmp_path / "student.pt", pickled)
    with pytest.raises(SourceError, match=r"student\.pt: (damaged|holds)"):
        imported(tmp_path / "student.pt")


@pytest.mark.parametrize(
    "index",
    ["[" * 50_000, "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}',
     '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {"a": "/b.safetensors"}}',
     '{"weight_map": {"a": "b\\u0000.safetensors"}}', '{"weight_map": {"a": ".."}}'],
)  # fmt: skip
def test_an_index_names_files_beside_it(index: str, imported: Imported, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    save_file(original_tensors(), tmp_path / "b.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(SourceError, match=r"index\.json: not an index of safetensors files in"):
        imported(folder)
