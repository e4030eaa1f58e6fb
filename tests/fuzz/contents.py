"""Mutations of bytes, and of the formats whose structure a blind flip seldom reaches."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any, Final

import onnx

from tests.fuzz.documents import mutated_json

__all__ = ["mutated_bytes", "mutated_onnx", "mutated_pickle", "mutated_tensors"]

_EDGES: Final = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1)


def mutated_bytes(random: Random, content: bytes) -> bytes:
    """Bytes flipped, cut, moved, doubled, zeroed, or numbers of 1 to 8 bytes at their limits."""
    data = bytearray(content)
    act, n = random.randrange(9), len(data)
    first, second = sorted((random.randrange(n + 1), random.randrange(n + 1)))
    if act == 0:
        for _ in range(random.randint(1, 20)):
            data[random.randrange(n)] ^= 1 << random.randrange(8)
    elif act == 1:
        del data[first:]
    elif act == 2:
        piece = data[first : min(second, first + 200)]
        data[random.randrange(n) :] = piece + data[second:]
    elif act == 3:
        data[first:first] = random.randbytes(random.randint(1, 50))
    elif act == 4:
        del data[first : min(second, first + 200)]
    elif act == 5:
        data[first : first + 64] = bytes(len(data[first : first + 64]))
    elif act == 6:
        size = random.choice((1, 2, 4, 8))
        at = random.randrange(max(1, min(n - size, 4096)))
        edge = random.choice((*_EDGES, 2**63 - 1, 2**64 - 1)) % 2 ** (8 * size)
        data[at : at + size] = edge.to_bytes(size, random.choice(("little", "big")))
    elif act == 7:
        data += random.choice((b"\x00", data[:64], random.randbytes(64), b"}" * 8))
    else:
        choices = (
            b"", b"\x00", b"{}", b"[]", b"null", b"<html>not found</html>", b"\xff\xfe",
            b"version https://git-lfs.github.com/spec/v1\n", random.randbytes(n % 5000),
        )  # fmt: skip
        return random.choice(choices)
    return bytes(data)


def mutated_tensors(random: Random, content: bytes) -> bytes:
    """A safetensors file whose header or its length lies."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    act = random.randrange(6)
    if act == 0:
        claimed = random.choice(
            (0, 1, 7, length - 1, length + 1, len(content), 2**40, 2**63, 2**64 - 1)
        )
        return claimed.to_bytes(8, "little") + content[8:]
    if act == 1:
        return _safetensors(mutated_json(random, json.dumps(header).encode()), data)
    if act == 2:
        at = random.randrange(0, max(1, len(data) - 3), 2)
        bad = random.choice((b"\xff\xff\xff\xff", b"\x00\x00\xc0\x7f", b"\x80\x7f\x80\x7f"))
        return content[: 8 + length] + data[:at] + bad + data[at + len(bad) :]
    name = random.choice([key for key in header if key != "__metadata__"])
    about = header[name]
    if act == 3:
        start, end = about["data_offsets"]
        about["data_offsets"] = random.choice((
            [end, start], [start - 8, end - 8], [-start - 1, end], [start, end + 2**40], [0, end],
            [start, start], [start], [start, end, end], [float(start), float(end)], [2**63, 2**64],
            [str(start), str(end)], None, [None, None], {"0": start, "1": end},
        ))  # fmt: skip
    elif act == 4:
        shape = about["shape"]
        about["shape"] = random.choice((
            [*shape, 2**40], [-n for n in shape], [2**32] * 4, [0, *shape], [], [1] * 3000, None,
            "128", [str(n) for n in shape], [n / 2 for n in shape], shape[::-1],
            [[n] for n in shape], [True] * len(shape),
        ))  # fmt: skip
    else:
        about["dtype"] = random.choice(
            ("F4", "I64", "F64", "BOOL", "f32", "", None, 32, ["F32"], "C64", "F8_E4M3", "U16", {})
        )
    return _safetensors(json.dumps(header).encode(), data)


def _safetensors(header: bytes, data: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def mutated_pickle(random: Random, content: bytes) -> bytes:
    """What torch.save wrote, its archive or the pickle in it changed; some would run code."""
    act = random.randrange(4)
    if act == 0:
        return mutated_bytes(random, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = next(i for i, (name, _) in enumerate(members) if name.endswith("data.pkl"))
    name, pickled = members[at]
    if act == 1:
        members[at] = name, mutated_bytes(random, pickled)
    elif act == 2:
        members[at] = name, random.choice(_PICKLES)
    else:
        i = random.randrange(len(members))
        members[i] = random.choice((
            (members[i][0], mutated_bytes(random, members[i][1])),
            ("archive/../../../bystander/result.txt", members[i][1]), (" ", b""),
            (members[i][0], b""), (members[i - 1][0], members[i][1]),
        ))  # fmt: skip
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name may stand there twice
        for member in members:
            archive.writestr(*member)
    return out.getvalue()


_PICKLES: Final = (
    b"cos\nsystem\n(S'touch ../../bystander/hacked'\ntR.",
    b"cbuiltins\nexec\n(S'open(\"../../bystander/hacked\", \"w\")'\ntR.",
    b"\x80\x02}.", b"\x80\x02K\x01.", b"\x80\x02]q\x00h\x00a.", b"\x80\x05" + b"(" * 100_000 + b".",
    b"\x80\x02X\xff\xff\xff\x7f", b"", b"\x80\x63.", b"}" + b"K\x01}s" * 2000 + b".",
    b"\x80\x02}K\x01K\x02s.",
)  # fmt: skip


def mutated_onnx(random: Random, content: bytes) -> bytes:
    """An ONNX file whose graph, tensors or external data are not what they should be."""
    model = onnx.ModelProto.FromString(content)
    for _ in range(random.choice((1, 1, 2))):
        random.choice(_GRAPH_ACTS)(random, model)
    return model.SerializeToString()


def _names(random: Random, model: onnx.ModelProto) -> None:
    node = random.choice(model.graph.node)
    names = random.choice((node.input, node.output))
    if names:
        everything = [n for one in model.graph.node for n in (*one.input, *one.output)]
        at = random.randrange(len(names))
        names[at] = random.choice((*everything, "", "nowhere", "x" * 5000, "\x00", "[/bold]"))


def _operator(random: Random, model: onnx.ModelProto) -> None:
    node = random.choice(model.graph.node)
    node.op_type = random.choice(
        ("", "NoSuchOp", "If", "Loop", "Conv", "MatMulNBits", "Add", "Shape")
    )
    node.domain = random.choice(("", "", "com.microsoft", "nowhere", "ai.onnx.ml"))


def _version(random: Random, model: onnx.ModelProto) -> None:
    if random.random() < 0.5:
        model.ir_version = random.choice((0, -1, 1, 2**40, 2**62))
    elif random.random() < 0.3 or not model.opset_import:
        del model.opset_import[:]
    else:
        model.opset_import[0].version = random.choice((0, -1, 1, 5, 9999, 2**62))
        model.opset_import[0].domain = random.choice(("", "", "nowhere"))


def _sizes(random: Random, model: onnx.ModelProto) -> None:
    graph = model.graph
    sizes = (-1, 0, 2**31, 2**40, 2**62, -(2**62), 7)
    if graph.initializer and random.random() < 0.5:
        dims = random.choice(graph.initializer).dims
        random.choice((
            lambda: dims.append(random.choice(sizes)), lambda: dims.extend([2**20] * 4),
            lambda: dims.extend([1] * 300), lambda: dims.__delitem__(slice(None)),
        ))()  # fmt: skip
    else:
        value = random.choice([*graph.input, *graph.output])
        shape = value.type.tensor_type.shape
        if shape.dim and random.random() < 0.7:
            dim = random.choice(shape.dim)
            dim.dim_value = random.choice(sizes)
        elif random.random() < 0.5:
            shape.dim.add(dim_param=random.choice(("n", "", "\x00", "a+b(", "x" * 5000)))
        else:
            value.ClearField("type")


def _types(random: Random, model: onnx.ModelProto) -> None:
    kind = random.choice((0, 1, 2, 7, 8, 14, 16, 17, 22, 23, 99, -1, 2**30))
    graph = model.graph
    if graph.initializer and random.random() < 0.6:
        random.choice(graph.initializer).data_type = kind
    else:
        random.choice([*graph.input, *graph.output]).type.tensor_type.elem_type = kind


def _attributes(random: Random, model: onnx.ModelProto) -> None:
    node = random.choice(model.graph.node)
    if node.attribute and random.random() < 0.5:
        node.attribute.remove(random.choice(node.attribute))
    new = node.attribute.add(name=random.choice(("axis", "to", "kernel_shape", "perm", "", "body")))
    new.type = random.choice((0, 1, 2, 3, 4, 5, 6, 7, 14))
    new.i = random.choice((0, -1, 2**62, 999))
    if random.random() < 0.2:
        new.g.ParseFromString(model.graph.SerializeToString())  # CopyFrom would copy itself, too
        new.type = onnx.AttributeProto.GRAPH


def _nodes(random: Random, model: onnx.ModelProto) -> None:
    nodes = list(model.graph.node)
    at = random.randrange(len(nodes))
    choices: tuple[Callable[[], list[Any]], ...] = (
        lambda: [], lambda: nodes[::-1], lambda: nodes[:at] + nodes[at + 1 :],
        lambda: [*nodes, nodes[at]], lambda: nodes * 40,
    )  # fmt: skip
    changed = [
        onnx.NodeProto.FromString(one.SerializeToString()) for one in random.choice(choices)()
    ]
    del model.graph.node[:]
    model.graph.node.extend(changed)


def _ends(random: Random, model: onnx.ModelProto) -> None:
    values = random.choice((model.graph.input, model.graph.output, model.graph.initializer))
    if values and random.random() < 0.5:
        del values[random.randrange(len(values))]
    elif values:
        random.choice(values).name = random.choice(("", "x", "\x00", "hidden_states", "sample"))
    else:
        model.ClearField("graph")


def _external(random: Random, model: onnx.ModelProto) -> None:
    tensors = list(model.graph.initializer)
    if not tensors:
        return _names(random, model)
    tensor = random.choice(tensors)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    key = random.choice(("location", "offset", "length", "checksum", ""))
    value = random.choice(("../../../bystander/result.txt", "/etc/passwd", "", ".", "nowhere.data",
                           "-1", "0", str(2**62), str(2**64), "x", "9" * 5000, "1e3", "model.onnx",
                           "model.onnx.data/..", "\x00"))  # fmt: skip
    for entry in [one for one in tensor.external_data if one.key == key]:
        tensor.external_data.remove(entry)
    tensor.external_data.add(key=key, value=value)
    return None


def _deep(random: Random, model: onnx.ModelProto) -> None:
    """Graphs within graphs, as the branches of Ifs."""
    inner = onnx.GraphProto.FromString(model.graph.SerializeToString())
    for _ in range(random.choice((3, 40))):
        outer = onnx.GraphProto(name="deep")
        node = outer.node.add(op_type="If", input=["c"], output=["y"])
        attribute = node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)
        attribute.g.CopyFrom(inner)
        inner = outer
    model.graph.node.add(op_type="If").attribute.add(
        name="else_branch", type=onnx.AttributeProto.GRAPH
    ).g.CopyFrom(inner)


_GRAPH_ACTS: Final[tuple[Callable[[Random, Any], None], ...]] = (
    _names, _names, _operator, _version, _sizes, _types, _attributes, _nodes, _ends, _external,
    _external, _deep,
)  # fmt: skip
