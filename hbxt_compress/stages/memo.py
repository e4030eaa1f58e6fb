"""Memo: what modules of a block gave, so that a run which stops later need not compute it again.

A block's layers are rounded one after the other, each on what the layers before it, rounded, make
of every batch. Beginning anew for each layer would pass most of the block three times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

__all__ = ["Memo"]


class Memo:
    """Of one batch. Outputs are known of modules that multiply, the outermost that were passed.

    largest: numbers of an output that is kept. All batches' hidden features of a feed-forward net
    would take more memory than the block's weights, so they are computed again.
    """

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._known: dict[str, Tensor] = {}

    @contextmanager
    def used(self, block: nn.Module) -> Iterator[None]:
        """Meanwhile a run of the block skips what is known, and what else it passes becomes known.

        Of what is known no weight may have changed. A module that a run calls twice is not skipped.
        """
        found: dict[str, Tensor | None] = {}
        with ExitStack() as stack:
            for path, module in block.named_modules():
                if not path or not any(isinstance(part, nn.Linear) for part in module.modules()):
                    continue
                if path in self._known:
                    module.forward = _giving(self._known[path])
                    stack.callback(module.__delattr__, "forward")
                stack.callback(module.register_forward_hook(_noting(path, found)).remove)
            yield
        self._known = {
            path: output
            for path, output in found.items()
            if output is not None and output.numel() <= self._largest
        }


def _giving(output: Tensor) -> Callable[..., Tensor]:
    return lambda *_, **__: output


def _noting(
    path: str, found: dict[str, Tensor | None]
) -> Callable[[nn.Module, tuple[Tensor, ...], object], None]:
    def note(_: nn.Module, __: tuple[Tensor, ...], output: object) -> None:
        once = isinstance(output, Tensor) and path not in found
        if once:  # what lies inside is not run again
            for inner in [known for known in found if known.startswith(f"{path}.")]:
                del found[inner]
        found[path] = output if once and isinstance(output, Tensor) else None

    return note
