"""Ranges: how large the numbers get that layers are given and give, in full precision.

T5's encoders pass 65504, the largest float16, in some layers. Where a component is to compute in
float16 such layers are told apart here, by prompts of the calibration set, and scaled at export.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from hbxt_compress.chain import Carry, Chain
from hbxt_compress.errors import CalibrationError, listing
from hbxt_compress.machine import Machine
from hbxt_compress.models import family_of
from hbxt_compress.prompts import PromptSet
from hbxt_compress.runtime.text import PromptTokenizer
from hbxt_compress.source import Source
from hbxt_compress.store import Work

__all__ = ["FACTS", "N_PROMPTS", "VERSION", "ranges", "read_ranges"]

VERSION = 1
FACTS = ("torch", "transformers")
N_PROMPTS = 16  # of the calibration set, evenly spread, and the empty one
_RESULT = "ranges.json"
log = logging.getLogger(__name__)


def ranges(work: Work, source: Source, component: str, prompts: PromptSet, on: Machine) -> None:
    """Writes ranges.json: layer -> largest absolute number that it was given or gave.

    component: a text encoder. A block is in memory at a time. Rank 0 does it alone.

    Raises:
        CalibrationError: a layer gave what is not finite (all of them).
    """
    work.expect(1)
    if not work.ranks.leads:
        return

    def make(path: Path) -> None:
        found = _observe(source, component, prompts, torch.device(on.device))
        if bad := [name for name, most in found.items() if not most < float("inf")]:
            raise CalibrationError(
                f"{len(bad)} layers are given or give what is not finite:\n{listing(bad)}"
            )
        path.write_text(json.dumps(found, indent=1, sort_keys=True))

    work.piece(_RESULT, make)


def read_ranges(folder: Path) -> Mapping[str, float]:
    """What `ranges` wrote."""
    return json.loads((folder / _RESULT).read_text())


@torch.no_grad()
def _observe(
    source: Source, component: str, prompts: PromptSet, device: torch.device
) -> dict[str, float]:
    family = family_of(source)
    chain = family.streamed(source, component, device)
    tokenize = PromptTokenizer(source.folder / "tokenizer", family.text_length(source))
    every = [prompt for prompt, _ in prompts.items()]
    n = min(N_PROMPTS, len(every))
    some = [every[i] for i in torch.linspace(0, len(every) - 1, n).round().int().tolist()]
    inputs = [[torch.from_numpy(a).to(device) for a in tokenize(text)] for text in (*some, "")]
    carries = [chain.head(*one) for one in inputs]
    masks = [one[1].bool() for one in inputs]
    most: dict[str, float] = {}
    for i in range(len(chain.blocks)):
        log.info("ranges", extra={"progress": (i, len(chain.blocks), "ranges")})
        chain.enter(i)
        carries = [
            _passed(chain, i, carry, mask, most) for carry, mask in zip(carries, masks, strict=True)
        ]
        chain.leave(i)
    return {f"{component}/{path}": value for path, value in most.items()}


def _passed(chain: Chain, index: int, carry: Carry, mask: Tensor, most: dict[str, float]) -> Carry:
    with _watched(chain, chain.blocks[index], mask, most):
        return chain.block(index, carry)


@contextmanager
def _watched(
    chain: Chain, block: nn.Module, mask: Tensor, most: dict[str, float]
) -> Iterator[None]:
    """Meanwhile what the block's linears are given and give is noted, but for padding."""
    inside = set(block.modules())

    def note(path: str, _: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        largest = max(float(one[mask].abs().max()) for one in (given[0], output))
        most[path] = max(most.get(path, 0.0), largest)

    with ExitStack() as stack:
        for path, module in chain.module.named_modules():
            if module in inside and isinstance(module, nn.Linear):
                stack.callback(module.register_forward_hook(partial(note, path)).remove)
        yield
