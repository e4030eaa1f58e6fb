"""The answer of `hbxt plan --target`: whether it fits, what is resident when, what would help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hbxt_compress.fit.cards import CPU, Room, cards, find_room
from hbxt_compress.fit.changes import Fitter, Setting
from hbxt_compress.fit.lowered import Lowerer
from hbxt_compress.fit.residency import Residency, fuses_attention
from hbxt_compress.fit.roofline import Estimate, estimate
from hbxt_compress.geometry import Geometry
from hbxt_compress.lightened import as_if_lightened
from hbxt_compress.recipe import Recipe
from hbxt_compress.source import Source, locate

__all__ = ["Answer", "Asker", "assumptions", "foretell"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """For one clip size. asked: with every component kept. found: the smallest change, or None.

    asked_bytes: the peak as asked. residency: with the change, or with one graph open at a time if
    none helps. step: an estimate of one run of the transformer there; None on a processor. passes:
    runs of it in a denoising step.
    """

    room: Room
    asked: Setting
    found: Setting | None
    asked_bytes: int
    residency: Residency
    step: Estimate | None
    passes: int

    @property
    def changes(self) -> tuple[str, ...]:
        return () if self.found is None else self.found.changes(self.asked)

    @property
    def seconds_per_step(self) -> float | None:
        return None if self.step is None else self.step.total * self.passes

    @property
    def only_at_most(self) -> bool:
        """Whether it would fit unchanged, if only the card had the most memory of its range."""
        most = self.room.usable_bytes + self.room.most_bytes - self.room.n_bytes
        return self.found != self.asked and self.asked_bytes <= most

    def to_json(self) -> dict[str, object]:
        """Plain JSON values; bytes and seconds."""
        room, setting = self.room, self.found or self.asked
        return {
            "target": room.target,
            "card": None if room.card is None else room.card.name,
            "memory_bytes": [room.n_bytes, room.most_bytes],
            "reserve_bytes": room.reserve_bytes,
            "geometry": str(self.asked.clip),
            "recipe": self.asked.recipe,
            "fits": self.found == self.asked,
            "fits_with": None if self.found is None else list(self.changes),
            "loading": setting.loading,
            "peak_bytes": self.residency.peak_bytes,
            "attention_fused": room.target == CPU or fuses_attention(room.target),
            "stages": [
                {
                    "stage": one.name,
                    "stored_bytes": one.stored_bytes,
                    "weight_bytes": one.weight_bytes,
                    "value_bytes": one.value_bytes,
                    "working_bytes": one.working_bytes,
                    "worst_node": one.at,
                    "peak_bytes": self.residency.peak(one),
                }
                for one in self.residency.stages
            ],
            "estimated_seconds_per_step": self.seconds_per_step,
            "estimated_attention_share": None if self.step is None else self.step.attention_share,
        }


class Asker:
    """Answers for one model; what it found for one recipe, size or target serves the next."""

    def __init__(self, source: Source) -> None:
        self._lowerer = Lowerer(source=source)
        self._fitter = Fitter(self._lowerer)

    def geometries(self, text: str | None) -> tuple[Geometry, ...]:
        """The sizes in a text such as 704x1280x121,480x832x81; None: the model's own.

        Raises:
            UsageError: it is not written so.
            SourceError: the model cannot take one; the nearest that it takes are named.
        """
        family, source = self._lowerer.family, self._lowerer.source
        own = family.geometry(source)
        found = (own,) if text is None else Geometry.parse(text, own.fps)
        for one in found:
            family.tokens(source, one)
        return found

    def answer(self, recipe: Recipe, clip: Geometry, room: Room) -> Answer:
        """Whether a recipe's artifact fits at a clip size."""
        self._fitter.add(recipe)
        asked = Setting(recipe=recipe.name, clip=clip)
        found = self._fitter.smallest_change(asked, room)
        setting = found or Setting(recipe=recipe.name, clip=clip, loading="one after the other")
        residency = self._fitter.residency(setting, room.target)
        sampler = self._lowerer.family.sampler(self._lowerer.source)
        runs = next(one.done for one in residency.stages if one.component == "transformer")
        return Answer(
            room=room,
            asked=asked,
            found=found,
            asked_bytes=self._fitter.residency(asked, room.target).peak_bytes,
            residency=residency,
            step=None if room.card is None else estimate(room.card, runs),
            passes=2 if sampler.guidance > 1 else 1,
        )


def foretell(
    recipe: Recipe, model: str, target: str, *, vram: str | None = None, geometry: str | None = None
) -> tuple[Answer, ...]:
    """An answer for each clip size; of the model only file headers are read.

    Raises:
        UsageError: no such target, memory or way to write a size.
        SourceError: the model cannot take such clips.
        PlanError: the recipe does not fit the model.
    """
    room = find_room(target, vram)
    with as_if_lightened(locate(model, hashed=False), recipe.decoder) as source:
        asker = Asker(source)
        return tuple(asker.answer(recipe, one, room) for one in asker.geometries(geometry))


def assumptions(room: Room) -> Sequence[str]:
    """In words, what the answer takes for granted."""
    if room.card is None:
        return ("memory of this machine; other processes are not counted",)
    reserve = f"{cards().reserve_gb:g} GB of it are taken for {cards().reserve_why}"
    return (reserve, "not run on a card: by shapes, and by what the runtime's source code folds")
