"""LPIPS v0.1 by the `lpips` package, with a trunk that is checked before it is used.

The heads come in the wheel; the trunk is torchvision's ImageNet classifier, or its features alone.
It is taken from the path a user gives, else from torchvision's cache, and never downloaded here.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from hbxt_compress.clips import Clip
from hbxt_compress.metrics.scales import POWER, Scale
from hbxt_compress.metrics.weights import Unavailable, WeightFiles
from hbxt_compress.torchvision_ops import mend_torchvision

__all__ = ["Lpips", "open_lpips"]

# torchvision's own files carry the first 8 digits of their sha256 in their names.
_CACHED = {
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
}
_FEATURES_ONLY = {"squeeze": "435cedb387e95bc8291893f61a3a64f0345b8c23a05139aceef43947efb3d52d"}
_CHUNK_FRAMES = 16


class Lpips:
    """LPIPS of a clip: mean over frames; 0 for identical clips. Blind to the order of frames."""

    family: ClassVar[Literal["fidelity", "distribution", "health"]] = "fidelity"
    unit: ClassVar[str] = ""
    direction: ClassVar[Literal["lower", "higher"]] = "lower"
    least_n: ClassVar[int] = 8
    scale: ClassVar[Scale | None] = POWER

    def __init__(self, net: str, model: nn.Module, sha256: str) -> None:
        self.name = f"lpips_{net}"
        self.extractor = f"lpips v0.1, {net} (torchvision {_CACHED[net].split('-')[0]})"
        self.extractor_sha256 = sha256
        self._model = model

    def load(self, files: WeightFiles) -> Self:
        return self

    @torch.no_grad()
    def distances(self, a: Tensor, b: Tensor) -> Tensor:
        """LPIPS (N,) of images N 3 H W in [-1, 1]; ValueError for any other range."""
        for images in (a, b):
            low, high = float(images.min()), float(images.max())
            if low < -1 - 1e-4 or high > 1 + 1e-4:
                raise ValueError(
                    f"LPIPS takes images in [-1, 1], these span [{low:.3g}, {high:.3g}]"
                )
        found: Tensor = self._model(a, b)
        return found.flatten()

    def compare(self, reference: Clip, candidate: Clip) -> float:
        a, b = (
            torch.from_numpy(np.ascontiguousarray(c.frames)).permute(0, 3, 1, 2).float() / 127.5 - 1
            for c in (reference, candidate)
        )
        chunks = zip(a.split(_CHUNK_FRAMES), b.split(_CHUNK_FRAMES), strict=True)
        return float(torch.cat([self.distances(x, y) for x, y in chunks]).mean())


def open_lpips(net: str, files: WeightFiles) -> Lpips:
    """LPIPS with net squeeze, alex or vgg; Unavailable if its trunk is missing or unknown."""
    path = _trunk(net, files)
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    official = _CACHED[net].split("-")[-1].removesuffix(".pth")
    if not sha256.startswith(official) and sha256 != _FEATURES_ONLY.get(net):
        raise Unavailable(
            f"{path.name} has sha256 {sha256[:12]}..., which is not the known trunk: "
            f"give torchvision's {_CACHED[net]} in HBXT_LPIPS_TRUNK"
        )
    try:
        mend_torchvision()
        import lpips  # after the mend: it imports torchvision
    except ImportError as error:
        raise Unavailable(f"{error}; install the packages lpips and torchvision") from None
    saved: dict[str, Tensor] = torch.load(
        io.BytesIO(content), map_location="cpu", weights_only=True
    )
    whole = any(key.startswith("features.") for key in saved)
    trunk = {
        key.removeprefix("features."): value
        for key, value in saved.items()
        if key.startswith("features.") or not whole
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision deprecates the arguments that lpips passes
        model = lpips.LPIPS(net=net, version="0.1", pnet_rand=True, verbose=False)
    # lpips keys are slice<k>.<position in features>.<rest>; strict, so no random tensor remains.
    names = {key: key.split(".", 1)[1] for key in model.net.state_dict()}
    if sorted(names.values()) != sorted(trunk):
        raise Unavailable(f"{path.name} does not hold the tensors of this trunk")
    model.net.load_state_dict({key: trunk[name] for key, name in names.items()}, strict=True)
    return Lpips(net, model.eval().requires_grad_(False), sha256)


def _trunk(net: str, files: WeightFiles) -> Path:
    cached = Path(torch.hub.get_dir()) / "checkpoints" / _CACHED[net]
    path = files.lpips_trunk or cached
    if path.is_file():
        return path
    where = "the path given" if files.lpips_trunk else "torchvision's cache"
    raise Unavailable(
        f"no trunk {path.name} at {where}: set HBXT_LPIPS_TRUNK to torchvision's "
        f"{_CACHED[net]} or to a file of its features"
    )
