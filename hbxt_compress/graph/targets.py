"""Targets: what an exported graph may contain so that its runtimes take all of it.

The operator lists are those that ROCm/AMDMIGraphX parses at f729a52 (2026-05-29). Its parser looks
at the operator's name only; com.microsoft is where ONNX Runtime defines the second list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["TARGETS", "Target"]

_STANDARD = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization
    BitwiseAnd Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvInteger
    ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout
    DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather
    GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater
    GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Hardmax Identity If
    InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual
    Log LogSoftmax Loop LpNormalization LpPool MatMul MatMulInteger Max MaxPool Mean
    MeanVarianceNormalization Min Mod Mul Multinomial Neg NegativeLogLikelihoodLoss
    NonMaxSuppression NonZero Not OneHot Or PRelu Pad Pow QLinearConv QLinearMatMul
    QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range
    Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign Round
    Scan Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign
    SimplifiedLayerNormalization Sin Sinh Size Slice Softmax SoftmaxCrossEntropyLoss Softplus
    Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK
    Transpose Trilu Unique Unsqueeze Upsample Where Xor
"""

_CONTRIB = """
    Attention BiasAdd BiasGelu BiasSplitGelu DequantizeLinear FastGelu GatherND Gelu
    GridSample GroupNorm GroupQueryAttention MatMulBnb4 MatMulIntegerToFloat MatMulNBits
    MultiHeadAttention NhwcConv Pad QLinearAdd QLinearAveragePool QLinearConcat QLinearConv
    QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearSigmoid QuantizeLinear
    QuickGelu Range RotaryEmbedding SimplifiedLayerNormalization SkipLayerNormalization
    SkipSimplifiedLayerNormalization Trilu Unique
"""

# Parsed, but only with constant arguments, as control flow, or with other results than ORT's.
_REFUSED = frozenset(
    {"ConstantOfShape", "If", "Loop", "MatMulIntegerToFloat", "NonZero", "Range", "Scan", "Shape"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """opsets: versions of ai.onnx. operators: by domain. dtypes: ONNX names of element types.

    constant_arguments: operator -> the inputs that must be initializers.
    """

    name: str
    source: str
    opsets: frozenset[int]
    largest_ir_version: int
    operators: Mapping[str, frozenset[str]]
    dtypes: frozenset[str]
    constant_arguments: Mapping[str, tuple[int, ...]]


_ROCM = Target(
    name="rocm",
    source="ROCm/AMDMIGraphX f729a52, 2026-05-29",
    opsets=frozenset({17, 18}),
    largest_ir_version=10,
    operators={
        "": frozenset(_STANDARD.split()) - _REFUSED,
        "com.microsoft": frozenset(_CONTRIB.split()) - _REFUSED,
    },
    dtypes=frozenset(
        {"FLOAT", "FLOAT16", "INT64", "INT32", "BOOL", "INT8", "UINT8", "INT4", "UINT4"}
    ),
    constant_arguments={
        "Expand": (1,),
        "Pad": (1,),
        "ReduceMean": (1,),
        "ReduceSum": (1,),
        "Reshape": (1,),
        "Resize": (2, 3),
        "Slice": (1, 2, 3, 4),
        "Split": (1,),
        "Squeeze": (1,),
        "Tile": (1,),
        "Unsqueeze": (1,),
    },
)

TARGETS: Final[Mapping[str, Target]] = {target.name: target for target in (_ROCM,)}
