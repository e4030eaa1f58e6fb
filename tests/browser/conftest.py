"""A headless Chromium, where one can be had, and a report to look at in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.shown_report import shown_report

NAMES = ("chromium", "chromium-browser", "google-chrome")


@dataclass(kw_only=True)
class Seen:
    """What a page asked for and complained about while it was looked at."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser: CHROMIUM's, one on the path, or Playwright's own; skips where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install it")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found)
        except api.Error as error:
            pytest.skip(f"no Chromium starts, set CHROMIUM to one: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def look(chromium: Any) -> Iterator[Callable[..., Any]]:
    """look(path, **context) opens a file in a window of its own.

    At the end no page may have asked for anything but its own file, or complained; of `refuses` it
    must have.
    """
    opened: list[tuple[Any, Seen, str, str]] = []

    def open_page(path: Path, *, refuses: str = "", **asked: Any) -> Any:
        asked = {"viewport": {"width": 1400, "height": 900}} | asked
        context = chromium.new_context(**asked)
        context.set_default_timeout(60_000)
        page, seen, url = context.new_page(), Seen(), path.resolve().as_uri()
        page.on("request", lambda one: seen.requests.append(one.url))
        page.on("console", lambda one: seen.complaints.append(f"{one.type}: {one.text}"))
        page.on("pageerror", lambda one: seen.complaints.append(str(one)))
        page.goto(url)
        opened.append((context, seen, url, refuses))
        return page

    yield open_page
    for context, seen, url, refuses in opened:
        context.close()
        outside = [one for one in seen.requests if one != url and not one.startswith("data:")]
        assert not outside
        if refuses:
            assert seen.complaints
        assert not [one for one in seen.complaints if not refuses or refuses not in one]


@pytest.fixture(scope="session")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """(report.html, reference clips, candidate clips) of a report with all in it."""
    folder = tmp_path_factory.mktemp("shown")
    _, reference, candidate = shown_report(folder, 7, every=2)
    return folder / "report.html", reference, candidate
