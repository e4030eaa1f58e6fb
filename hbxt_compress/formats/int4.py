"""int4: 4-bit codes in groups along the input features, one float16 scale a group.

w = (code - zero) * scale, codes 0..15, zero 8. A scale may be negative: a signed grid spends code 0
on the largest weight of a group, whatever its sign. In ONNX: com.microsoft::MatMulNBits.

-asym: zeros are stored as well, 4 bits a group, and scales are positive. -r16, -r32: a 16-bit
product up @ down of that rank is added to the weight (SVDQuant, arXiv 2411.05007).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hbxt_compress.formats.levels import checked, nearest, value
from hbxt_compress.graph.builder import CONTRIB, GraphBuilder, Value
from hbxt_compress.layers import LayerSpec
from hbxt_compress.quantized import halves

__all__ = ["Int4"]

_ZERO = 8
_GROUPS = (128, 64, 32)
_SHARE = 4  # a branch of more than a quarter of the full rank is no small correction


class Int4:
    """Names int4-g128, int4-g64-asym, int4-g32-r16. O out, I in, G = I / group, R rank.

    Payload: codes uint8 O I in 0..15, scales float16 O G; if asymmetric zeros uint8 O G in 0..15;
    with a rank down float16 R I and up float16 O R.
    """

    n_levels = (_ZERO, _ZERO - 1)

    def __init__(self, *, group: int, asymmetric: bool = False, rank: int = 0) -> None:
        if group < 16 or group & (group - 1):
            raise ValueError(f"group {group}: MatMulNBits takes powers of two from 16 on")
        if rank < 0:
            raise ValueError(f"rank {rank}: must be 0 (no branch) or more")
        self.group = group
        self.asymmetric = asymmetric
        self.rank = rank
        self.name = f"int4-g{group}{'-asym' * asymmetric}{f'-r{rank}' if rank else ''}"

    def fits(self, spec: LayerSpec) -> str | None:
        """Why the weight cannot take this format and what to do, or None if it can."""
        if spec.kind != "linear":
            remedy = f"use int4-row-g{self.group}" if spec.kind == "embedding" else "keep it"
            return f"{self.name} stores only linear weights, this is a {spec.kind}: {remedy}"
        n_in = spec.shape[1]
        if n_in % self.group:
            smaller = [group for group in _GROUPS if group < self.group and n_in % group == 0]
            remedy = f"use int4-g{smaller[0]}" if smaller else "use int8-channel"
            return f"{n_in} input features are not a multiple of {self.group}: {remedy} or keep it"
        if self.rank and min(spec.shape) <= _SHARE * self.rank:
            plain = Int4(group=self.group, asymmetric=self.asymmetric).name
            return f"a branch of rank {self.rank} is too much for {list(spec.shape)}: use {plain}"
        return None

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of packed codes, float16 scales, packed zeros and float16 factors."""
        n_out, n_in = shape
        n_groups = n_in // self.group
        zeros = n_out * math.ceil(n_groups / 2) if self.asymmetric else 0
        return n_out * n_in // 2 + 2 * n_out * n_groups + zeros + 2 * self.rank * (n_out + n_in)

    def encode(
        self, weight_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """The payload of nearest levels under given scales; a low-rank branch is zero."""
        scales_OG = scales_OG.to(torch.float16)
        levels_OI = nearest(weight_OI, scales_OG, zeros_OG, self.n_levels)
        low_rank = None
        if self.rank:
            n_out, n_in = weight_OI.shape
            low_rank = weight_OI.new_zeros(self.rank, n_in), weight_OI.new_zeros(n_out, self.rank)
        return self.store(levels_OI, scales_OG, zeros_OG, low_rank=low_rank)

    def store(
        self,
        levels_OI: Tensor,
        scales_OG: Tensor,
        zeros_OG: Tensor | None = None,
        *,
        low_rank: tuple[Tensor, Tensor] | None = None,
    ) -> Mapping[str, Tensor]:
        """The payload of given levels in -8..7, zeros (None: 0) and factors (down R I, up O R).

        Raises:
            ValueError: a level or zero is out of range, there are zeros but the format is
                symmetric, or the factors are not of the format's rank.
        """
        payload = {
            "codes": (checked(levels_OI, self.n_levels) + _ZERO).to(torch.uint8),
            "scales": scales_OG.to(torch.float16),
        }
        if self.asymmetric:
            zeros_OG = torch.zeros_like(scales_OG) if zeros_OG is None else zeros_OG
            payload["zeros"] = (checked(zeros_OG, self.n_levels) + _ZERO).to(torch.uint8)
        elif zeros_OG is not None and bool(zeros_OG.any()):
            raise ValueError(f"{self.name} has no room for zero points: use {self.name}-asym")
        n_out, n_in = levels_OI.shape
        shapes = [(self.rank, n_in), (n_out, self.rank)] if self.rank else []
        if [tuple(factor.shape) for factor in low_rank or ()] != shapes:
            raise ValueError(f"{self.name} needs factors of shapes {shapes}")
        if low_rank is not None:
            payload |= {
                k: f.to(torch.float16) for k, f in zip(("down", "up"), low_rank, strict=True)
            }
        return payload

    def decode(self, payload: Mapping[str, Tensor]) -> Tensor:
        """The float32 weight, O I."""
        zeros = payload.get("zeros")
        zeros_OG = None if zeros is None else zeros.float() - _ZERO
        weight_OI = value(payload["codes"].float() - _ZERO, payload["scales"], zeros_OG)
        return (
            weight_OI + payload["up"].float() @ payload["down"].float() if self.rank else weight_OI
        )

    def pack(self, payload: Mapping[str, Tensor]) -> Tensor:
        """uint8 O G group/2: two codes a byte, the first in the low four bits."""
        pairs = halves(payload, "codes")
        half = self.group // 2
        return pairs.reshape(len(pairs), pairs.shape[1] // half, half)

    def unpack(self, packed: Tensor) -> Tensor:
        """codes uint8 O I of what `pack` returned."""
        return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)

    def pack_zeros(self, payload: Mapping[str, Tensor]) -> Tensor:
        """uint8, one axis: two zeros a byte, each row's count padded to even with the default 8."""
        zeros_OG = payload["zeros"]
        if zeros_OG.shape[1] % 2:
            zeros_OG = torch.nn.functional.pad(zeros_OG, (0, 1), value=_ZERO)
        return (zeros_OG[:, 0::2] | (zeros_OG[:, 1::2] << 4)).flatten()

    def emit(
        self, graph: GraphBuilder, name: str, x: Value, payload: Mapping[str, Tensor]
    ) -> Value:
        """Adds MatMulNBits with three inputs, or four: a fifth is misread on some targets."""
        packed = self.pack(payload)
        n_out, n_in = len(packed), 2 * packed[0].numel()
        shape = (*graph.shape_of(x)[:-1], n_out)
        codes = graph.initializer(f"{name}.codes", packed)
        inputs = [x, codes, graph.float32(f"{name}.scales", payload["scales"].flatten())]
        if self.asymmetric:
            inputs.append(graph.initializer(f"{name}.zeros", self.pack_zeros(payload)))
        out = graph.node(
            "MatMulNBits",
            inputs,
            shape=shape,
            domain=CONTRIB,
            K=n_in,
            N=n_out,
            bits=4,
            block_size=self.group,
        )
        if not self.rank:
            return out
        down = graph.float32(f"{name}.down", payload["down"].T)
        up = graph.float32(f"{name}.up", payload["up"].T)
        narrow = graph.node("MatMul", [x, down], shape=(*shape[:-1], self.rank))
        branch = graph.node("MatMul", [narrow, up], shape=shape)
        return graph.node("Add", [out, branch], shape=shape)

    def weight(
        self, graph: GraphBuilder, name: str, payload: Mapping[str, Tensor], shape: tuple[int, ...]
    ) -> Value:
        """Raises ValueError: its operator multiplies, there is no node for the weight alone."""
        raise ValueError(f"{name}: {self.name} stores only linear weights")

    def rows(
        self, graph: GraphBuilder, name: str, ids: Value, payload: Mapping[str, Tensor]
    ) -> Value:
        """Raises ValueError: tables have formats of their own."""
        raise ValueError(f"{name}: {self.name} stores no tables that are looked up")
