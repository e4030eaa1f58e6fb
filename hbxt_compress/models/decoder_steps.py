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
    """The caches of a step in the order in which convolutions ask for them; none in the first."""

    def __init__(self, caches: Sequence[Tensor]) -> None:
        self._caches = list(caches)
        self.first = not caches
        self.kept: list[Tensor] = []

    def before(self, x: Tensor) -> Tensor | None:
        """The two frames before x, T C H W; of all these the last two are kept."""
        if self.first:
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
    step: nn.Module, bucket: Bucket, *, first_reference: Reference, next_reference: Reference
) -> dict[str, GraphSpec]:
    """The graphs that a bucket names, for whole frames and for tiles.

    step(latent 1 C 1 H W, *caches): a sample 1 3 T H W and the new caches; a clip's first has none.
    """
    channels, _, height, width = bucket.latent_shape
    sizes: list[tuple[Bucket | Tile, int, int]] = [(bucket, height, width)]
    if (tile := bucket.tile) is not None:
        factor = bucket.geometry.height // height
        sizes.append((tile, tile.height // factor, tile.width // factor))
    graphs: dict[str, GraphSpec] = {}
    for names, rows, columns in sizes:
        frame = TensorSpec(shape=(1, channels, 1, rows, columns))
        with without_values(step), torch.no_grad():
            _, *kept = step(torch.zeros(frame.shape))
        caches = {f"cache_in_{i}": TensorSpec(shape=tuple(one.shape)) for i, one in enumerate(kept)}
        outputs = ["sample", *(f"cache_out_{i}" for i in range(len(kept)))]
        graphs[names.first] = GraphSpec(
            module=step,
            inputs={"latent_sample": frame},
            outputs=outputs,
            reference=first_reference,
        )
        graphs[names.next] = GraphSpec(
            module=step,
            inputs={"latent_sample": frame, **caches},
            outputs=outputs,
            reference=next_reference,
        )
    return graphs
