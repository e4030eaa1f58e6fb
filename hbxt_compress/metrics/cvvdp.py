"""ColorVideoVDP by the package cvvdp: a model of what a viewer sees, in colour and in time.

Scores are JOD: 10 is no visible difference, one less means that 75 % of viewers prefer the better
clip; unrelated clips may fall below 0. They hold for one display, which the extractor's text
names, and for a clip that fills only its own pixels of it. Slow: seconds for each frame of 720p.
"""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from hbxt_compress.clips import Clip
from hbxt_compress.metrics.scales import JOD, Scale
from hbxt_compress.metrics.weights import Unavailable, WeightFiles
from hbxt_compress.torchvision_ops import mend_torchvision

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["CVVDP", "Cvvdp"]

_DISPLAY: Final = "standard_fhd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cvvdp:
    """ColorVideoVDP of a pair of clips; `model` is empty until it is loaded."""

    name: str = "cvvdp"
    unit: str = "JOD"
    direction: Literal["lower", "higher"] = "higher"
    family: Literal["fidelity", "distribution", "health"] = "fidelity"
    least_n: int = 8
    scale: Scale | None = JOD
    model: Any = None
    extractor: str | None = None
    extractor_sha256: str | None = None

    def load(self, files: WeightFiles) -> Self:
        """This metric on the CPU; the sha256 is that of the package's parameters and displays."""
        package = _imported()
        import torch  # here, so that a list of metrics needs no torch

        model = package.cvvdp(display_name=_DISPLAY, device=torch.device("cpu"), quiet=True)
        digest = hashlib.sha256(str(model.version).encode())
        for path in sorted(Path(model.parameters_file).parent.glob("*.json")):
            digest.update(path.read_bytes())
        return replace(
            self,
            model=model,
            extractor=str(model.get_info_string()).strip('"'),
            extractor_sha256=digest.hexdigest(),
        )

    def compare(self, reference: Clip, candidate: Clip) -> float:
        """JOD of the whole clip, at most 10."""
        if self.model is None:
            raise Unavailable("load() it first")
        import torch

        test, shown = (torch.tensor(clip.frames) for clip in (candidate, reference))
        with torch.no_grad():
            found, _ = self.model.predict(
                test, shown, dim_order="FHWC", frames_per_second=reference.fps
            )
        return float(found)


def _imported() -> ModuleType:
    remedy = "pip install 'hbxt-compress[slow]'"
    if importlib.util.find_spec("pycvvdp") is None:  # before torchvision, which takes its time
        raise Unavailable(f"no package cvvdp: {remedy}")
    try:
        mend_torchvision()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes in its strings that Python deprecates
            import pycvvdp
    except ImportError as error:
        raise Unavailable(f"cvvdp cannot be imported ({error}): {remedy}") from None
    return pycvvdp


CVVDP = Cvvdp()
