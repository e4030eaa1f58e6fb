"""Imports torchvision even where its compiled operators do not match the installed torch.

transformers and lpips import torchvision, which registers shape rules for `torchvision::nms` at
import and dies if the compiled library that declares that operator could not be loaded (a CUDA
torchvision beside a CPU torch). Nothing here ever calls those operators, so declaring their
schemas is enough. A healthy torchvision is left alone.
"""

from __future__ import annotations

import importlib.util
import sys

__all__ = ["mend_torchvision"]

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept_alive: list[object] = []  # torch drops the schemas when their Library object is collected


def mend_torchvision() -> None:
    """Leaves `import torchvision` working, or torchvision absent; any other failure is raised."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            library.define(schema)
        _kept_alive.append(library)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torchvision  # noqa: F401
