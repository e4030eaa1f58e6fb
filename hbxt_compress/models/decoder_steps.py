"""Steps of a decoder: a graph for a clip's first latent frame and one for each later frame.

A cache is the last two input frames of a causal convolution, zero before the clip begins, handed on
as 2 C H W. Shapes: C channels, T frames (1 in, 1 or more out), H W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from hbxt_compress.graph.capture import GraphSpec, TensorSpec, without_values
from hbxt_compress.manifest import Bucket
from hbxt_compress.tile import Tile

__all__ = ["KEPT_FRAMES", "Past", "step_graphs"]

KEPT_FRAMES = 2
Reference = Callable[..., Sequence[Tensor]]


class Past:
    """The caches of a step in the order in which convolutions ask for them; None in the first."""

    def __init__(self, caches: Sequence[Tensor] | None) -> None:
        self._caches = None if caches is None else list(caches)
        self.first = caches is None
        self.kept: list[Tensor] = []

    def before(self, x: Tensor) -> Tensor | None:
        """The two frames before x, T C H W; of all these the last two are kept."""
        if self._caches is None:
            self.kept.append(functional.pad(x, (0, 0, 0, 0, 0, 0, KEPT_FRAMES - 1, 0)))
            return None
        found, n_missing = self._caches.pop(0), max(0, KEPT_FRAMES - x.shape[0])
        kept = x[-KEPT_FRAMES:]
        self.kept.append(torch.cat([found[-n_missing:], kept]) if n_missing else kept)
        return found

    def begin(self, x: Tensor) -> None:
        """Keeps zeros, as if there had been no x."""
        self.kept.append(x.new_zeros(KEPT_FRAMES, *x.shape[1:]))


def step_graphs(
    first: nn.Module, later: nn.Module, bucket: Bucket,
    *, first_reference: Reference, next_reference: Reference,
) -> dict[str, GraphSpec]:  # fmt: skip
    """The graphs that a bucket names, for whole frames and for tiles.

    first(latent 1 C 1 H W) and later(latent, *caches): a sample 1 3 T H W and the new caches.
    """
    channels, _, height, width = bucket.latent_shape
    sizes: list[tuple[Bucket | Tile, int, int]] = [(bucket, height, width)]
    if (tile := bucket.tile) is not None:
        factor = bucket.geometry.height // height
        sizes.append((tile, tile.height // factor, tile.width // factor))
    graphs: dict[str, GraphSpec] = {}
    for names, rows, columns in sizes:
        frame = TensorSpec(shape=(1, channels, 1, rows, columns))
        with without_values(first), torch.no_grad():
            _, *kept = first(torch.zeros(frame.shape))
        caches = {f"cache_in_{i}": TensorSpec(shape=tuple(one.shape)) for i, one in enumerate(kept)}
        outputs = ["sample", *(f"cache_out_{i}" for i in range(len(kept)))]
        graphs[names.first] = GraphSpec(
            module=first,
            inputs={"latent_sample": frame},
            outputs=outputs,
            reference=first_reference,
        )
        graphs[names.next] = GraphSpec(
            module=later,
            inputs={"latent_sample": frame, **caches},
            outputs=outputs,
            reference=next_reference,
        )
    return graphs
