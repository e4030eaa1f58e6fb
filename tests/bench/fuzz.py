"""Malformed inputs through the command line: a Markdown table of how each kind ended.

    python tests/bench/fuzz.py --n 1000 --seed 1

Each kind runs in a process of its own: one that the system kills, or that hangs outside Python, is
one case that failed, and the next one goes on. Exit code 1 if anything was not as it must be.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch is imported
    os.environ.setdefault(variable, "1")
for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[variable] = "1"

from markdown_table import markdown_table  # noqa: E402

from tests.fuzz.campaign import Outcome, Site, run_case  # noqa: E402
from tests.fuzz.kinds import KINDS  # noqa: E402

__all__ = ["campaign", "rows"]

_SILENT_S = 600.0  # without an outcome: hung where no signal reaches it
_HEAD = ("kind", "cases", "exit codes", "slowest (s)", "tracebacks", "hung", "written outside",
         "other problems")  # fmt: skip


def campaign(root: Path, name: str, n: int, seed: int) -> Iterator[Outcome]:
    """The outcomes of n cases of a kind, as they come."""
    done, context = 0, multiprocessing.get_context("fork")
    while done < n:
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(theirs, root, name, range(done, n), seed))
        worker.start()
        theirs.close()
        why = ""
        while done < n and not why:
            try:
                why = "" if ours.poll(_SILENT_S) else "hung: no signal reached it"
                if not why:
                    yield ours.recv()
                    done += 1
            except EOFError:
                worker.join()
                why = f"died: exit code {worker.exitcode}"
        if why:
            worker.kill()
            yield Outcome(
                kind=name, case=done, file="", command=(), code=None, seconds=0.0, said="",
                problems=(why,),
            )  # fmt: skip
            done += 1
        worker.join()


def _work(to: Connection, root: Path, name: str, cases: Sequence[int], seed: int) -> None:
    kind = next(one for one in KINDS if one.name == name)
    site = Site(root, seed)
    for i in cases:
        to.send(run_case(site, kind, i))
    to.close()


def rows(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, ...]]:
    """A row a kind, and one for all of them."""
    names = list(dict.fromkeys(one.kind for one in outcomes))
    for name in (*names, "all"):
        own = [one for one in outcomes if name in (one.kind, "all")]
        codes = Counter("none" if one.code is None else str(one.code) for one in own)
        found = Counter(_sort(problem) for one in own for problem in one.problems)
        yield (
            name,
            str(len(own)),
            ", ".join(f"{code}: {count}" for code, count in sorted(codes.items())),
            f"{max(one.seconds for one in own):.2f}",
            *(str(found[sort]) for sort in ("traceback", "hung", "wrote", "other")),
        )


def _sort(problem: str) -> str:
    first = problem.split()[0].rstrip(":")
    if first in ("traceback", "hung", "wrote"):
        return first
    return "hung" if first == "took" else "traceback" if first == "died" else "other"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints problems as they come, then the table; 1 if there were any."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--n", type=int, default=1000, help="cases in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=[kind.name for kind in KINDS])
    given = parser.parse_args(arguments)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as root:
        for i, name in enumerate(given.kinds):
            n = given.n // len(given.kinds) + (i < given.n % len(given.kinds))
            for one in campaign(Path(root), name, n, given.seed):
                outcomes.append(one)
                if one.problems:
                    told = "\n  ".join("\n".join(one.problems).splitlines())
                    sys.stdout.write(
                        f"{one.kind} {one.case}: {one.file}: hbxt {' '.join(one.command)}\n"
                        f"  {told}\n  said: {one.said[:600]!r}\n"
                    )
                    sys.stdout.flush()
    sys.stdout.write("\n".join(markdown_table(_HEAD, rows(outcomes), n_words=1)) + "\n")
    return int(any(one.problems for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
