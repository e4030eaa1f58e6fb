"""Small ONNX graphs, each made to be treated in one way: bad ones with their verdict, good ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["BAD", "GOOD", "Bad", "constant", "model", "node"]

MS = "com.microsoft"
F32, F16, BF16, I64 = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.INT64,
)
I8, U8, I4, I32 = TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.INT32
Value = tuple[int, Sequence[int | str]]


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A graph, and what a runtime makes of its worst node on a target."""

    name: str
    model: onnx.ModelProto
    verdict: str
    says: str
    runtime: str = "migraphx"
    target: str = "gfx1201"
    op: str | None = None
    entries: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Its file, with the external data that its entries speak of."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.model)
        for tensor in proto.graph.initializer:
            if tensor.name in self.entries:
                (folder / "model.onnx.data").write_bytes(tensor.raw_data)
                tensor.ClearField("raw_data")
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in self.entries[tensor.name]:
                    tensor.external_data.add(key=key, value=value)
        path = folder / "model.onnx"
        path.write_bytes(proto.SerializeToString())
        return path


def node(op: str, inputs: str, outputs: str = "y", **attributes: object) -> onnx.NodeProto:
    """`com.microsoft::Gelu` or `Gelu`; names apart by blanks, `-` for one that is left out."""
    domain, _, kind = op.rpartition("::")
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(
        kind, names, outputs.split(), f"the {kind}", domain=domain, **attributes
    )


def constant(name: str, kind: int, shape: Sequence[int], value: float = 0) -> onnx.TensorProto:
    """A tensor of one value; of 4 and 8 bits raw zeros."""
    n = int(np.prod(shape))
    if kind in (F32, F16, I64, I8, U8, I32):
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        return numpy_helper.from_array(np.full(shape, value, dtype), name)
    bits = {I4: 4, TensorProto.UINT4: 4, TensorProto.FLOAT4E2M1: 4, BF16: 16}.get(kind, 8)
    return TensorProto(name=name, data_type=kind, dims=shape, raw_data=bytes(-(-n * bits // 8)))


def model(
    nodes: Sequence[onnx.NodeProto], inputs: Mapping[str, Value], outputs: Mapping[str, Value],
    constants: Sequence[onnx.TensorProto] = (), *, opset: int = 18, ir: int = 10,
    inner: Mapping[str, Value] | None = None, functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:  # fmt: skip
    """A model of these nodes; inner: types and shapes of values between them."""

    def infos(values: Mapping[str, Value]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(n, kind, shape) for n, (kind, shape) in values.items()
        ]

    graph = helper.make_graph(
        nodes,
        "small",
        infos(inputs),
        infos(outputs),
        list(constants),
        value_info=infos(inner or {}),
    )
    domains = {one.domain for one in nodes} - {""}
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in sorted(domains))]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir, functions=list(functions))


_X: Mapping[str, Value] = {"x": (F32, (4, 64))}
_Y: Mapping[str, Value] = {"y": (F32, (4, 64))}


def _plain(
    op: str, *, kind: int = F32, opset: int = 18, ir: int = 10, **attributes: object
) -> onnx.ModelProto:
    return model(
        [node(op, "x", **attributes)], {"x": (kind, (4, 64))}, {"y": (kind, (4, 64))},
        opset=opset, ir=ir,
    )  # fmt: skip


def _packed(
    inputs: str = "x w s", *, bits: int = 4, block: int = 32, codes: Sequence[int] = (16, 2, 16),
    zeros: tuple[int, Sequence[int]] = (U8, (16,)), scales: int = F32, kind: int = F32,
) -> onnx.ModelProto:  # fmt: skip
    """MatMulNBits of 64 inputs and 16 outputs."""
    return model(
        [node(f"{MS}::MatMulNBits", inputs, K=64, N=16, bits=bits, block_size=block)],
        {"x": (kind, (4, 64))}, {"y": (kind, (4, 16))},
        [
            constant("w", U8, codes), constant("s", scales, (32,), 1), constant("z", *zeros),
            constant("i", I32, (64,)), constant("b", kind, (16,)),
        ],
    )  # fmt: skip


def _decoded(
    kind: int, *, shape: Sequence[int] = (64, 16), scales: Sequence[int] = (16,), zero: bool = True,
    opset: int = 21, **attributes: int,
) -> onnx.ModelProto:  # fmt: skip
    """x times a weight that a DequantizeLinear reads."""
    n_out = shape[1]
    return model(
        [
            node("DequantizeLinear", "w s z" if zero else "w s", "d", **attributes),
            node("MatMul", "x d"),
        ],
        {"x": (F32, (4, shape[0]))}, {"y": (F32, (4, n_out))},
        [constant("w", kind, shape), constant("s", F32, scales, 1), constant("z", kind, scales)],
        inner={"d": (F32, shape)}, opset=opset,
    )  # fmt: skip


def _both(kind: int = I8, *, zero: bool = True, computed: bool = False) -> onnx.ModelProto:
    """A product of quantized inputs and weights, as integer kernels want it or not."""
    scale = "t" if computed else "s"
    pair = f"{scale} z" if zero else scale
    nodes = [
        node("QuantizeLinear", f"x {pair}", "q"),
        node("DequantizeLinear", f"q {pair}", "d"),
        node("DequantizeLinear", "w v o", "e", axis=1),
        node("MatMul", "d e"),
    ]
    if computed:
        nodes.insert(0, node("ReduceMax", "x", "t", keepdims=0))
    inner = {"q": (kind, (4, 64)), "d": (F32, (4, 64)), "e": (F32, (64, 16)), "t": (F32, ())}
    return model(
        nodes, _X, {"y": (F32, (4, 16))},
        [
            constant("s", F32, (), 1), constant("z", kind, ()), constant("w", I8, (64, 16)),
            constant("v", F32, (16,), 1), constant("o", I8, (16,)),
        ],
        inner=inner,
    )  # fmt: skip


def _attention(op: str, kind: int = F32, *, opset: int = 18, n: int = 8) -> onnx.ModelProto:
    shape = (1, n, 64)
    names = {"q_num_heads": 4, "kv_num_heads": 4} if "::" not in op else {"num_heads": 4}
    return model(
        [node(op, "q k v", **names)],
        dict.fromkeys("qkv", (kind, shape)), {"y": (kind, shape)}, opset=opset,
    )  # fmt: skip


def _second_input(
    op: str, kind: int = I64, n: int = 2, out: Value = (F32, ("a", "b"))
) -> onnx.ModelProto:
    """An operator whose second input is one of the model's."""
    return model([node(op, "x n")], {**_X, "n": (kind, (n,))}, {"y": out})


def _resize(**attributes: object) -> onnx.ModelProto:
    return model(
        [node("Resize", "x - s", **attributes)],
        {"x": (F32, (1, 2, 8, 8))}, {"y": (F32, (1, 2, 16, 16))},
        [numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "s")],
    )  # fmt: skip


def _convolved(*, group: int = 1, kind: int = F32) -> onnx.ModelProto:
    return model(
        [node("Conv", "x w", group=group, kernel_shape=[3, 3, 3])],
        {"x": (kind, (1, 4, 5, 5, 5))}, {"y": (kind, (1, 4, 3, 3, 3))},
        [constant("w", kind, (4, 4 // group, 3, 3, 3))],
    )  # fmt: skip


def _branch() -> onnx.ModelProto:
    def body(op: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info("z", F32, (4, 64))
        return helper.make_graph([node(op, "x", "z")], op, [], [out])

    whether = node("If", "c", then_branch=body("Neg"), else_branch=body("Abs"))
    return model([whether], {**_X, "c": (TensorProto.BOOL, ())}, _Y)


def _loop() -> onnx.ModelProto:
    infos = [
        helper.make_tensor_value_info("i", I64, ()),
        helper.make_tensor_value_info("go", TensorProto.BOOL, ()),
        helper.make_tensor_value_info("a", F32, (4, 64)),
    ]
    outs = [
        helper.make_tensor_value_info("on", TensorProto.BOOL, ()),
        helper.make_tensor_value_info("b", F32, (4, 64)),
    ]
    inner = [node("Identity", "go", "on"), node("Neg", "a", "b")]
    body = helper.make_graph(inner, "body", infos, outs)
    return model([node("Loop", "n - x", body=body)], _X, _Y, [constant("n", I64, (), 3)])


def _chain(op: str, n: int) -> onnx.ModelProto:
    """The same operator n times."""
    names = ["x", *(f"v{i}" for i in range(1, n)), "y"]
    nodes = [node(op, names[i], names[i + 1]) for i in range(n)]
    return model(nodes, _X, _Y, inner=dict.fromkeys(names[1:-1], (F32, (4, 64))))


def _function() -> onnx.ModelProto:
    made = helper.make_function(
        "own", "Twice", ["a"], ["b"], [node("Add", "a a", "b")], [helper.make_opsetid("", 18)]
    )
    return model([node("own::Twice", "x")], _X, _Y, functions=[made])


def _integers(a: int, b: int) -> onnx.ModelProto:
    return model(
        [node("MatMulInteger", "x w")], {"x": (a, (4, 64))}, {"y": (I32, (4, 16))},
        [constant("w", b, (64, 16))],
    )  # fmt: skip


def _external() -> onnx.ModelProto:
    return model(
        [node("MatMul", "x w")], _X, {"y": (F32, (4, 512))}, [constant("w", F32, (64, 512), 1)]
    )


_LENGTH = str(64 * 512 * 4)
_PLACE, _OFFSET, _SIZE = ("location", "model.onnx.data"), ("offset", "0"), ("length", _LENGTH)
_SPECIFIC = "MIGRAPHX_MLIR_USE_SPECIFIC_OPS"
_SCORES: Mapping[str, Value] = {"x": (F32, (1, 1, 4096, 4096))}
_CONV_2D = {"x": (F32, (1, 2, 8, 8))}


def _of(
    op: str, n_inputs: int = 1, *, kind: int = F32, opset: int = 18,
    shape: Sequence[int] = (1, 8, 64), **attributes: object,
) -> onnx.ModelProto:  # fmt: skip
    """An operator of so many inputs, all alike."""
    names = [f"x{i}" for i in range(n_inputs)]
    made = node(op, " ".join(names), **attributes)
    return model([made], dict.fromkeys(names, (kind, shape)), {"y": (kind, shape)}, opset=opset)


def _scattered(op: str = "ScatterND", **attributes: object) -> onnx.ModelProto:
    return model(
        [node(op, "x i u", **attributes)],
        {**_X, "i": (I64, (4, 1)), "u": (F32, (4, 64))}, _Y,
    )  # fmt: skip


def _on(runtime: str, target: str, name: str, made: onnx.ModelProto, told: str) -> Bad:
    """told: the verdict and, after a colon, what its reason says."""
    verdict, _, says = told.partition(": ")
    named = f"{name}, {runtime}"
    return Bad(name=named, model=made, verdict=verdict, says=says, runtime=runtime, target=target)


_on_hip, _on_rocm, _on_directml = (
    partial(_on, runtime, target)
    for runtime, target in (("hip", "gfx1151"), ("rocm", "gfx1100"), ("directml", "gfx1201"))
)
_MHA, _ATT = f"{MS}::MultiHeadAttention", f"{MS}::Attention"
_VOLUME = (1, 2, 3, 4, 4)
_Case = tuple[str, onnx.ModelProto, str]
_HIP: Sequence[_Case] = (
    ("float attention", _attention(_MHA), "falls_back: must be float16"),
    ("attention with a bias", _of(_MHA, 4, kind=F16, num_heads=4), "falls_back: a bias or a mask"),
    ("float activations", _packed(), "fails: read as float16"),
    ("a group index", _packed("x w s z i", kind=F16, scales=F16), "fails: group indices"),
    ("5 bits", _packed(bits=5, codes=(16, 2, 20), kind=F16, scales=F16), "fails: 2, 3, 4 or 8"),
    ("8-bit weights", _decoded(I8), "falls_back: MatMulNBits of 4 or 8 bits"),
    ("a 3-D convolution", _convolved(), "falls_back: over three axes"),
    ("automatic padding", _of("ConvTranspose", 2, auto_pad="SAME_UPPER"), "falls_back: write pads"),
    ("cubic", _resize(mode="cubic"), "falls_back: nearest or linear"),
    (
        "a crop",
        _resize(coordinate_transformation_mode="tf_crop_and_resize"),
        "falls_back: pixels are placed",
    ),
    ("antialiasing", _resize(antialias=1), "falls_back: antialias must be 0"),
    ("an inside", _resize(exclude_outside=1), "falls_back: exclude_outside"),
    ("an aspect", _resize(keep_aspect_ratio_policy="not_larger"), "falls_back: must be stretch"),
    ("a computed power", _of("Pow", 2), "falls_back: exponent must be constant"),
    (
        "a skip with a bias",
        _of(f"{MS}::SkipLayerNormalization", 5),
        "falls_back: a bias is refused",
    ),
    ("five axes", _of("Add", 2, shape=_VOLUME), "falls_back: more than four axes"),
    ("one unknown operator", _chain("Mish", 1), "falls_back: not among its operators"),
)
_ROCM: Sequence[_Case] = (
    ("attention", _attention(_MHA), "fails: without the kernels"),
    (
        "grouped attention",
        _of(f"{MS}::GroupQueryAttention", 7, kind=F16, num_heads=4, kv_num_heads=4),
        "fails: composable_kernel",
    ),
    ("float8", _of(f"{MS}::GemmFloat8", 2), "fails: no float8 here"),
    ("packed attention", _of(_ATT, 2, num_heads=4), "slow: kernels that would not"),
    (
        "scores",
        model([node("Softmax", "x")], _SCORES, {"y": _SCORES["x"]}),
        "slow: attend to fewer tokens",
    ),
    ("a bias inside", _packed("x w s z - b"), "fails: a bias is refused"),
    ("flat codes", _packed(codes=(16, 32)), "fails: codes must have the shape"),
    (
        "8 bits in blocks",
        _decoded(I8, scales=(4, 16), axis=0, block_size=16),
        "fails: 4 bits only",
    ),
    ("8-bit weights", _decoded(I8, opset=18), "slow: decoded to floats at each run"),
    ("unsigned integers", _integers(U8, I8), "falls_back: INT8 with zero point 0"),
    (
        "last index",
        model([node("ArgMax", "x", select_last_index=1)], _X, {"y": (I64, (1, 64))}),
        "falls_back: select_last_index",
    ),
    ("a scattered product", _scattered(reduction="mul"), "fails: add only"),
    ("Equal of opset 19", _of("Equal", 2, opset=19), "falls_back: opset 19 or newer"),
    ("ReduceMax of opset 20", _of("ReduceMax", opset=20), "falls_back: opset 20 or newer"),
    ("Cast of opset 21", _of("Cast", opset=21, to=F32), "falls_back: opset 21 or newer"),
    ("Sin of opset 22", _of("Sin", opset=22), "falls_back: of opset 22"),
)
_DIRECTML: Sequence[_Case] = (
    ("2 bits", _packed(bits=2, codes=(16, 2, 8)), "falls_back: 4 or 8 bits"),
    ("flat codes", _packed(codes=(16, 32)), "falls_back: blocks must divide K"),
    ("a bias inside", _packed("x w s z - b"), "fails: refused when the session is made"),
    (
        "float zero points",
        _packed("x w s z", zeros=(F32, (32,))),
        "misparsed: read as packed codes",
    ),
    ("scattering", _scattered(), "falls_back: up to opset 16"),
    (
        "GridSample of opset 20",
        _of("GridSample", 2, opset=20, shape=(1, 2, 4, 4)),
        "falls_back: operator of opset 20",
    ),
    ("cubic", _resize(mode="cubic"), "falls_back: nearest or linear"),
    ("an inside", _resize(exclude_outside=1), "falls_back: exclude_outside"),
    ("causal attention", _of(_ATT, 2, num_heads=4, unidirectional=1), "falls_back: earlier tokens"),
    ("rotated attention", _of(_ATT, 2, num_heads=4, do_rotary=1), "falls_back: rotary"),
    (
        "a shared buffer",
        _of(_ATT, 2, num_heads=4, past_present_share_buffer=1),
        "falls_back: share a buffer",
    ),
    ("a past", _of(_ATT, 5, num_heads=4), "falls_back: a past is not taken"),
    ("a past's length", _of(_ATT, 7, num_heads=4), "falls_back: past_sequence_length"),
    (
        "a dynamic batch",
        model([node("Neg", "x")], {"x": (F32, ("n", 64))}, {"y": (F32, ("n", 64))}),
        "slow: fastest where shapes are known",
    ),
)

BAD: Sequence[Bad] = (
    Bad(
        name="a group index",
        model=_packed("x w s z i"),
        verdict="misparsed",
        says="zero points are taken for 8",
    ),
    Bad(
        name="a bias inside",
        model=_packed("x w s z - b"),
        verdict="misparsed",
        says="bias is dropped",
    ),
    Bad(
        name="8 bits packed",
        model=_packed(bits=8, codes=(16, 2, 32)),
        verdict="fails",
        says="4 bits only",
    ),
    Bad(
        name="2 bits packed",
        model=_packed(bits=2, codes=(16, 2, 8)),
        verdict="fails",
        says="4 bits only",
    ),
    Bad(
        name="2-D zero points",
        model=_packed("x w s z", zeros=(U8, (16, 1))),
        verdict="fails",
        says="along one axis",
    ),
    Bad(
        name="float zero points",
        model=_packed("x w s z", zeros=(F32, (32,))),
        verdict="fails",
        says="must be packed",
    ),
    Bad(
        name="flat codes",
        model=_packed(codes=(16, 32)),
        verdict="fails",
        says="codes must have the shape",
    ),
    Bad(name="blocks of 48", model=_packed(block=48), verdict="fails", says="power of two"),
    Bad(
        name="half scales of float",
        model=_packed(scales=F16),
        verdict="fails",
        says="of the activations' type",
    ),
    Bad(
        name="standard attention",
        model=_attention("Attention", opset=23),
        verdict="misparsed",
        says="read as com.microsoft's",
        op="Attention",
    ),
    Bad(
        name="standard rotation",
        model=_attention("RotaryEmbedding", opset=23),
        verdict="misparsed",
        says="by name alone",
        op="RotaryEmbedding",
    ),
    Bad(
        name="RMSNormalization",
        model=_plain("RMSNormalization", opset=23),
        verdict="falls_back",
        says="not among its operators",
        op="RMSNormalization",
    ),
    Bad(
        name="opset 23",
        model=_plain("Neg", opset=23),
        verdict="fails",
        says="opset 23, known up to 22",
    ),
    Bad(name="IR 14", model=_plain("Neg", ir=14), verdict="fails", says="IR version 14"),
    Bad(
        name="a product with a subtracted bias",
        model=model(
            [node(f"{MS}::MatMulIntegerToFloat", "x w s t")],
            {"x": (U8, (4, 64))},
            {"y": (F32, (4, 16))},
            [constant("w", I8, (64, 16)), constant("s", F32, (), 1), constant("t", F32, (16,), 1)],
        ),
        verdict="misparsed",
        says="bias is subtracted",
    ),
    Bad(
        name="half RMS norm",
        model=model(
            [node("SimplifiedLayerNormalization", "x w")],
            {"x": (F16, (4, 64))},
            {"y": (F16, (4, 64))},
            [constant("w", F16, (64,), 1)],
        ),
        verdict="misparsed",
        says="overflows",
    ),
    Bad(
        name="length before offset",
        model=_external(),
        entries={"w": (_PLACE, _SIZE, _OFFSET)},
        verdict="misparsed",
        says="by position",
    ),
    Bad(
        name="a checksum first",
        model=_external(),
        entries={"w": (("checksum", "0"), _PLACE, _OFFSET, _SIZE)},
        verdict="misparsed",
        says="by position",
    ),
    Bad(
        name="no offset",
        model=_external(),
        entries={"w": (_PLACE, _SIZE)},
        verdict="misparsed",
        says="by position",
    ),
    Bad(
        name="data beyond the end",
        model=_external(),
        entries={"w": (_PLACE, ("offset", "4096"), _SIZE)},
        verdict="fails",
        says="claims bytes",
    ),
    Bad(
        name="data outside",
        model=_external(),
        entries={"w": (("location", "../other"), _OFFSET, _SIZE)},
        verdict="fails",
        says="outside the folder",
    ),
    Bad(
        name="OCP float8",
        model=_decoded(TensorProto.FLOAT8E4M3FN),
        verdict="fails",
        says="E4M3FNUZ only",
    ),
    Bad(
        name="float8 e5m2",
        model=_decoded(TensorProto.FLOAT8E5M2),
        verdict="fails",
        says="E4M3FNUZ only",
    ),
    Bad(
        name="Instinct's float8 on Radeon",
        model=_decoded(TensorProto.FLOAT8E4M3FNUZ),
        verdict="slow",
        says="no such 8-bit floats",
        target="gfx1100",
    ),
    Bad(
        name="float4 on Radeon",
        model=_decoded(TensorProto.FLOAT4E2M1, opset=23),
        verdict="slow",
        says="gfx950 only",
        op="DequantizeLinear",
    ),
    Bad(
        name="odd 4 bits",
        model=_decoded(I4, shape=(64, 15), scales=(15,)),
        verdict="fails",
        says="must be even",
    ),
    Bad(
        name="one block of 4 bits",
        model=_decoded(I4, scales=(1, 16), axis=0, block_size=64),
        verdict="fails",
        says="more than one block",
    ),
    Bad(
        name="8-bit weights alone",
        model=_decoded(I8),
        verdict="slow",
        says="in memory the weight is 16-bit again",
    ),
    Bad(name="unsigned inputs", model=_both(U8), verdict="slow", says="only signed inputs"),
    Bad(
        name="a computed step",
        model=_both(computed=True),
        verdict="slow",
        says="a scale that is computed",
    ),
    Bad(name="no zero point", model=_both(zero=False), verdict="slow", says="without a zero point"),
    Bad(
        name="attention on RDNA",
        model=_attention(f"{MS}::MultiHeadAttention"),
        verdict="slow",
        says=_SPECIFIC,
    ),
    Bad(
        name="scores in full",
        model=model([node("Softmax", "x")], _SCORES, {"y": _SCORES["x"]}),
        verdict="slow",
        says=_SPECIFIC,
    ),
    Bad(
        name="grouped 3-D convolution",
        model=_convolved(group=4),
        verdict="slow",
        says="grouped 3-D",
    ),
    Bad(
        name="dynamic batch",
        model=model([node("Neg", "x")], {"x": (F32, ("n", 64))}, {"y": (F32, ("n", 64))}),
        verdict="slow",
        says="compiled anew",
    ),
    *(
        Bad(
            name=f"{op} to what is computed",
            model=_second_input(op),
            verdict="falls_back",
            says="second input must be constant",
        )
        for op in ("Expand", "Pad", "Reshape", "ReduceSum", "Squeeze", "Tile", "TopK", "Unsqueeze")
    ),
    Bad(
        name="fill of a computed shape",
        model=model([node("ConstantOfShape", "n")], {"n": (I64, (2,))}, {"y": (F32, ("a", "b"))}),
        verdict="falls_back",
        says="its shape must be constant",
    ),
    Bad(
        name="a computed range",
        model=model(
            [node("Range", "a b c")], dict.fromkeys("abc", (I64, ())), {"y": (I64, ("n",))}
        ),
        verdict="falls_back",
        says="its limits",
    ),
    Bad(
        name="a computed slice",
        model=model(
            [node("Slice", "x a b")],
            {**_X, "a": (I64, (1,)), "b": (I64, (1,))},
            {"y": (F32, ("n", 64))},
        ),
        verdict="falls_back",
        says="starts, ends",
    ),
    Bad(
        name="wrapped padding",
        model=model(
            [node("Pad", "x p", mode="wrap")],
            _X,
            {"y": (F32, (6, 64))},
            [numpy_helper.from_array(np.array([1, 0, 1, 0]), "p")],
            opset=19,
        ),
        verdict="falls_back",
        says="constant, reflect or edge",
    ),
    Bad(
        name="cropped resize",
        model=_resize(coordinate_transformation_mode="tf_crop_and_resize"),
        verdict="falls_back",
        says="way to place pixels",
    ),
    Bad(
        name="cubic resize",
        model=_resize(mode="cubic"),
        verdict="falls_back",
        says="nearest or linear",
    ),
    Bad(
        name="resize that keeps its aspect",
        model=_resize(keep_aspect_ratio_policy="not_larger"),
        verdict="fails",
        says="stretch",
    ),
    Bad(
        name="last index",
        model=model([node("ArgMax", "x", select_last_index=1)], _X, {"y": (I64, (1, 64))}),
        verdict="falls_back",
        says="select_last_index",
    ),
    Bad(
        name="column order",
        model=model(
            [node("MaxPool", "x", kernel_shape=[2, 2], storage_order=1)],
            _CONV_2D,
            {"y": (F32, (1, 2, 7, 7))},
        ),
        verdict="falls_back",
        says="storage_order",
    ),
    Bad(
        name="4-bit integers multiplied",
        model=_integers(I4, I4),
        verdict="falls_back",
        says="integer products",
    ),
    Bad(
        name="NonZero",
        model=model([node("NonZero", "x")], _X, {"y": (I64, (2, "n"))}),
        verdict="falls_back",
        says="not known before it runs",
    ),
    Bad(name="a branch", model=_branch(), verdict="falls_back", says="unroll", op="If"),
    Bad(
        name="the inside of a branch",
        model=_branch(),
        verdict="falls_back",
        says="bodies of branches",
        op="Neg",
    ),
    Bad(name="a loop", model=_loop(), verdict="falls_back", says="unroll", op="Loop"),
    Bad(
        name="an own function",
        model=_function(),
        verdict="falls_back",
        says="function of the model's own",
    ),
    Bad(
        name="a fused product",
        model=model(
            [node(f"{MS}::FusedMatMul", "x w")],
            _X,
            {"y": (F32, (4, 16))},
            [constant("w", F32, (64, 16))],
        ),
        verdict="falls_back",
        says="not among its operators",
    ),
    Bad(
        name="a foreign operator",
        model=_plain("my.domain::Neg2"),
        verdict="falls_back",
        says="my.domain::Neg2 is not",
    ),
    Bad(
        name="text",
        model=_plain("Identity", kind=TensorProto.STRING),
        verdict="falls_back",
        says="no kernel for STRING",
    ),
    Bad(
        name="eleven unknown operators",
        model=_chain("Mish", 11),
        verdict="falls_back",
        says="not among its operators",
    ),
    Bad(
        name="bfloat16 on a processor",
        model=model(
            [node("MatMul", "x w")],
            {"x": (BF16, (4, 64))},
            {"y": (BF16, (4, 16))},
            [constant("w", BF16, (64, 16))],
        ),
        runtime="cpu",
        target="cpu",
        verdict="fails",
        says="no kernel for BFLOAT16",
    ),
    Bad(
        name="half convolution on a processor",
        model=_convolved(kind=F16),
        runtime="cpu",
        target="cpu",
        verdict="slow",
        says="computed in FLOAT",
    ),
    Bad(
        name="signed by signed",
        model=_integers(I8, I8),
        runtime="cpu",
        target="cpu",
        verdict="slow",
        says="twenty times slower",
    ),
    Bad(
        name="standard attention on a processor",
        model=_attention("Attention", opset=23),
        runtime="cpu",
        target="cpu",
        verdict="slow",
        says="keeps the scores",
    ),
    Bad(
        name="scores on a processor",
        model=model([node("Softmax", "x")], _SCORES, {"y": _SCORES["x"]}),
        runtime="cpu",
        target="cpu",
        verdict="slow",
        says="MultiHeadAttention does without",
    ),
    Bad(
        name="float8 weights on a processor",
        model=_decoded(TensorProto.FLOAT8E4M3FN),
        runtime="cpu",
        target="cpu",
        verdict="slow",
        says="decoded before every product",
    ),
    Bad(
        name="3 bits on a processor",
        model=_packed(bits=3, codes=(16, 2, 12)),
        runtime="cpu",
        target="cpu",
        verdict="fails",
        says="2, 4 or 8 bits",
    ),
    Bad(
        name="other codes on a processor",
        model=_packed(codes=(16, 2, 8)),
        runtime="cpu",
        target="cpu",
        verdict="fails",
        says="codes must have the shape",
    ),
    Bad(
        name="an unknown operator on a processor",
        model=_plain("Frobnicate"),
        runtime="cpu",
        target="cpu",
        verdict="fails",
        says="not among its operators",
    ),
    Bad(
        name="an opset of the future",
        model=_plain("Neg", opset=99),
        runtime="cpu",
        target="cpu",
        verdict="fails",
        says="known up to 28",
    ),
    Bad(
        name="a card without code",
        model=_plain("Neg"),
        runtime="cpu",
        target="gfx1100",
        verdict="fails",
        says="no code for gfx1100",
    ),
    *(_on_hip(*one) for one in _HIP),
    *(_on_rocm(*one) for one in _ROCM),
    *(_on_directml(*one) for one in _DIRECTML),
)

GOOD: Mapping[str, onnx.ModelProto] = {
    "4 bits packed": _packed(),
    "4 bits with flat zero points": _packed("x w s z"),
    "blocked 4 bits decoded": _decoded(I4, scales=(4, 16), axis=0, block_size=16),
    "8 bits on both sides": _both(),
    "token-wise integers": _integers(U8, I8),
    "a convolution": _convolved(),
    "nearest resize": _resize(mode="nearest"),
    "a small softmax": _plain("Softmax"),
    "eight hundred nodes": _chain("Neg", 800),
    "external data": _external(),
    "constant shape": model(
        [node("Reshape", "x n")],
        _X,
        {"y": (F32, (64, 4))},
        [numpy_helper.from_array(np.array([64, 4]), "n")],
    ),
    "a shape that loaders fold": model(
        [node("Shape", "x", "s"), node("Cast", "s", "t", to=I64), node("Reshape", "x t")],
        _X,
        _Y,
        inner={"s": (I64, (2,)), "t": (I64, (2,))},
    ),
}
