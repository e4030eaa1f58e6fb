"""Ranks of one run, forked from the process that tests."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

from hbxt_compress.ranks import Ranks

__all__ = ["free_port", "play"]


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def play(world: int, folder: Path, part: Callable[[Ranks], object]) -> list[object]:
    """What each rank's part returns, by rank; None of one that was killed."""
    port, children = free_port(), []
    paths = [folder / f"rank-{rank}" for rank in range(world)]
    for rank, path in enumerate(paths):
        path.unlink(missing_ok=True)
        if not (child := os.fork()):
            _play_one(rank, world, port, path, part)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(codes) <= {0, -signal.SIGKILL}, codes
    return [pickle.loads(path.read_bytes()) if path.exists() else None for path in paths]


def _play_one(
    rank: int, world: int, port: int, result: Path, part: Callable[[Ranks], object]
) -> None:
    code = 1
    try:
        numbers = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_PORT": port}
        # The store that brings ranks together reads the environment itself.
        os.environ |= {name: str(n) for name, n in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
        ranks = Ranks.joined()
        found = part(ranks)
        ranks.end()
        result.write_bytes(pickle.dumps(found))
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)
