"""The manifest, and every way an artifact can be wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from hbxt_compress.artifact import Artifact, record_files, write_manifest
from hbxt_compress.errors import ArtifactError
from hbxt_compress.external_data import external_data
from hbxt_compress.manifest import SCHEMA, FileRecord, Manifest
from tests.fake_artifact import SAMPLER, make_artifact, rewrite_manifest


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("pristine") / "artifact")


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "artifact"))


def refusal(folder: Path, *, verify: bool = True) -> str:
    with pytest.raises(ArtifactError) as error:
        Artifact.open(folder, verify=verify)
    return str(error.value)


def edit(folder: Path, change) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    del document["digest"]
    change(document)
    (folder / "manifest.json").write_text(json.dumps(document))


def test_a_whole_artifact_opens(folder):
    artifact = Artifact.open(folder)
    assert artifact.folder == folder
    assert artifact.manifest.sampler == SAMPLER
    assert {record.path for record in artifact.manifest.files} >= {
        "model_index.json",
        "tokenizer/tokenizer.json",
        "transformer/model.onnx.data",
    }


def test_manifest_round_trip(folder):
    manifest = Artifact.open(folder).manifest
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert list(manifest.to_json()) == list(Manifest.__dataclass_fields__)


def test_equal_manifests_give_equal_bytes(folder, tmp_path):
    manifest = Artifact.open(folder).manifest
    turned = replace(manifest, components=dict(reversed(manifest.components.items())))
    first = write_manifest(folder, manifest).read_bytes()
    assert write_manifest(tmp_path, turned).read_bytes() == first
    assert not list(folder.glob(".*"))


def test_records_are_sorted_and_complete(folder):
    records = record_files(folder)
    paths = [record.path for record in records]
    on_disk = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    assert paths == sorted(set(on_disk) - {"manifest.json"})
    assert all(len(record.sha256) == 64 for record in records)


def test_missing_folder_and_manifest(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "not an artifact" in refusal(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    assert "not JSON" in refusal(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    assert "not an object" in refusal(tmp_path)


def test_newer_schema(folder):
    edit(folder, lambda document: document.update(schema=SCHEMA + 1, surprise=1))
    message = refusal(folder)
    assert f"schema {SCHEMA + 1}" in message
    assert "newer hbxt_compress" in message
    assert "upgrade" in message


def test_keys_unknown_missing_and_mistyped_are_all_named(folder):
    def change(document):
        del document["sampler"], document["files"]
        document.update(extra=1, text_length="8", schema=True)

    edit(folder, change)
    message = refusal(folder)
    for part in (
        "sampler: missing",
        "files: missing",
        "extra: unknown",
        "text_length: str",
        "schema",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d["buckets"][0]["geometry"].update(depth=3), "geometry.depth: unknown key"),
        (lambda d: d["buckets"][0].pop("first"), "buckets[0].first: missing"),
        (lambda d: d["buckets"].clear(), "buckets: none"),
        (
            lambda d: d["buckets"][0].update(next="model_2.onnx"),
            "vae_decoder/model_2.onnx: the runt",
        ),
        (lambda d: d["targets"].update(gfx1201={"runtime": "x"}), "targets.gfx1201.nodes: missing"),
        (
            lambda d: d["targets"].update(
                cpu={"runtime": "cpu", "nodes": {}, "settings": {"cpu": {"environment": {"A": 1}}}}
            ),
            "targets.cpu.settings.cpu.environment: not texts by name",
        ),
        (lambda d: d["files"][1].pop("sha256"), "files[1].sha256: missing"),
        (lambda d: d["layers"][0].update(error="x"), "layers[0].error: str"),
        (lambda d: d["session"].update(key=1), "session.key: 1 is not text"),
        (
            lambda d: d["buckets"][0].update(latent_shape=[3, 3, 2]),
            "buckets[0].latent_shape: [3, 3, 2]",
        ),
        (lambda d: d.update(latents_std=[1.0]), "latents_std: 1 entries"),
        (lambda d: d["sampler"].update(n_steps=0), "n_steps 0"),
        (lambda d: d.update(schema=0), "schema: 0"),
    ],
)
def test_what_is_wrong_inside_is_named(folder, change, named):
    edit(folder, change)
    assert named in refusal(folder)


def test_a_changed_byte(folder):
    path = folder / "transformer" / "model.onnx.data"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    message = refusal(folder)
    assert "transformer/model.onnx.data: sha256" in message
    assert "hbxt quantize" in message
    Artifact.open(folder, verify=False)  # hashing is what verify=False leaves out


def test_all_offenders_are_named(folder):
    (folder / "text_encoder" / "model.onnx").unlink()
    (folder / "transformer" / "config.json").write_text("{} ")
    (folder / "stray.txt").write_text("?")
    for verify in (True, False):
        message = refusal(folder, verify=verify)
        assert "text_encoder/model.onnx: missing" in message
        assert "transformer/config.json: 3 bytes, the manifest says 2" in message
        assert "stray.txt: not in the manifest" in message


@pytest.mark.parametrize("path", ["/etc/hostname", "../outside.bin", "a/../../outside.bin", ""])
def test_a_path_that_leaves_the_folder(folder, path):
    (folder.parent / "outside.bin").write_bytes(b"x")
    edit(folder, lambda d: d["files"].append({"path": path, "sha256": "0" * 64, "size_bytes": 1}))
    assert f"{path}: leaves the artifact's folder" in refusal(folder)


def test_a_link_that_leaves_the_folder(folder):
    path = folder / "transformer" / "model.onnx.data"
    outside = folder.parent / "outside.bin"
    path.rename(outside)
    path.symlink_to(outside)
    message = refusal(folder)
    assert "transformer/model.onnx.data: leaves" in message
    assert "lies outside the folder" in message


def test_a_linked_folder_is_not_walked_into(folder):
    (folder / "linked").symlink_to(folder.parent)
    assert "linked: not in the manifest" in refusal(folder)


def test_the_graphs_the_runtime_needs(folder):
    (folder / "vae_decoder" / "model_first.onnx").unlink()
    rewrite_manifest(folder, made_with={})
    assert "vae_decoder/model_first.onnx: the runtime needs it" in refusal(folder)


def test_a_second_expert_is_needed_with_a_boundary(folder):
    rewrite_manifest(folder, sampler=replace(SAMPLER, boundary=0.5))
    assert "transformer_2/model.onnx: the runtime needs it" in refusal(folder)


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"offset": "1000000"}, "claims bytes 1000000.."),
        ({"length": "1000000"}, "claims bytes 0..1000000"),
        ({"length": "-4"}, "claims bytes"),
        ({"offset": "-4"}, "claims bytes -4.."),
        ({"offset": "many"}, "not a readable ONNX file"),
        ({"location": "../outside.bin"}, "lies outside the folder"),
        ({"location": "/outside.bin"}, "lies outside the folder"),
        ({"location": "other.bin"}, "which does not exist"),
        ({"location": "a\0b"}, "lies outside the folder, in 'a\\x00b'"),
        ({"location": ""}, "lies outside the folder"),
    ],
)
def test_external_data_out_of_range(folder, entry, named):
    path = folder / "transformer" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    (tensor,) = (t for t in model.graph.initializer if t.name == "a")
    for pair in tensor.external_data:
        pair.value = entry.get(pair.key, pair.value)
    path.write_bytes(model.SerializeToString())
    (folder.parent / "outside.bin").write_bytes(bytes(100))
    rewrite_manifest(folder, made_with={})  # the hashes are right: only the graph lies
    message = refusal(folder)
    assert named in message
    assert "transformer/" in message


def test_external_tensors_are_found_wherever_they_hide(tmp_path):
    def tensor(name: str) -> onnx.TensorProto:
        one = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
        one.data_location = TensorProto.EXTERNAL
        for key, value in {"location": f"{name}.bin", "offset": "8", "length": "4"}.items():
            one.external_data.add(key=key, value=value)
        return one

    branch = helper.make_graph([], "g", [], [], initializer=[tensor("branch")])
    constant = helper.make_node("Constant", [], ["c"], value=tensor("constant"))
    choice = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    sparse = onnx.SparseTensorProto(values=tensor("sparse"), dims=[1])
    graph = helper.make_graph([constant, choice], "g", [], [], initializer=[tensor("plain")])
    graph.sparse_initializer.append(sparse)
    function = helper.make_function("d", "f", [], ["z"], [constant], [helper.make_opsetid("", 17)])
    model = helper.make_model(graph, functions=[function])
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    found = external_data(path)
    names = sorted(one.name for one in found)
    assert names == ["branch", "branch", "constant", "constant", "plain", "sparse"]
    assert {(one.offset, one.length) for one in found} == {(8, 4)}


def test_external_data_agrees_with_onnx(pristine):
    for path in pristine.glob("*/*.onnx"):
        model = onnx.load(path, load_external_data=False)
        theirs = {
            t.name: {e.key: e.value for e in t.external_data}
            for t in model.graph.initializer
            if t.data_location == TensorProto.EXTERNAL
        }
        ours = {
            t.name: {"location": t.location, "offset": str(t.offset), "length": str(t.length)}
            for t in external_data(path)
        }
        assert ours == theirs


@pytest.mark.parametrize("n_bytes", [0, 1, 7, 60, -1, -9])
def test_a_truncated_graph_is_refused(folder, n_bytes):
    path = folder / "transformer" / "model.onnx"
    content = path.read_bytes()[:n_bytes]
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="not a readable ONNX file"):
        external_data(path)


def test_record_is_plain_data():
    record = FileRecord(path="a/b", sha256="0" * 64, size_bytes=1)
    with pytest.raises(AttributeError):
        record.path = "c"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[" * 50_000, "nested too deeply"),
        ('{"schema": 3, "schema": 3}', "'schema' stands there twice"),
        ('{"schema": NaN}', "NaN is not a finite number"),
        ("[]", "list, not an object"),
    ],
)
def test_a_manifest_that_is_hardly_json(folder, text, named):
    (folder / "manifest.json").write_text(text)
    message = refusal(folder)
    assert named in message
    assert str(folder / "manifest.json") in message


def _bucket(document, **changes):
    document["buckets"][0].update(changes)


def _clip(document, **changes):
    document["buckets"][0]["geometry"].update(changes)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d["files"][0].update(path="a\0b"), "leaves the artifact's folder"),
        (lambda d: d.update(text_length=10**12), "text_length: 1000000000000 is not 1.."),
        (lambda d: d.update(text_length=0), "text_length: 0"),
        (lambda d: _clip(d, height=0), "buckets[0].geometry: "),
        (lambda d: _clip(d, n_frames=10**9), "n_frames 1..65536"),
        (lambda d: _clip(d, fps=0), "fps above 0"),
        (lambda d: _clip(d, height=17), "does not divide 17x16"),
        (lambda d: _bucket(d, latent_shape=[3, 3, 2**40, 2]), "does not divide 16x16"),
        (lambda d: _bucket(d, latent_shape=[3, 2**40, 2, 2]), "more than 9 frames hold"),
        (lambda d: d["source"].pop("model"), "source.model: not text"),
        (lambda d: d["source"].update(files=[]), "source.files: not texts by name"),
        (lambda d: d["recipe"].update(document=None), "recipe.document: not an object"),
        (lambda d: d["layers"][0].update(shape=["4"]), "layers[0].shape: not whole numbers"),
        (lambda d: d["layers"].append("x"), "layers[1].: str, not an object"),
        (lambda d: d["sampler"].update(n_steps=10**9), "n_steps 1000000000: must be 1 to 1000"),
        (lambda d: d["sampler"].update(shift="3"), "shift '3': must be a number"),
        (lambda d: d["sampler"].update(solver=[]), "solver []: must be text"),
    ],
)
def test_numbers_that_would_fill_memory_are_refused(folder, change, named):
    edit(folder, change)
    message = refusal(folder, verify=False)
    assert named in message


def test_a_link_that_leads_to_itself(folder):
    path = folder / "transformer" / "config.json"
    path.unlink()
    path.symlink_to(path.name)
    assert "transformer/config.json" in refusal(folder)
