from __future__ import annotations

import io
import logging
import sys

import pytest

from hbxt_compress import progress

_LOG = logging.getLogger("hbxt_compress.test")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _step(done: int, total: int, what: str = "work") -> None:
    _LOG.info("step", extra={"progress": (done, total, what)})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds that progress believes it is; change its only item."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_are_few_and_tell_the_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress.watch(logging.WARNING)
    for done in range(101):
        _step(done, 100)
        clock[0] += 0.5
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "work: 10/100 (5 s, 45 s left)"
    assert lines[-1] == "work: 100/100 (50 s)"
    assert len(lines) == 10


def test_the_same_work_done_again_starts_at_zero(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress.watch(logging.WARNING)
    for _ in range(2):
        _step(0, 2)
        clock[0] += 3
        _step(2, 2)
        clock[0] += 100
    assert capsys.readouterr().err.splitlines() == ["work: 2/2 (3 s)"] * 2


def test_levels_decide_what_else_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    progress.watch(logging.WARNING)
    _LOG.info("detail")
    _LOG.warning("act on %s", "this")
    assert capsys.readouterr().err == "warning: act on this\n"
    progress.watch(logging.INFO)
    _LOG.info("detail")
    assert capsys.readouterr().err == "detail\n"


def test_a_terminal_gets_bars_that_end(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = _Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    progress.watch(logging.WARNING)
    _step(0, 2, "[work]")
    _LOG.warning("mind [this]")
    _step(2, 2, "[work]")
    text = screen.getvalue()
    assert "[work]" in text
    assert "2/2" in text
    assert "mind [this]" in text
    hidden, shown = text.count("\x1b[?25l"), text.count("\x1b[?25h")
    assert hidden == shown == 1, "the cursor was not given back"


def test_an_interrupted_bar_gives_the_cursor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = _Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    progress.watch(logging.WARNING)
    _step(0, 2)
    for handler in logging.getLogger("hbxt_compress").handlers:
        handler.close()
    assert screen.getvalue().endswith("\x1b[?25h")
