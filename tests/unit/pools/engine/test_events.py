# SPDX-License-Identifier: Apache-2.0
"""The event log: numbering, waiting, and what a reader that is behind has lost."""

from __future__ import annotations

import asyncio

import pytest

from pools.engine.events import Batch, EventLog


def events(*numbers: int) -> list[dict[str, int]]:
    return [{"n": number} for number in numbers]


def log_of(count: int, max_events: int = 10) -> EventLog:
    log = EventLog(max_events)
    for number in range(1, count + 1):
        log.append({"n": number})
    return log


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (0, Batch(7, 4, events(5, 6, 7))),
        (3, Batch(7, 1, events(5, 6, 7))),
        (4, Batch(7, 0, events(5, 6, 7))),
        (6, Batch(7, 0, events(7))),
        (7, Batch(7, 0, [])),
    ],
)
async def test_reading_a_full_ring(after: int, expected: Batch) -> None:
    """Seven events in a ring of three: whoever is behind is told how many it missed."""
    assert await log_of(7, max_events=3).read(after, 0) == expected


async def test_an_empty_log() -> None:
    assert await EventLog().read(0, 0) == Batch(0, 0, [])


async def test_a_number_of_an_earlier_incarnation_reads_from_the_start() -> None:
    """A reader that knows a longer log misses nothing of the new one."""
    assert await log_of(2).read(900, 5) == Batch(2, 0, events(1, 2))


async def test_a_reader_is_woken() -> None:
    """All waiting readers get the event that ends their wait, long before the wait is over."""
    log = log_of(1)
    readers = [asyncio.create_task(log.read(1, 30)) for _ in range(2)]
    await asyncio.sleep(0)
    log.append({"n": 2})
    async with asyncio.timeout(1):
        assert await asyncio.gather(*readers) == [Batch(2, 0, events(2))] * 2


async def test_a_wait_ends_empty() -> None:
    """Nothing new within the wait is an empty batch that changes no number."""
    assert await log_of(3).read(3, 0.01) == Batch(3, 0, [])


async def test_a_reader_that_leaves_wakes_nobody_else() -> None:
    """A cancelled reader does not break the wait of another."""
    log = EventLog()
    leaving, staying = (asyncio.create_task(log.read(0, 30)) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.sleep(0)
    log.append({"n": 1})
    async with asyncio.timeout(1):
        assert await staying == Batch(1, 0, events(1))
