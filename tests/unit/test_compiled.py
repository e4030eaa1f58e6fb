"""Compiled code: one for each key, whatever the thread, and none where there is no compiler."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from hbxt_compress.algorithms.compiled import Compiled

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="compiled code needs a C++ compiler"
)


def _times(factor: int) -> Callable[[Tensor], Tensor]:
    def scaled(x_N: Tensor) -> Tensor:
        return x_N * factor + 1

    return scaled


@needs_compiler
def test_more_variants_than_torch_keeps_of_one_function_are_compiled_in_any_thread(
    caplog: pytest.LogCaptureFixture,
) -> None:
    code, x_N = Compiled("a test runs"), torch.arange(7.0)
    made = [code.of(k, _times(k), [torch.ones(5)], [(0,)]) for k in range(12)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda one: one(x_N) if one else None, made))
    for k, one in enumerate(found):
        assert one is not None
        assert torch.equal(one, x_N * k + 1)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    again = code.of(3, _times(5), [torch.ones(5)], [(0,)])
    assert again is made[3], "made once by its key"


def test_without_a_compiler_there_is_a_warning_and_no_code(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> object:
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: refuse)
    code = Compiled("what is tested runs")
    for _ in range(2):
        assert code.of("key", _times(2), [torch.ones(5)], [(0,)]) is None
    assert caplog.text.count("what is tested runs without compiled code") == 1
    assert "no working C++ compiler" in caplog.text
