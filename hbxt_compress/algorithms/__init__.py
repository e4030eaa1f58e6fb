"""Algorithms by phase: distill (decoders, too), prepare (rewrites), round, refine (tune).

To add one: write a file here and a line in its table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final, Protocol

from torch import Tensor, nn

from hbxt_compress.algorithms.dmd import Dmd
from hbxt_compress.algorithms.few_steps import FewSteps
from hbxt_compress.algorithms.gptq import Gptq
from hbxt_compress.algorithms.guidance import Guidance
from hbxt_compress.algorithms.hadamard import Hadamard
from hbxt_compress.algorithms.light_decoder import Light, Lightened
from hbxt_compress.algorithms.permute import Permute
from hbxt_compress.algorithms.pupil import Distilled, Network, Pupil
from hbxt_compress.algorithms.recover import Recover
from hbxt_compress.algorithms.rotate import Rotate
from hbxt_compress.algorithms.rounded import Rounded
from hbxt_compress.algorithms.rtn import Rtn
from hbxt_compress.algorithms.scale import Scale
from hbxt_compress.algorithms.smooth_quant import SmoothQuant
from hbxt_compress.algorithms.solver import SolverRefit
from hbxt_compress.algorithms.training import Watch
from hbxt_compress.algorithms.trajectory import Trajectory
from hbxt_compress.algorithms.transform import Mixing, Transform
from hbxt_compress.formats import WeightFormat
from hbxt_compress.lessons import Lessons
from hbxt_compress.stats import LayerInputs, Need
from hbxt_compress.strict import one_of
from hbxt_compress.views import Views

__all__ = [
    "DECODERS",
    "DISTILLERS",
    "INPUT_PREPARERS",
    "PAIR_PREPARERS",
    "REFINERS",
    "ROUNDERS",
    "SAMPLER_REFINERS",
    "AnyDecoder",
    "AnyDistiller",
    "AnyPreparer",
    "AnyRefiner",
    "AnyRounder",
    "DecoderMaker",
    "Distiller",
    "InputPreparer",
    "PairPreparer",
    "Rounder",
]


class Distiller(Protocol):
    """Makes a student of a model."""

    VERSION: ClassVar[int]  # bump when results change

    @property
    def prompts(self) -> str:
        """The prompt set that its lessons are made of."""

    @property
    def n_clips(self) -> int:
        """How many clips the teacher makes for it."""

    def levels(self, sigmas: Sequence[float]) -> Sequence[float]:
        """Noise levels at which it wants the teacher's states, of a sampler with these."""

    def n_velocities(self, n_levels: int) -> int:
        """About how many states the model answers meanwhile; n_levels: the teacher's steps."""

    @property
    def networks(self) -> tuple[Network, ...]:
        """What it holds meanwhile. If any is trained all ranks distill together, else the first."""

    def distill(self, pupil: Pupil, lessons: Lessons, watch: Watch) -> Distilled:
        """The student; ValueError if it cannot be made of this model."""


class DecoderMaker(Protocol):
    """Trains a decoder that goes in the place of the VAE's own."""

    VERSION: ClassVar[int]  # bump when results change

    @property
    def prompts(self) -> str:
        """The prompt set of the clips that the model makes for it."""

    @property
    def n_clips(self) -> int:
        """How many those are."""

    @property
    def n_real(self) -> int:
        """How many real clips it wants, where there are any."""

    @property
    def wants_features(self) -> bool:
        """Whether it looks at what the full decoder's low-resolution blocks give."""

    @property
    def at_once(self) -> int:
        """How many clips it decodes at the same time."""

    @property
    def n_decoded(self) -> int:
        """About how many clips it decodes meanwhile; a gradient counts as three."""

    def sizes(self, z_dim: int, factor_in_time: int, factor_in_space: int) -> Mapping[str, Any]:
        """What a LightDecoder of such latents is built with; ValueError if none can be."""

    def lighten(self, decoder: nn.Module, views: Views, watch: Watch) -> Lightened:
        """The decoder's weights; ValueError if it does not suit the views."""


class InputPreparer(Protocol):
    """Proposes what a layer's input could be multiplied with at run time."""

    VERSION: ClassVar[int]  # bump when results change

    @property
    def need(self) -> Need | None: ...

    def candidates(
        self, weights: Sequence[Tensor], inputs: LayerInputs
    ) -> Iterator[tuple[str, Transform]]:
        """Named transforms of an input that layers with these weights (O I each) share."""


class PairPreparer(Protocol):
    """Proposes how the features between two layers could be mixed, for free.

    A field `widest` is the number of features above which it is not asked.
    """

    VERSION: ClassVar[int]  # bump when results change
    JOINTS: ClassVar[frozenset[str]]  # of "heads", "hidden": between what it may mix

    @property
    def widest(self) -> int: ...

    @property
    def need(self) -> Need | None: ...

    def candidates(
        self, first_FI: Tensor, second_OF: Tensor, inputs_of_second: LayerInputs, n_heads: int
    ) -> Iterator[tuple[str, Mixing]]:
        """Named mixings of the F features between two layers, none across a head."""


class Rounder(Protocol):
    """A rounding algorithm; its fields are its parameters in a recipe."""

    VERSION: ClassVar[int]  # bump when results change

    @property
    def need(self) -> Need | None:
        """Statistics that calibration must gather; None: this algorithm needs no calibration."""

    def round(self, weight_OI: Tensor, inputs: LayerInputs | None, fmt: WeightFormat) -> Rounded:
        """The weight in a format; weight_OI: float32. inputs is None only where need is None."""


DISTILLERS: Final[Mapping[str, type[Distiller]]] = {
    "guidance": Guidance,
    "trajectory": Trajectory,
    "dmd": Dmd,
    "solver": FewSteps,
}
AnyDistiller = one_of(DISTILLERS)

DECODERS: Final[Mapping[str, type[DecoderMaker]]] = {"light": Light}
AnyDecoder = one_of(DECODERS)

INPUT_PREPARERS: Final[Mapping[str, type[InputPreparer]]] = {
    "scale": Scale,
    "smooth": SmoothQuant,
    "hadamard": Hadamard,
}
PAIR_PREPARERS: Final[Mapping[str, type[PairPreparer]]] = {"rotate": Rotate, "permute": Permute}
AnyPreparer = one_of({**INPUT_PREPARERS, **PAIR_PREPARERS})

ROUNDERS: Final[Mapping[str, type[Rounder]]] = {"rtn": Rtn, "gptq": Gptq}
AnyRounder = one_of(ROUNDERS)

REFINERS: Final[Mapping[str, type[Recover]]] = {"recover": Recover}
SAMPLER_REFINERS: Final[Mapping[str, type[SolverRefit]]] = {"solver": SolverRefit}
AnyRefiner = one_of({**REFINERS, **SAMPLER_REFINERS})
