"""Every test runs offline, from fixed seeds, on one thread, with a time limit set by its folder."""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch is imported
    os.environ.setdefault(variable, "1")
for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[variable] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["MPLBACKEND"] = "agg"

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job, and its children
    signal.signal(signal.SIGINT, signal.default_int_handler)

_TESTS = Path(__file__).parent
_LIMIT_S = {
    ".": 300, "unit": 120, "fuzz": 120, "shelves": 120, "runtime": 120, "pipeline": 300,
    "browser": 120, "gpu": 600,
}  # fmt: skip
_SEED = 0
_connect = socket.socket.connect


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives every test its folder's time limit; a folder without one stops the run."""
    for item in items:
        parts = item.path.relative_to(_TESTS).parts
        folder = parts[0] if len(parts) > 1 else "."
        if folder not in _LIMIT_S:
            raise pytest.UsageError(f"tests/{folder}: no time limit in tests/conftest.py")
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(_LIMIT_S[folder]))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to anything but this machine fails the test at once."""

    def connect(self: socket.socket, address: object) -> None:
        local = self.family == socket.AF_UNIX or (
            isinstance(address, tuple) and str(address[0]) in ("127.0.0.1", "::1", "localhost")
        )
        if not local:
            raise OSError(f"tests are offline; something connects to {address!r}")
        _connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prompts are not kept in the cache of whoever runs the tests."""
    monkeypatch.setenv("HBXT_CACHE", str(tmp_path_factory.getbasetemp() / "prompts"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Third-party code may draw from the global generators; ours never does."""
    random.seed(_SEED)
    np.random.seed(_SEED)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The command line configures the package's logger; every test starts with a bare one."""
    yield
    log = logging.getLogger("hbxt_compress")
    log.handlers, log.propagate = [], True
    log.setLevel(logging.NOTSET)


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator that gives the same numbers in every run."""
    return np.random.default_rng(_SEED)


@pytest.fixture
def store_root(tmp_path: Path) -> Path:
    """An empty folder for a result store."""
    return tmp_path / "store"


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The folder with pyproject.toml."""
    return _TESTS.parent


@pytest.fixture(scope="session")
def micro_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WanPipeline folder with random weights; tests that change it copy it first."""
    from tests.micro import write_micro_wan  # heavy: torch and diffusers

    return write_micro_wan(tmp_path_factory.mktemp("micro") / "wan")


@pytest.fixture(scope="session")
def shared_data(checkout: Path) -> Path:
    """The folder of clips, images and prompts that some tests compare with; skips without it."""
    given = os.environ.get("HBXT_SHARED_DATA")
    folder = Path(given) if given else checkout.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set HBXT_SHARED_DATA to the folder that has it")
    return folder
