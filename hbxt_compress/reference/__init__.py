"""The built-in reference model, tiny-wan: its world of shapes, its training, its weights."""

from __future__ import annotations

from hbxt_compress.torchvision_ops import mend_torchvision

mend_torchvision()  # before any module here imports diffusers or transformers
