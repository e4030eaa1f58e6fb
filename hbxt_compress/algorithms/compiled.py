"""Compiled: a function of tensors made one pass over them by torch.compile, if there is a compiler.

Results may differ from those of the function itself in the last bits.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

__all__ = ["Compiled"]

log = logging.getLogger(__name__)
_OPTIONS: dict[str, str | int | bool | Callable[..., object]] = {
    "emulate_precision_casts": True,  # or rounding to float16 is optimised away
    "cpp_wrapper": True,  # or it holds Python's lock, and layers wait for each other
}


class Compiled:
    """Code that was made, by what it is for; made once, and on the CPU only.

    task: what is slower without a compiler, as the warning says.
    """

    def __init__(self, task: str) -> None:
        self._task = task
        self._made: dict[Hashable, Callable[..., Any] | None] = {}
        self._lock = Lock()

    def of(
        self,
        key: Hashable,
        function: Callable[..., Any],
        examples: Sequence[Tensor | None],
        differ: Sequence[tuple[int, ...]],
    ) -> Callable[..., Any] | None:
        """The function as code; None, with a warning, where there is no compiler.

        key: whatever the code depends on, beside the number of threads that it runs on. examples:
        its arguments; differ: which of their axes will be of other sizes than here.
        """
        key = key, torch.get_num_threads()
        with self._lock:  # or two threads compile the same
            if key not in self._made:
                self._made[key] = self._make(function, examples, differ)
            return self._made[key]

    def _make(
        self,
        function: Callable[..., Any],
        examples: Sequence[Tensor | None],
        differ: Sequence[tuple[int, ...]],
    ) -> Callable[..., Any] | None:
        code = torch.compile(_alone(function), options=_OPTIONS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch's own use of what it has deprecated
                for example, axes in zip(examples, differ, strict=True):
                    if example is not None:
                        torch._dynamo.mark_dynamic(example, axes)
                code(*examples)
        except Exception as error:  # whatever a compiler that is not there raises
            told = str(error).strip().splitlines() or [type(error).__name__]
            log.warning("%s without compiled code, several times slower: %s", self._task, told[-1])
            return None
        return code


def _alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, which torch does not take for another one: it compiles each only eight times."""
    if isinstance(function, MethodType):
        return MethodType(_alone(function.__func__), function.__self__)
    copied = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        argdefs=function.__defaults__,
        closure=function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
