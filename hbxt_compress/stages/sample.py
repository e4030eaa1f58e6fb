"""Sample: the clips that an artifact generates for a suite, by the runtime that users run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from hbxt_compress.artifact import Artifact
from hbxt_compress.clips import ClipSet
from hbxt_compress.machine import Machine
from hbxt_compress.runtime.generate import Runtime
from hbxt_compress.runtime.session import Provider
from hbxt_compress.store import Work

__all__ = ["FACTS", "VERSION", "sample"]

VERSION = 1
FACTS = ("onnxruntime|onnxruntime-rocm|onnxruntime-migraphx", "numpy")
log = logging.getLogger(__name__)


def sample(
    work: Work,
    artifact: Artifact,
    items: Sequence[tuple[str, int]],
    n_steps: int | None,
    on: Machine,
    n_threads: int | None = None,
    provider: Provider = "cpu",
) -> None:
    """Writes the ClipSet of `items`, (prompt, seed) pairs, with the latents after every step.

    n_threads, provider: where that is what clips are to be compared by; else the machine's.

    Unhealthy clips are kept: judging them is the report's job. A killed run goes on with the next
    clip. Ranks share the clips.
    """
    work.expect(len(items))
    with Runtime.open(
        artifact.folder, provider=provider, n_threads=n_threads or on.n_threads, keep=True
    ) as runtime:
        for i, (prompt, seed) in enumerate(items):
            if not work.ranks.owns(i):
                continue
            log.info("sample: %s", prompt, extra={"progress": (i, len(items), "sample")})

            def make(path: Path, prompt: str = prompt, seed: int = seed) -> None:
                runtime.generate(
                    prompt, seed=seed, n_steps=n_steps, keep_latents=True, check=False
                ).save(path)

            work.piece(ClipSet.file_name(i), make)
    work.ranks.barrier()
    if work.ranks.leads:
        ClipSet.seal(work.folder, list(items))
    log.info("sample: done", extra={"progress": (len(items), len(items), "sample")})
