"""Ranks: the processes of one run, as `torchrun` starts them, and what they do together.

    torchrun --nproc-per-node 2 -m hbxt_compress quantize ...

All ranks make the same calls in the same order. Every one says that it is there, twice a second; so
when one is gone the others can tell which, instead of waiting. They share a file system.
"""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, cast

from hbxt_compress.errors import RankLost, UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ALONE", "Ranks"]

T = TypeVar("T")
_PULSE_S = 0.5
_SILENT_S = 5.0  # without a pulse, once a connection broke or this process is to stop
_HUNG_S = 300.0  # without a pulse otherwise: a machine without power closes no connection
_GRACE_S = 2.0  # for what a rank sent just before it ended
_CHECK_EVERY_S = 1.0
_STEP_S: Final = (1e-4, 0.05)  # between two looks at what is being sent, growing
_NO_LIMIT: Final = timedelta(days=30)  # one rank may work for hours while the others wait


class Ranks:
    """One process of `world`, the one with number `rank`; `local` is its number on its machine."""

    def __init__(self, rank: int = 0, world: int = 1, local: int = 0) -> None:
        self.rank, self.world, self.local = rank, world, local
        self._others: _Others | None = None

    @classmethod
    def joined(cls, environment: Mapping[str, str] | None = None) -> Ranks:
        """The ranks that the environment tells of, as torchrun sets it; waits for all of them.

        Without RANK and WORLD_SIZE, or with one rank, nothing is started.

        Raises:
            UsageError: variables are missing or no numbers.
        """
        given = os.environ if environment is None else environment
        if given.get("WORLD_SIZE", "1") == "1":
            return ALONE
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in given]
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        numbers = [given.get(name, "0") for name in names]
        if missing or not all(one.isdecimal() for one in numbers):
            told = ", ".join(f"{n}={o!r}" for n, o in zip(names, numbers, strict=True))
            raise UsageError(
                f"WORLD_SIZE asks for several ranks, but of {told} one is no number, or "
                f"{', '.join(missing) or 'none'} is missing; start them with torchrun"
            )
        # Else torch prints a stack for every connection that ends, before we can say what it was.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        ranks = cls(*map(int, numbers))
        ranks._others = _Others(ranks.rank, ranks.world)
        return ranks

    @property
    def leads(self) -> bool:
        """Whether this is rank 0: it locks, seals, prints, and does what only one can do."""
        return self.rank == 0

    def owns(self, index: int) -> bool:
        """Whether a piece of work that needs one rank is this one's: they go round."""
        return index % self.world == self.rank

    def share(self, items: Sequence[T]) -> list[T]:
        """Those of the items that are this rank's."""
        return list(items[self.rank :: self.world])

    def device(self, name: str) -> str:
        """The torch device that a rank computes on: of `cuda` (ROCm too) each rank its own.

        Raises:
            UsageError: there is no such device, or it would be several ranks'.
        """
        import torch

        try:
            kind, index = torch.device(name).type, torch.device(name).index
        except RuntimeError:
            raise UsageError(
                f"--device {name}: torch knows no such device; say cpu or cuda"
            ) from None
        if kind != "cuda":
            return name
        n = torch.cuda.device_count()
        if index is not None and self.world > 1:
            raise UsageError(f"--device {name}: every rank takes its own; say --device cuda")
        wanted = self.local if index is None else index
        if wanted >= n:
            who = f"rank {self.rank} needs" if self.world > 1 else "asks for"
            raise UsageError(
                f"--device {name}: {who} GPU {wanted}, this machine has {n} of them; start as many "
                "ranks as there are, or say --device cpu"
            )
        torch.cuda.set_device(wanted)
        return f"cuda:{wanted}"

    def barrier(self) -> None:
        """Returns once all ranks have come here."""
        self.gathered(None)

    def broadcast(self, thing: T, source: int = 0) -> T:
        """What the rank `source` gives; of the others what they give is not looked at.

        Tensors arrive on the CPU or, if they were sent from a GPU, on that of the rank.
        """
        return thing if self._others is None else cast(T, self._others.broadcast(thing, source))

    def gathered(self, thing: T) -> list[T]:
        """What each rank gives, by rank."""
        return [thing] if self._others is None else self._others.gathered(thing)

    def by_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, while the others wait for it."""
        return self.broadcast(cast(T, make() if self.leads else None))

    def spread(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """What all tasks return, each done by one rank."""
        own = {i: task() for i, task in enumerate(tasks) if self.owns(i)}
        done: dict[int, T] = {}
        for part in self.gathered(own):
            done |= part
        return [done[i] for i in range(len(tasks))]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' tensors of one shape, the same bits on all; made in place."""
        return tensor if self._others is None else self._others.reduced(tensor, "SUM")

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest of all ranks', number by number; made in place."""
        return tensor if self._others is None else self._others.reduced(tensor, "MAX")

    def lost(self) -> RankLost | None:
        """The error to end with if another rank has gone without a word; takes some seconds."""
        gone = [] if self._others is None else self._others.silent()
        return self._others.error(gone) if self._others is not None and gone else None

    def first_to_tell(self) -> bool:
        """Whether no rank has told an error before: the same one often strikes all of them."""
        return self._others is None or self._others.first_to_tell()

    def end(self) -> None:
        """Says that this rank ends as it should, or has told why not."""
        if self._others is not None:
            self._others.end()


ALONE: Final = Ranks()
"""A run of one process."""


class _Sent(Protocol):
    """What torch.distributed returns for what it has begun."""

    def is_completed(self) -> bool: ...
    def wait(self) -> object: ...


class _Others:
    """The other ranks, by way of torch.distributed.

    Nothing in here waits inside of torch, where no signal would reach this process.
    """

    def __init__(self, rank: int, world: int) -> None:
        import torch
        from torch import distributed
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        self._rank, self._world = rank, world
        store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(minutes=10))))
        self._store = PrefixStore("hbxt", store)
        self._store.set(f"pulse {rank}", "0")
        both = torch.cuda.is_available() and distributed.is_nccl_available()
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if both else "gloo",
            store=self._store, rank=rank, world_size=world, timeout=_NO_LIMIT,
        )  # fmt: skip
        self._ended = threading.Event()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._checked = time.monotonic()
        threading.Thread(target=self._beat, daemon=True).start()
        self.gathered(None)  # connects everybody

    def _beat(self) -> None:
        n = 0
        with suppress(RuntimeError):  # who keeps the store is gone, and the run with it
            while not self._ended.wait(_PULSE_S):
                n += 1
                self._store.set(f"pulse {self._rank}", str(n))

    def broadcast(self, thing: object, source: int) -> Any:
        import torch

        own = _packed(thing) if source == self._rank else b""
        size = torch.tensor([len(own)])
        self._done("broadcast", size, src=source)
        content = _bytes(own, int(size))
        self._done("broadcast", content, src=source)
        return thing if source == self._rank else _unpacked(content)

    def gathered(self, thing: T) -> list[T]:
        import torch

        own = _packed(thing)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self._world)]
        self._done("all_gather", sizes, torch.tensor([len(own)]))
        most = max(int(size) for size in sizes)
        contents = [torch.empty(most, dtype=torch.uint8) for _ in range(self._world)]
        self._done("all_gather", contents, _bytes(own, most))
        return [
            thing if k == self._rank else _unpacked(one[: int(size)])
            for k, (one, size) in enumerate(zip(contents, sizes, strict=True))
        ]

    def reduced(self, tensor: Tensor, how: str) -> Tensor:
        from torch import distributed

        self._done("all_reduce", tensor, op=getattr(distributed.ReduceOp, how))
        return tensor

    def _done(self, call: str, *arguments: object, **options: object) -> None:
        """Begins what torch.distributed calls so, and looks now and then whether it is done."""
        from torch import distributed

        try:
            sent: _Sent = getattr(distributed, call)(*arguments, **options, async_op=True)
            step_s = _STEP_S[0]
            while not sent.is_completed():
                time.sleep(step_s)
                step_s = min(2 * step_s, _STEP_S[1])
                self._require_all(sent)
            sent.wait()
        except RuntimeError as error:
            raise self.error(self.silent()) from error

    def _require_all(self, sent: _Sent) -> None:
        if (now := time.monotonic()) - self._checked < _CHECK_EVERY_S:
            return
        self._checked = now
        ended = [k for k in self._peers() if self._store.check([f"ended {k}"])]
        if ended:
            until = now + _GRACE_S
            while not sent.is_completed():
                if time.monotonic() > until:
                    raise self.error(ended)
                time.sleep(_STEP_S[1])
        hung = [k for k in self._peers() if self._silence_s(k) > _HUNG_S]
        if hung:
            raise self.error(hung)

    def silent(self) -> list[int]:
        """The ranks that have gone without a word; waits for a pulse of each of the others."""
        until, open_ = time.monotonic() + _SILENT_S, self._peers()
        try:
            before = {k: self._store.get(f"pulse {k}") for k in open_}
            while open_ and time.monotonic() < until:
                time.sleep(_PULSE_S / 5)
                open_ = [
                    k
                    for k in open_
                    if not self._store.check([f"ended {k}"])
                    and self._store.get(f"pulse {k}") == before[k]
                ]
        except RuntimeError:  # who keeps the store is gone
            return [] if _torchrun_keeps_the_store() else [0]
        return open_

    def error(self, gone: Sequence[int]) -> RankLost:
        """What tells that these ranks are gone; [] if all are there, and still one broke off."""
        who = ", ".join(map(str, gone))
        what = (
            f"rank {who} of {self._world} is gone, killed or with its machine"
            if gone
            else f"the connection between {self._world} ranks broke, or torchrun has ended"
        )
        return RankLost(f"{what}; the run goes on with any number of ranks (torchrun)")

    def first_to_tell(self) -> bool:
        try:
            return int(self._store.add("told", 1)) == 1
        except RuntimeError:
            return True

    def end(self) -> None:
        self._ended.set()
        with suppress(RuntimeError):
            self._store.set(f"ended {self._rank}", "")
            # Without torchrun rank 0 keeps the store, which the others need to say as much.
            if self._rank == 0 and not _torchrun_keeps_the_store():
                until = time.monotonic() + _SILENT_S
                while time.monotonic() < until and not self._all_ended():
                    time.sleep(_STEP_S[1])

    def _all_ended(self) -> bool:
        return all(self._store.check([f"ended {k}"]) for k in self._peers())

    def _peers(self) -> list[int]:
        return [k for k in range(self._world) if k != self._rank]

    def _silence_s(self, rank: int) -> float:
        """How long it is that a rank's pulse was seen to change."""
        pulse, now = self._store.get(f"pulse {rank}"), time.monotonic()
        if self._seen.get(rank, (b"", now))[0] != pulse:
            self._seen[rank] = pulse, now
        return now - self._seen[rank][1]


def _torchrun_keeps_the_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _packed(thing: object) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def _unpacked(content: Tensor) -> Any:
    import torch

    return torch.load(
        io.BytesIO(content.numpy().tobytes()),
        map_location=_at_home,
        weights_only=False,  # it was packed by this very run
    )


def _at_home(storage: Any, place: str) -> Any:
    """A tensor's memory on the device of this rank."""
    return storage if place == "cpu" else storage.cuda()


def _bytes(content: bytes, size: int) -> Tensor:
    """uint8 of that size, beginning with the content."""
    import torch

    whole = torch.zeros(size, dtype=torch.uint8)
    if content:
        whole[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return whole
