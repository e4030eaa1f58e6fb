"""Kinds of input: what a valid one looks like, which files get damaged, which commands read it.

Commands run in the case's folder: input in `in`, output to `out`, the model in `../models/wan`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Final

import torch
import yaml
from safetensors.torch import save_file

from hbxt_compress import library
from hbxt_compress.artifact import record_files
from hbxt_compress.checkpoint import Checkpoint
from hbxt_compress.report import (
    SCHEMA,
    Baseline,
    ClipRecord,
    Control,
    Finding,
    Measurement,
    QualityReport,
    Verdict,
)
from tests.fake_artifact import make_artifact
from tests.fuzz.contents import mutated_bytes, mutated_onnx, mutated_pickle, mutated_tensors
from tests.fuzz.documents import mutated_json, mutated_settings, mutated_yaml
from tests.micro import write_micro_wan
from tests.originals import original_tensors
from tests.real_clips import write_clips, write_set

__all__ = ["KINDS", "TAKEN", "Kind"]

TAKEN: Final = "the model is taken"
"""how a `quantize` of a good model ends here: nothing is exported"""

Damage = Callable[[Random, bytes], bytes]
_MODEL: Final = ("--model", "../models/wan")
_STORE: Final = ("--store", "out/store")
_PREDICT: Final = (*_MODEL, *_STORE, "--predict")


def _nothing(folder: Path) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of malformed input.

    write: makes the folder `in`; its second argument is the site's root. files: patterns of those
    to damage. commands: they take turns. mend: what makes the damage be met, such as new digests.
    well, end: exit codes and words of a command whose input is in fact valid. names: what a message
    may say instead of the file's name.
    """

    name: str
    write: Callable[[Path, Path], None]
    files: tuple[str, ...]
    damage: tuple[Damage, ...]
    commands: tuple[tuple[str, ...], ...]
    mend: Callable[[Path], None] = _nothing
    well: tuple[int, ...] = (0,)
    end: str = ""
    names: tuple[str, ...] = ()


def _model(root: Path) -> Path:
    folder = root / "models" / "wan"
    if not folder.exists():
        write_micro_wan(folder)
    return folder


def _artifact(root: Path) -> Path:
    folder = root / "models" / "artifact"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        make_artifact(folder)
    return folder


def _with_model(folder: Path, root: Path) -> None:
    _model(root)
    folder.mkdir(parents=True)


_RECIPES: Final = ("w4a16", "w8a8-static", "w4a16-fast", "w4a16-4step", "w4a16-dmd")


def _recipes(folder: Path, root: Path) -> None:
    _with_model(folder, root)
    for name in _RECIPES:
        text = library.find("recipes", name).read_text(encoding="utf-8")
        (folder / f"mine-{name}.yaml").write_text(text, encoding="utf-8")


def _recipe_of(folder: Path, calibration: str) -> None:
    """A recipe that calibrates on a set of its own, without a budget or a fitted solver."""
    document = yaml.safe_load(library.find("recipes", "tiny").read_text(encoding="utf-8"))
    document |= {"calibration": calibration, "refine": []}
    (folder / "recipe.yaml").write_text(json.dumps(document), encoding="utf-8")


def _prompts(folder: Path, root: Path) -> None:
    _with_model(folder, root)
    for name in ("tiny", "standard"):
        text = library.find("calibration", name).read_text(encoding="utf-8")
        (folder / f"set-{name}.yaml").write_text(text, encoding="utf-8")
    (folder / "set.yaml").write_text((folder / "set-tiny.yaml").read_text(encoding="utf-8"))
    _recipe_of(folder, "in/set.yaml")


def _rows(folder: Path, root: Path) -> None:
    import datasets

    _with_model(folder, root)
    captions = [f"clip {i} of a red circle" for i in range(20)]
    table = datasets.Dataset.from_dict({"text": captions, "n": list(range(20))})
    (folder / "rows.txt").write_text("\n".join(captions) + "\n")
    (folder / "rows.csv").write_text(
        "text,n\n" + "".join(f"{c},{i}\n" for i, c in enumerate(captions))
    )
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in table))
    (folder / "rows.parquet").write_bytes(_parquet(captions))
    for kind in ("txt", "csv", "jsonl", "parquet"):
        set_of = {
            "name": "mine", "summary": "s", "seed": 1, "n_steps": 3, "observe": [0, 2],
            "rows": {"file": f"rows.{kind}", "column": "text", "count": 4, "sha256": "0" * 64},
        }  # fmt: skip
        (folder / f"{kind}.yaml").write_text(json.dumps(set_of))
        _recipe_of(folder, f"in/{kind}.yaml")
        (folder / "recipe.yaml").rename(folder / f"recipe-{kind}.yaml")
    _hashed_rows(folder)


def _parquet(captions: list[str]) -> bytes:
    import io

    import pyarrow
    from pyarrow import parquet

    out = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": captions, "n": list(range(len(captions)))}), out)
    return out.getvalue()


def _hashed_rows(folder: Path) -> None:
    for path in folder.glob("rows.*"):
        if path.is_file():
            described = folder / f"{path.suffix[1:]}.yaml"
            set_of = json.loads(described.read_text())
            set_of["rows"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
            described.write_text(json.dumps(set_of))


def _clips(folder: Path, root: Path) -> None:
    """Clips of which the last one only seems whole, so that no run gets past reading them."""
    _with_model(folder, root)
    write_clips(folder / "clips", n=2)
    last = folder / "clips" / "clip1.mp4"
    content = last.read_bytes()
    at = content.index(b"mdat") + 4
    last.write_bytes(content[:at] + b"\xff" * 2000 + content[at + 2000 :])
    write_set(folder / "set.yaml", {})
    _recipe_of(folder, "in/set.yaml")


def _suite(folder: Path, root: Path) -> None:
    _artifact(root)
    folder.mkdir(parents=True)
    text = library.find("eval/suites", "tiny").read_text(encoding="utf-8")
    (folder / "suite.yaml").write_text(text, encoding="utf-8")


def _own_artifact(folder: Path, root: Path) -> None:
    _model(root)
    folder.mkdir(parents=True)
    shutil.copytree(_artifact(root), folder / "artifact")
    path = folder / "artifact" / "manifest.json"
    document = json.loads(path.read_text())
    del document["digest"]  # what is not sealed is looked into
    path.write_text(json.dumps(document))


def _sealed_artifact(folder: Path, root: Path) -> None:
    folder.mkdir(parents=True)
    shutil.copytree(_artifact(root), folder / "artifact")


def _recorded(folder: Path) -> None:
    """The manifest lists the files as they are, so that they are what is refused."""
    path = folder / "artifact" / "manifest.json"
    document = json.loads(path.read_text())
    try:
        files = record_files(folder / "artifact")
    except OSError:  # a link to nowhere has no digest
        return
    document["files"] = [
        {"path": one.path, "sha256": one.sha256, "size_bytes": one.size_bytes} for one in files
    ]
    path.write_text(json.dumps(document))


def _graphs(folder: Path, root: Path) -> None:
    folder.mkdir(parents=True)
    for path in _artifact(root).glob("*/*"):
        if path.name.startswith("model.onnx"):
            (folder / path.parent.name).mkdir(exist_ok=True)
            shutil.copyfile(path, folder / path.parent.name / path.name)


def _report(folder: Path, root: Path) -> None:
    values = [40.0 + i / 10 for i in range(8)]
    one = Measurement(
        metric="psnr", value=40.35, interval=(39.0, 41.0), n=8, unit="dB", direction="higher",
        per_clip=tuple(values), note="a note",
    )  # fmt: skip
    finding = Finding(
        failure="slow_motion", outcome="pass", value=-0.05, interval=(-0.12, 0.01),
        tolerance=0.04, unit="%", n=8, clips=(1,), n_needed=40, text="no slower",
    )  # fmt: skip
    made = QualityReport(
        schema=SCHEMA, recipe={"name": "r"}, source={"model": "m", "files": {"a": "b"}},
        suite={"name": "tiny", "n_steps": 3, "experiment": "e" * 64}, n_clips=8,
        components={"transformer": {"before": 200, "after": 100}},
        bytes_before=200, bytes_after=100, measurements=(one,), curves={"psnr/step": (1.0, 2.0)},
        layers=({"name": "transformer/x"},),
        verdicts=(Verdict(metric="psnr", limit=30.0, outcome="pass", reason="because"),),
        conclusion="so it is", clips=tuple(_clip(i, "1") for i in range(8)),
        made_with={"torch": "2", "diffusers": "1"}, artifact="a" * 64,
        seconds={"candidate": 1.5, "reference": 2.0},
        controls=(Control(name="ulp", kind="noise", text="t", n=1, values={"psnr": (90.0,)}),),
        findings=(finding,),
        baseline=Baseline(path="b.json", accepted="2026-11-01", artifact="b", made_with={}),
    )  # fmt: skip
    made.save(folder / "report")
    worse = replace(one, per_clip=tuple(v - 1 - v / 50 for v in values))
    clips = tuple(_clip(i, "2") for i in range(8))
    replace(made, recipe={"name": "s"}, measurements=(worse,), clips=clips).save(folder / "other")


def _clip(i: int, candidate: str) -> ClipRecord:
    return ClipRecord(
        prompt=f"p{i}", seed=i, reference_sha256=f"{i}", candidate_sha256=f"{candidate}{i}"
    )


def _own_model(folder: Path, root: Path) -> None:
    folder.mkdir(parents=True)
    shutil.copytree(_model(root), folder / "wan")


def _checkpoints(folder: Path, root: Path) -> None:
    _with_model(folder, root)
    tensors = original_tensors()
    save_file(tensors, folder / "student.safetensors")
    torch.save({"generator": tensors, "step": 3}, folder / "student.pt")
    shards = folder / "sharded"
    shards.mkdir()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: tensors[name] for name in own}, shards / file)
    index = {"metadata": {}, "weight_map": {n: file for file, own in halves.items() for n in own}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    lora = {
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.ones(2, 128),
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight": torch.ones(128, 2),
        "diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(2.0),
        "diffusion_model.blocks.1.ffn.0.diff_b": torch.ones(256),
    }
    (folder / "peft").mkdir()
    save_file(
        lora,
        folder / "lora.safetensors",
        metadata={"lora_adapter_metadata": '{"transformer.r": 2}'},
    )
    save_file(lora, folder / "peft" / "adapter_model.safetensors")
    (folder / "peft" / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "r": 2}))
    Checkpoint.open(folder / "student.pt")


def _of_a_model(random: Random, content: bytes) -> bytes:
    """Damage to JSON or to a safetensors file, whichever it is."""
    own = mutated_json if content.lstrip()[:1] == b"{" else mutated_tensors
    return random.choice((own, own, mutated_bytes))(random, content)


_IMPORT: Final = ("--base", "../models/wan", "--out", "out/imported")
_GENERATE: Final = ("generate", "in/artifact", "--prompt", "a red circle", "--out", "out/clip.mp4")

KINDS: Final[tuple[Kind, ...]] = (
    *(
        Kind(
            name=f"recipe {name}",
            write=_recipes,
            files=(f"mine-{name}.yaml",),
            damage=(mutated_yaml, mutated_settings, mutated_settings, mutated_bytes),
            commands=(
                ("show", f"in/mine-{name}.yaml"),
                ("plan", f"in/mine-{name}.yaml", *_PREDICT),
            ),
            names=("error: recipe ",),  # a plan calls it by the name in it
        )
        for name in _RECIPES
    ),
    Kind(
        name="prompt set",
        write=_prompts,
        files=("set.yaml",),
        damage=(mutated_yaml, mutated_settings, mutated_bytes),
        commands=(("plan", "in/recipe.yaml", *_PREDICT),),
    ),
    *(
        Kind(
            name=f"prompts .{kind}",
            write=_rows,
            files=(f"rows.{kind}",),
            damage=(mutated_bytes,),
            commands=(("plan", f"in/recipe-{kind}.yaml", *_PREDICT),),
            mend=_hashed_rows,
        )
        for kind in ("txt", "csv", "jsonl", "parquet")
    ),
    Kind(
        name="clips' metadata",
        write=_clips,
        files=("clips/metadata.csv",),
        damage=(mutated_bytes,),
        commands=(("plan", "in/recipe.yaml", *_PREDICT),),
        names=("in/set.yaml: held_out",),  # for fewer clips
    ),
    Kind(
        name="clips",
        write=_clips,
        files=("clips/clip0.mp4",),
        damage=(mutated_bytes,),
        commands=(("quantize", "in/recipe.yaml", *_MODEL, *_STORE),),
        well=(1, 2),
        end="clip1.mp4",
    ),
    Kind(
        name="suite",
        write=_suite,
        files=("suite.yaml",),
        damage=(mutated_yaml, mutated_settings, mutated_bytes),
        commands=(("evaluate", "../models/artifact", "--suite", "in/suite.yaml", *_STORE),),
        well=(2,),
        end="model 'fake'",
    ),
    Kind(
        name="manifest",
        write=_own_artifact,
        files=("artifact/manifest.json",),
        damage=(mutated_json, mutated_json, mutated_json, mutated_bytes),
        commands=(
            ("verify", "in/artifact"),
            ("check", "in/artifact", "--json"),
            _GENERATE,
            (*_GENERATE, "--tiled"),
            ("explain", "in/artifact"),
            ("explain", "in/artifact", "transformer/blocks.0.attn1.to_q", "--json"),
            ("explain", "../models/artifact", "--against", "in/artifact"),
        ),
        well=(0, 2),
    ),
    Kind(
        name="manifest, sealed",
        write=_sealed_artifact,
        files=("artifact/manifest.json",),
        damage=(mutated_json, mutated_bytes),
        commands=(("verify", "in/artifact"), _GENERATE),
        well=(),
    ),
    Kind(
        name="manifest, evaluated",
        write=_own_artifact,
        files=("artifact/manifest.json",),
        damage=(mutated_json,),
        commands=(("evaluate", "in/artifact", "--suite", "tiny", *_MODEL, *_STORE),),
        well=(2,),
        end="not the model that in/artifact was made from",
    ),
    Kind(
        name="artifact's bytes",
        write=_own_artifact,
        files=("artifact/*/*", "artifact/model_index.json"),
        damage=(mutated_bytes,),
        commands=(("verify", "in/artifact"), _GENERATE),
        well=(),
    ),
    Kind(
        name="artifact's graphs",
        write=_own_artifact,
        files=("artifact/*/*.onnx",),
        damage=(mutated_onnx, mutated_onnx, mutated_bytes),
        commands=(_GENERATE, ("check", "in/artifact"), ("verify", "in/artifact")),
        mend=_recorded,
        well=(0, 3),
    ),
    Kind(
        name="artifact's tokenizer",
        write=_own_artifact,
        files=("artifact/tokenizer/*.json",),
        damage=(mutated_json, mutated_json, mutated_bytes),
        commands=(_GENERATE,),
        mend=_recorded,
        names=("text_encoder/model.onnx: fails",),  # at token ids that it does not know
    ),
    Kind(
        name="ONNX file",
        write=_graphs,
        files=("transformer/model.onnx",),
        damage=(mutated_onnx, mutated_onnx, mutated_bytes),
        commands=(
            ("check", "in/transformer/model.onnx"),
            ("check", "in/transformer/model.onnx", "--json", "--target", "gfx1201"),
            ("check", "in", "--target", "cpu"),
        ),
        well=(0, 3),
    ),
    Kind(
        name="report.json",
        write=_report,
        files=("report/report.json",),
        damage=(mutated_json, mutated_json, mutated_json, mutated_bytes),
        commands=(
            ("results", "in/report"),
            ("results", "in/other", "in/report"),
            ("compare", "in/other", "in/report", "--out", "out/compared.html"),
            ("accept", "in/report", "--why", "it is good", "--out", "out/baseline.json"),
        ),
    ),
    Kind(
        name="model's JSON",
        write=_own_model,
        files=("wan/*.json", "wan/*/*config.json"),
        damage=(mutated_json, mutated_json, mutated_bytes),
        commands=(
            ("plan", "w4a16-fast", "--model", "in/wan", *_STORE),
            ("plan", "w8a8", "--model", "in/wan", *_STORE, "--predict"),
            ("status", "w8a16", "--model", "in/wan", *_STORE),
        ),
    ),
    Kind(
        name="model's weights",
        write=_own_model,
        files=("wan/*/*.safetensors",),
        damage=(mutated_tensors, mutated_tensors, mutated_bytes),
        commands=(
            ("plan", "w4a16-fast", "--model", "in/wan", *_STORE),
            ("plan", "w8a8", "--model", "in/wan", *_STORE, "--predict"),
            ("status", "w8a16", "--model", "in/wan", *_STORE),
        ),
    ),
    Kind(
        name="model, quantized",
        write=_own_model,
        files=("wan/*.json", "wan/*/*config.json", "wan/*/*.safetensors"),
        damage=(_of_a_model,),
        commands=(("quantize", "w4a16-fast", "--model", "in/wan", *_STORE),),
        well=(1,),
        end=TAKEN,
    ),
    Kind(
        name="checkpoint",
        write=_checkpoints,
        files=("student.safetensors",),
        damage=(mutated_tensors, mutated_tensors, mutated_bytes),
        commands=(("import", "in/student.safetensors", *_IMPORT),),
    ),
    Kind(
        name="checkpoint .pt",
        write=_checkpoints,
        files=("student.pt",),
        damage=(mutated_pickle,),
        commands=(("import", "in/student.pt", *_IMPORT),),
    ),
    Kind(
        name="checkpoint's index",
        write=_checkpoints,
        files=("sharded/*.index.json", "sharded/a.safetensors"),
        damage=(mutated_bytes,),
        commands=(("import", "in/sharded", *_IMPORT),),
    ),
    Kind(
        name="LoRA",
        write=_checkpoints,
        files=("lora.safetensors",),
        damage=(mutated_tensors, mutated_tensors, mutated_bytes),
        commands=(("import", "--lora", "in/lora.safetensors", *_IMPORT),),
    ),
    Kind(
        name="LoRA's configuration",
        write=_checkpoints,
        files=("peft/adapter_config.json",),
        damage=(mutated_json, mutated_bytes),
        commands=(("import", "--lora", "in/peft/adapter_model.safetensors=0.5", *_IMPORT),),
    ),
)
