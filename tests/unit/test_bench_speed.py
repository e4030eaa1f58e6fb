"""What the speed bench says of times that are known."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from speed import compete, table

SECONDS = {"torch eager": [4.0, 8.0, 6.0], "fast": [2.0, 2.0, 1.0], "slow": [8.0, 8.0, 12.0]}


class Machine:
    """A clock that runs only while somebody works, and who worked in which order."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, list[str]()
        self._left: dict[str, Iterator[float]] = {k: iter(v) for k, v in SECONDS.items()}

    def clock(self) -> float:
        return self.now

    def work(self, name: str) -> None:
        self.order.append(name)
        self.now += next(self._left[name])


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_ratios_are_of_the_same_round_and_turns_change(machine: Machine) -> None:
    runs = {name: lambda name=name: machine.work(name) for name in SECONDS}
    rows = compete("a step", runs, 3, machine.clock)
    assert {row.who: list(row.seconds) for row in rows} == SECONDS
    assert [row.faster for row in rows] == [(1, 1, 1), (4, 2, 6), (0.5, 0.5, 1)]
    assert machine.order == [
        "torch eager", "fast", "slow", "fast", "slow", "torch eager", "slow", "torch eager", "fast",
    ]  # fmt: skip


def test_the_table_has_medians_and_ranges(machine: Machine) -> None:
    runs = {name: lambda name=name: machine.work(name) for name in SECONDS}
    rows = compete("a step", runs, 3, machine.clock)
    lines = table(rows)
    assert lines[3] == "| a step | fast | 2.000 | 1.000..2.000 | 4.00 | 2.00..6.00 |"
    assert len(lines) == 2 + len(SECONDS)
    document = rows[1].to_json()
    assert (document["median_s"], document["faster"]) == (2, {"median": 4, "least": 2, "most": 6})
