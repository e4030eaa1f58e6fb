"""The smallest change that makes a model fit.

Tried in this order, each together with those before it, until one fits: one graph open at a time,
the VAE decoding tiles, a smaller recipe of the library, a shorter clip, a smaller one. What turns
out not to be needed is then taken back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from hbxt_compress import library
from hbxt_compress.errors import PlanError, SourceError
from hbxt_compress.fit.cards import CPU, Room
from hbxt_compress.fit.cpu import BASE_BYTES
from hbxt_compress.fit.lowered import Lowerer
from hbxt_compress.fit.residency import Loading, Residency, Stage, fuses_attention, measure_stages
from hbxt_compress.geometry import Geometry
from hbxt_compress.recipe import Recipe, load_recipe

__all__ = ["Fitter", "Setting", "smaller_clips"]

_FOR_TRIALS: Final = frozenset({"tiny"})
_SMALLER: Final = 0.9  # sides of the next smaller size
_FEWER: Final = 8  # steps to the shortest clip


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a model is run."""

    recipe: str
    clip: Geometry
    loading: Loading = "all kept"
    tiled: bool = False

    def changes(self, asked: Setting) -> tuple[str, ...]:
        """In words, what differs from what was asked for."""
        found = []
        if self.loading != asked.loading:
            found.append("one graph open at a time")
        if self.tiled and not asked.tiled:
            found.append("VAE decode in tiles")
        if self.recipe != asked.recipe:
            found.append(f"recipe {self.recipe}")
        if self.clip.n_frames != asked.clip.n_frames:
            found.append(f"{self.clip.n_frames} frames")
        if (self.clip.height, self.clip.width) != (asked.clip.height, asked.clip.width):
            found.append(f"{self.clip.height}x{self.clip.width} pixels")
        return tuple(found)


class Fitter:
    """Tries settings of one model; what a stage takes on a kind of target is found once."""

    def __init__(self, lowerer: Lowerer) -> None:
        self._lowerer = lowerer
        self._recipes: dict[str, Recipe] = {}
        self._known: dict[tuple[object, ...], tuple[Stage, ...]] = {}

    def add(self, recipe: Recipe) -> None:
        """Makes a recipe known that is not, or not as it is, in the library."""
        self._recipes[recipe.name] = recipe

    def residency(self, setting: Setting, target: str) -> Residency:
        """What a setting takes on a target.

        Raises:
            PlanError: the recipe does not fit the model.
            SourceError: the model cannot take such clips.
        """
        family, source = self._lowerer.family, self._lowerer.source
        family.tokens(source, setting.clip)
        found = [self._stages(one, setting, target) for one in family.components(source)]
        return Residency(
            stages=tuple(stage for stages in found for stage in stages),
            loading=setting.loading,
            base_bytes=BASE_BYTES if target == CPU else 0,
        )

    def smallest_change(self, asked: Setting, room: Room) -> Setting | None:
        """The first setting that fits; None if none of those that are tried does."""

        def fits(setting: Setting) -> bool:
            return self.residency(setting, room.target).fits(room)

        now = asked
        tries: tuple[Callable[[Setting, Room], Iterator[Setting]], ...] = (
            lambda s, _: iter([replace(s, loading="one after the other")]),
            lambda s, _: iter([replace(s, tiled=True)]),
            self._smaller_recipes,
            self._shorter,
            self._smaller,
        )
        if fits(now):
            return now
        for tried in tries:
            for one in tried(now, room):
                now = one
                if fits(one):
                    return _only_needed(asked, one, fits)
        return None

    def _recipe(self, name: str) -> Recipe:
        if name not in self._recipes:
            self._recipes[name] = load_recipe(name)
        return self._recipes[name]

    def _stages(self, component: str, setting: Setting, target: str) -> tuple[Stage, ...]:
        clip, family, source = setting.clip, self._lowerer.family, self._lowerer.source
        if component == "vae_decoder":
            clip = replace(clip, n_frames=1)
        elif component == "text_encoder":
            clip = family.geometry(source)
        key = component, setting.recipe, clip, setting.tiled, target == CPU, fuses_attention(target)
        if key not in self._known:
            graphs = self._lowerer.graphs(self._recipe(setting.recipe), component, clip)
            if component == "vae_decoder":
                (bucket,) = family.buckets(source, (clip,))
                steps = bucket.tile if setting.tiled and bucket.tile else bucket
                graphs = {name: graphs[name] for name in (steps.first, steps.next)}
            self._known[key] = measure_stages(component, graphs, target)
        return self._known[key]

    def _smaller_recipes(self, now: Setting, room: Room) -> Iterator[Setting]:
        """Those of the library that take less than this one, the largest first.

        Of those that take about the same first what is calibrated.
        """
        found = []
        most = self.residency(now, room.target).peak_bytes
        for name in sorted(set(library.names("recipes")) - _FOR_TRIALS):
            try:
                there = self.residency(replace(now, recipe=name), room.target)
            except PlanError:  # it does not fit the model
                continue
            if there.peak_bytes < most:
                size = round(math.log(there.peak_bytes), 2)
                found.append((-size, not self._recipe(name).prepare, name))
        for *_, name in sorted(found):
            yield replace(now, recipe=name)

    def _shorter(self, now: Setting, room: Room) -> Iterator[Setting]:
        """Fewer frames: steps of an eighth, of those that the transformer's values let hope for."""
        if not self._hope(now, room):
            return
        family, source = self._lowerer.family, self._lowerer.source
        n_latents = family.latent_shape(source, now.clip)[1]
        unit = (now.clip.n_frames - 1) // max(1, n_latents - 1)
        for k in range(_FEWER - 1, -1, -1):
            n = (n_latents - 1) * k // _FEWER
            clip = replace(now.clip, n_frames=n * unit + 1)
            yield replace(now, clip=clip)

    def _smaller(self, now: Setting, room: Room) -> Iterator[Setting]:
        """The same shape, smaller and smaller, in sizes that the model takes."""
        if self._hope(now, room):
            for clip in smaller_clips(self._lowerer, now.clip):
                yield replace(now, clip=clip)

    def _hope(self, now: Setting, room: Room) -> bool:
        """Whether weights alone would fit."""
        there = self.residency(now, room.target)
        weights = max(one.weight_bytes for one in there.stages)
        return there.base_bytes + weights < room.usable_bytes


def smaller_clips(lowerer: Lowerer, clip: Geometry) -> Iterator[Geometry]:
    """Sizes of about the same shape that the transformer takes, from large to small."""
    scale, last = 1.0, clip
    while True:
        scale *= _SMALLER
        sides = {
            side: _fitting(lowerer, clip, side, int(getattr(clip, side) * scale))
            for side in ("height", "width")
        }
        if not all(sides.values()):
            return
        smaller = replace(clip, **sides)
        if smaller != last:
            last = smaller
            yield smaller


def _fitting(lowerer: Lowerer, clip: Geometry, side: str, most: int) -> int:
    """The largest size of a side up to `most` that the transformer takes; 0 if there is none."""
    for size in range(most, 0, -1):
        try:
            lowerer.family.tokens(lowerer.source, replace(clip, **{side: size}))
        except SourceError:
            continue
        return size
    return 0


def _only_needed(asked: Setting, found: Setting, fits: Callable[[Setting], bool]) -> Setting:
    """Without what it fits without, the last switch first."""
    for kept in ({"recipe": asked.recipe}, {"tiled": asked.tiled}, {"loading": asked.loading}):
        one = replace(found, **kept)
        if one != found and fits(one):
            found = one
    return found
