# SPDX-License-Identifier: Apache-2.0
"""Which hand-offs an engine takes, and what it says of those that it never had."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pools.engine.base import HANDOFF_HEADER, ASGIApp, Receive, Scope, Send
from pools.engine.events import EventLog
from pools.engine.handoffs import Admissions, ConsumedHandoff, consumed_by
from pools.errors import HandoffRefusedError
from transport.handoff_params import DO_REMOTE_DECODE, DO_REMOTE_PREFILL, HANDOFF_ID

ONE = ConsumedHandoff("e-1/r-1", "h-1")
SCOPE = {"type": "http", "headers": [(b"host", b"x"), (HANDOFF_HEADER.encode(), b"h-1")]}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (None, None),
        ({DO_REMOTE_DECODE: True, "remote_request_id": "r"}, None),
        ({DO_REMOTE_PREFILL: True, "remote_engine_id": "e", "remote_request_id": "r"}, ConsumedHandoff("e/r", "r")),
        ({DO_REMOTE_PREFILL: True, "remote_engine_id": "e", "transfer_id": "t"}, ConsumedHandoff("e/t", "t")),
        (
            {DO_REMOTE_PREFILL: True, "remote_engine_id": "e", "remote_request_id": "r", HANDOFF_ID: "h"},
            ConsumedHandoff("e/r", "h"),
        ),
    ],
)
def test_names(params: Any, expected: ConsumedHandoff | None) -> None:
    """A hand-off is told apart by vLLM's ids and known by the gateway's, where there is one."""
    assert consumed_by(params) == expected


class Watched:
    """Hand-offs, their events, and an app over them that does what a test says."""

    def __init__(self) -> None:
        self.log = EventLog()
        self.handoffs = Admissions(self.log)

    async def leg(self, app: ASGIApp, scope: Any = SCOPE) -> None:
        async def nothing(*args: Any) -> Any:
            return {}

        await self.handoffs.watch(app)(scope, nothing, nothing)

    @property
    def unread(self) -> list[str]:
        return [event["id"] for event in self.log._events if event["kind"] == "unread"]


async def refused(scope: Scope, receive: Receive, send: Send) -> None:
    """A leg that ends in the HTTP server."""


async def test_a_leg_that_is_refused() -> None:
    """Told once, however often it comes, and never admitted after that."""
    it = Watched()
    await it.leg(refused)
    await it.leg(refused)
    assert it.unread == ["h-1"]
    with pytest.raises(HandoffRefusedError, match="given up"):
        it.handoffs.admit(ONE)
    assert it.handoffs.num_admitted == 0


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError])
async def test_a_leg_that_breaks_off(error: type[BaseException]) -> None:
    """The error goes on, and the hand-off is told."""
    it = Watched()

    async def broken(*args: Any) -> None:
        raise error

    with pytest.raises(error):
        await it.leg(broken)
    assert it.unread == ["h-1"]


@pytest.mark.parametrize("error", [None, asyncio.CancelledError])
async def test_a_leg_that_is_admitted(error: type[BaseException] | None) -> None:
    """Its end is the scheduler's to tell, also when another leg with the same name is refused."""
    it = Watched()

    async def admitted(*args: Any) -> None:
        it.handoffs.admit(ONE)
        if error is not None:
            raise error

    try:
        await it.leg(admitted)
    except asyncio.CancelledError:
        assert error is not None
    await it.leg(refused)
    assert it.unread == []
    with pytest.raises(HandoffRefusedError, match="admitted before"):
        it.handoffs.admit(ONE)
    assert it.handoffs.num_admitted == 1


async def test_a_leg_that_the_engine_refuses() -> None:
    """An admission that was taken back counts as none."""
    it = Watched()

    async def forgotten(*args: Any) -> None:
        it.handoffs.admit(ONE)
        it.handoffs.forget(ONE)

    await it.leg(forgotten)
    assert it.unread == ["h-1"] and it.handoffs.num_admitted == 0


async def test_a_leg_told_before_its_end() -> None:
    """A refusal that comes after its caller has left is told by whoever sees it, and once."""
    it = Watched()

    async def late(*args: Any) -> None:
        it.handoffs.admit(ONE)
        it.handoffs.forget(ONE)
        it.handoffs.give_up(ONE.id)

    await it.leg(late)
    assert it.unread == ["h-1"]


@pytest.mark.parametrize("scope", [{"type": "http", "headers": [(b"host", b"x")]}, {"type": "lifespan"}])
async def test_without_a_header(scope: Any) -> None:
    """Nothing is told of other requests."""
    it = Watched()
    await it.leg(refused, scope)
    assert it.unread == []


def test_refused_by_the_server() -> None:
    """Parameters of a request that vLLM's server refused are used up."""
    handoffs = Admissions(EventLog())
    handoffs.refuse(ONE)
    with pytest.raises(HandoffRefusedError, match="refused before"):
        handoffs.admit(ONE)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are forgotten."""
    monkeypatch.setattr("pools.engine.handoffs._MAX_REMEMBERED", 4)
    handoffs = Admissions(EventLog())
    for number in range(9):
        handoffs.admit(ConsumedHandoff(f"e/{number}", f"h-{number}"))
        handoffs.give_up(f"g-{number}")
    assert len(handoffs._admitted) == len(handoffs._ids) == 4
    handoffs.admit(ConsumedHandoff("e/0", "h-0"))
