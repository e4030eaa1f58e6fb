"""How exactly statistics and losses of large components are summed: as their blocks multiply."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hbxt_compress.chain import Chain

__all__ = ["products_for"]


@contextmanager
def products_for(chain: Chain) -> Iterator[None]:
    """Meanwhile float32 products take their factors in bfloat16 if the blocks do."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if chain.is_large else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
