# SPDX-License-Identifier: Apache-2.0
"""Which gateways a replica that leaves waits for."""

from __future__ import annotations

from pools.replica.readers import Readers


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_gateways_that_have_not_let_go() -> None:
    """A gateway may send until it says that it does not; the last word counts."""
    readers = Readers(Clock())
    assert readers.may_send() == 0
    readers.read("a", 0, done=False)
    readers.read("b", 0, done=True)
    assert readers.may_send() == 1
    readers.read("a", 0, done=True)
    readers.read("b", 0, done=False)
    assert readers.may_send() == 1


def test_gateways_that_are_behind() -> None:
    """Those that have not taken the last event."""
    readers = Readers(Clock())
    readers.read("a", 4, done=True)
    readers.read("b", 5, done=True)
    assert [readers.behind(newest) for newest in (4, 5, 6)] == [0, 1, 2]


def test_nobody_waits_for_a_gateway_that_is_gone() -> None:
    """One whose connection broke at once, one that is silent after a while."""
    clock = Clock()
    readers = Readers(clock)
    readers.read("a", 0, done=False)
    readers.read("b", 0, done=False)
    readers.left("a")
    assert readers.may_send() == 1
    clock.now = 13.0
    assert readers.may_send() == 0 and readers.behind(9) == 0
