"""Model families: how a kind of diffusers folder is read, listed, run and exported.

To add one: write a file here and a line in MODELS.
"""

from __future__ import annotations

from hbxt_compress.torchvision_ops import mend_torchvision

mend_torchvision()  # before the families import diffusers and transformers

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor, nn

from hbxt_compress.chain import Chain
from hbxt_compress.errors import SourceError
from hbxt_compress.geometry import Geometry
from hbxt_compress.graph.capture import ComponentGraphs
from hbxt_compress.layers import Depth, LayerSpec, Pair
from hbxt_compress.manifest import Bucket
from hbxt_compress.models.wan import Wan
from hbxt_compress.sampler import SamplerSpec
from hbxt_compress.source import Source
from hbxt_compress.weights import Weights

__all__ = ["MODELS", "Family", "family_of"]


class Family(Protocol):
    """What the pipeline needs to know about a kind of model."""

    name: str
    pipelines: frozenset[str]  # `_class_name` values in model_index.json
    chained: frozenset[str]  # components whose layer inputs can be observed
    doubtful: frozenset[str]  # whose numbers may be too large for float16
    depths: Mapping[str, Depth]  # of the components that have blocks

    def components(self, source: Source) -> tuple[str, ...]:
        """Exported components in the order they run, experts apart."""

    def layers(self, source: Source) -> tuple[LayerSpec, ...]:
        """Every weight of two or more dimensions that inference needs, from headers alone."""

    def parameters(self, source: Source) -> Mapping[str, int]:
        """How many parameters each exported component has."""

    def geometry(self, source: Source) -> Geometry:
        """The clip size a user gets who asks for none."""

    def text_length(self, source: Source) -> int:
        """Tokens a prompt is padded to."""

    def sampler(self, source: Source) -> SamplerSpec:
        """The sampler this checkpoint was made for."""

    def latent_shape(
        self, source: Source, clip: Geometry | None = None
    ) -> tuple[int, int, int, int]:
        """C T H W of the latents of a clip; None: of the clip size above."""

    def tokens(self, source: Source, clip: Geometry) -> int:
        """How many tokens the transformer makes of such a clip.

        Raises:
            SourceError: it cannot take that size; the nearest sizes that it can take are named.
        """

    def latent_statistics(self, source: Source) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation by latent channel: the VAE decodes z * std + mean."""

    def buckets(self, source: Source, clips: Sequence[Geometry] = ()) -> tuple[Bucket, ...]:
        """Clip sizes (none: the one above), and the files of the graphs that `graphs` has for them.

        Raises:
            SourceError: the transformer cannot take a size.
        """

    def graphs(
        self, source: Source, component: str, module: nn.Module, clips: Sequence[Geometry] = ()
    ) -> ComponentGraphs:
        """What to export of a component for these clip sizes; its skeleton is enough."""

    def chain(self, source: Source, component: str, module: nn.Module) -> Chain:
        """A loaded component in pieces: head, blocks, tail."""

    def streamed(self, source: Source, component: str, device: torch.device) -> Chain:
        """A component in pieces that read their weights when they are entered."""

    def decode(self, source: Source, module: nn.Module, latents_BCTHW: Tensor) -> Tensor:
        """The frames, B C T H W in -1..1, that a loaded VAE makes of a sampler's latents."""

    def encode(self, source: Source, module: nn.Module, frames_BCTHW: Tensor) -> Tensor:
        """A sampler's latents, B C T H W, of frames in -1..1: what `decode` would make them of."""

    def pairs(self, source: Source, component: str, block: int) -> tuple[Pair, ...]:
        """The pairs of linears in a block between which features may be mixed."""

    def skeleton(self, source: Source, component: str) -> nn.Module:
        """The component's module in eval mode, float32 parameters on the meta device.

        Buffers that are computed are real. Reads no weights but their headers; SourceError if those
        are not the tensors that config.json asks for.
        """

    def expected(self, source: Source, component: str) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor that config.json asks for; no weights need be there."""

    def original_name(self, name: str) -> str:
        """What the authors' own code calls the transformer's tensor that diffusers calls so."""

    def weights(self, source: Source, component: str) -> Weights:
        """The tensors behind a skeleton's parameters, and all others of the component's folder."""

    def load(self, source: Source, component: str) -> nn.Module:
        """The component's module in float32 and eval mode, every weight checked finite.

        This, `skeleton` and `weights` also take "vae": all of it, with its encoder and own decoder.
        """


MODELS: Final[Mapping[str, Family]] = {"wan": Wan()}


def family_of(source: Source) -> Family:
    """The family that takes this folder; SourceError naming the class it has and those known."""
    kind = source.config("model_index.json").get("_class_name")
    for family in MODELS.values():
        if isinstance(kind, str) and kind in family.pipelines:
            return family
    known = sorted(name for family in MODELS.values() for name in family.pipelines)
    raise SourceError(
        f"{source.folder / 'model_index.json'}: _class_name is {kind!r}; known: {', '.join(known)}"
    )
