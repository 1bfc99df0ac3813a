# SPDX-License-Identifier: Apache-2.0
"""How a replica keeps its node's cache server, whatever its event loop does. Without Ray."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable

import pytest

from pools.cache_server.policy import Leases, LeaseTimes
from pools.cache_server.renewal import Renewal, State


async def test_a_replica_whose_event_loop_is_blocked_keeps_its_server() -> None:
    """vLLM blocks the loop while an engine starts. Blocked for longer than lease and grace, the lease still runs."""
    times = LeaseTimes(renew_period_s=0.02, lease_s=0.5, grace_s=0.3)
    leases = Leases(idle_since=time.monotonic(), times=times)

    def renew() -> State:
        leases.renew("a", time.monotonic())
        return "healthy"

    leases.renew("a", time.monotonic())
    renewal = Renewal(renew, lambda: None, period_s=times.renew_period_s)
    renewal.start()
    time.sleep(1.5)  # noqa: ASYNC251  # to block the loop is the point
    assert not leases.over(time.monotonic(), unwanted=True)
    await asyncio.to_thread(renewal.stop, 5.0)
    leases.release("a", time.monotonic())
    await asyncio.sleep(0.1)
    assert leases.num_users(time.monotonic()) == 0, "a stopped one renews nothing"


def test_no_exception_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    """What a renewal or a search raises is told once an outage, and the next renewal comes."""
    states: list[Callable[[], State]] = [_raise, _lost, _raise, _healthy, _lost, _healthy]
    renewal = Renewal(lambda: states.pop(0)(), _raise, period_s=0.001)
    with caplog.at_level(logging.INFO, logger="pools.cache_server.renewal"):
        for _ in range(6):
            renewal.once()
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "INFO", "WARNING", "INFO"], "each outage begins and ends once"


def _raise() -> State:
    raise RuntimeError("no")


def _lost() -> State:
    return "lost"


def _healthy() -> State:
    return "healthy"


def test_the_thread_goes_on_after_exceptions_and_ends_with_the_process() -> None:
    """It is a daemon, and it renews again after an exception."""
    renewed, calls = threading.Event(), []

    def renew() -> State:
        calls.append(1)
        if len(calls) < 3:
            raise RuntimeError("no")
        renewed.set()
        return "healthy"

    renewal = Renewal(renew, _raise, period_s=0.001)
    renewal.start()
    assert renewed.wait(5)
    assert [t.daemon for t in threading.enumerate() if t.name == "cache-server-renewal"] == [True]
    renewal.stop(5)
    assert "cache-server-renewal" not in [t.name for t in threading.enumerate()]


def test_a_server_that_does_not_come_back_is_not_made_again_at_once() -> None:
    """With its port taken, each new actor starts, fails and is lost: the tries are a minute apart in the end. A server
    that answers is a new beginning."""
    states: list[State] = [*(["lost", "starting"] * 7), "healthy", "lost"]
    found = []
    renewal = Renewal(lambda: states.pop(0), lambda: found.append(1), period_s=3.0)
    waits = [renewal.once() for _ in range(len(states))]
    assert waits[0:14:2] == [3, 6, 12, 24, 48, 60, 60]
    assert waits[-1] == 3 and len(found) == 8
