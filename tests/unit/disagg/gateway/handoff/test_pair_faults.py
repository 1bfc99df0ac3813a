# SPDX-License-Identifier: Apache-2.0
"""Pairs whose hand-offs fail while both replicas work: taken out of routing, left alone, warmed again."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from disagg.config import GatewayConfig
from disagg.gateway.background import Background
from disagg.gateway.handoff import breaker
from disagg.gateway.handoff.pair_faults import PairFaults
from disagg.gateway.handoff.settling import UnderWay
from disagg.gateway.handoff.transfer import PrefillLeg
from disagg.gateway.replicas.choosing import Reservation
from disagg.gateway.replicas.membership import Membership, Pair
from disagg.observability.metrics import Metrics
from disagg.routing.views import Decision
from pools.engine.base import Message, Receive, Scope, Send
from tests.support.gateway_stack import Hook, Replica, Stack, respond, running_stack, until
from tests.support.replica_clients import lonely_membership
from tests.unit.disagg.gateway.handoff.test_settling import EXPECTED, PROMPT, TRANSPORTS, cutting, is_local, settled
from tests.unit.disagg.gateway.replicas.test_membership import info

OPENED = "disagg_pair_breaker_opened_total"


def handed_by(prefill: Replica, hook: Hook, *, times: int = 1000) -> Hook:
    """The hook for hand-offs from this replica, the engine itself for everything else."""
    left = times

    async def chosen(scope: Scope, receive: Receive, send: Send) -> bool:
        nonlocal left
        if "completions" not in scope["path"] or left <= 0:
            return False
        message = await receive()
        params = json.loads(message["body"]).get("kv_transfer_params") or {}
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return message

        if params.get("remote_engine_id") != prefill.engine.engine_id:
            await _engine_of(scope)(scope, again, send)
            return True
        left -= 1
        return await hook(scope, again, send)

    return chosen


_apps: dict[int, Any] = {}


def _engine_of(scope: Scope) -> Any:
    return _apps[scope["server"][1]]


def failing(decode: Replica, prefill: Replica, hook: Hook, *, times: int = 1000) -> None:
    """Let hand-offs of one pair fail."""
    _apps[int(decode.server.url.rpartition(":")[2])] = decode.engine.own_app
    decode.engine.hook = handed_by(prefill, hook, times=times)


def unread(status: int = 200) -> Hook:
    """An answer whose engine never took the hand-off, so that its server says `unread`."""
    return respond(status, b'{"choices": [{"index": 0, "text": "computed"}]}')


def warm_pairs(stack: Stack) -> set[tuple[str, str]]:
    return {(m.info.replica_id, d) for m in stack.gateway.membership.members("prefill") for d in m.warm_peers}


@pytest.fixture
def long_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "_FIRST_REST_S", 1000.0)
    monkeypatch.setattr(breaker, "_MAX_REST_S", 1000.0)


async def number_settled(stack: Stack, number: int) -> None:
    await until(lambda: len(settled(stack)) == number)


async def complete(stack: Stack, number: int) -> list[Any]:
    return [await stack.complete(PROMPT) for _ in range(number)]


@TRANSPORTS
@pytest.mark.parametrize("fault", ["answers 500", "says unread", "breaks off"])
async def test_the_pair_is_taken_out(transport: Any, fault: str, long_rest: None) -> None:
    """Three failures of one pair: it carries no more, and other pairs of the same replicas go on."""
    async with running_stack(num_prefill=2, num_decode=2, transport=transport) as stack:
        p0, d0 = stack.prefill[0], stack.decode[0]
        hooks = {"answers 500": respond(500), "says unread": unread(), "breaks off": cutting(d0, kill=False)}
        failing(d0, p0, hooks[fault])
        # Each fourth is the pair's; what was said of one is known before the next.
        for number in range(1, 4):
            await complete(stack, 4)
            await number_settled(stack, number)
        await until(lambda: stack.metric(OPENED) == 1)
        assert warm_pairs(stack) == {("p0", "d1"), ("p1", "d0"), ("p1", "d1")}
        replies = await complete(stack, 6)
        assert [reply.text for reply in replies] == [EXPECTED] * 6
        pairs = {(r.headers["x-disagg-prefill"], r.headers["x-disagg-decode"]) for r in replies}
        assert pairs == warm_pairs(stack)
        assert len(d0.engine.probes) == 2


async def test_a_success_resets_it(long_rest: None) -> None:
    """Two failures, a hand-off that works, two failures: nobody is to blame."""
    async with running_stack() as stack:
        for _ in range(2):
            failing(stack.decode[0], stack.prefill[0], respond(500), times=2)
            replies = await complete(stack, 3)
            assert [is_local(reply) for reply in replies] == [True, True, False]
        assert not stack.metric(OPENED)
        failing(stack.decode[0], stack.prefill[0], respond(500), times=3)
        await complete(stack, 3)
        assert stack.metric(OPENED) == 1


async def test_it_is_warmed_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """After its rest the pair moves KV again and is used; it is told of once, however often it opens."""
    monkeypatch.setattr(breaker, "_FIRST_REST_S", 0.05)
    with caplog.at_level(logging.WARNING, logger="disagg.gateway.handoff.pair_faults"):
        async with running_stack() as stack:
            for round_ in (1, 2):
                failing(stack.decode[0], stack.prefill[0], respond(500), times=3)
                assert all(map(is_local, await complete(stack, 3)))
                assert stack.gateway.membership.num_warm_pairs() == 0
                assert is_local((await complete(stack, 1))[0])
                await until(lambda: stack.gateway.membership.num_warm_pairs() == 1)
                assert len(stack.decode[0].engine.probes) == 1 + round_
                assert not is_local((await complete(stack, 1))[0])
            assert stack.metric(OPENED) == 2
            assert stack.metric("disagg_local_prefills_total", reason="no_warm_pair") == 2
    assert len([r for r in caplog.records if r.name == "disagg.gateway.handoff.pair_faults"]) == 1


@TRANSPORTS
async def test_what_the_gateway_gave_up_is_nobodys_fault(transport: Any, long_rest: None) -> None:
    """Clients that leave, refusals and dead prefill replicas make engines say `unread`, and no breaker counts it."""
    async with running_stack(transport=transport) as stack:
        failing(stack.decode[0], stack.prefill[0], respond(400))
        for reply in await complete(stack, 4):
            assert reply.status == 400
        came = asyncio.Event()

        async def hang(scope: Scope, receive: Receive, send: Send) -> bool:
            came.set()
            while (await receive())["type"] != "http.disconnect":
                pass
            return True

        failing(stack.decode[0], stack.prefill[0], hang)
        for number in range(1, 5):
            came.clear()
            async with stack.streaming() as connection:
                await until(came.is_set)
                connection.leave()
                # Nobody but the engine's own word settles these.
                await number_settled(stack, 4 + number)
        failing(stack.decode[0], stack.prefill[0], unread(), times=0)
        stack.prefill[0].engine.hook = respond(500)
        assert all(map(is_local, await complete(stack, 4)))
        assert not stack.metric(OPENED) and stack.gateway.membership.num_warm_pairs() == 1


@TRANSPORTS
async def test_a_dead_decode_replica_is_its_own_fault(transport: Any, long_rest: None) -> None:
    """Hand-offs that break off because the process is gone open no breaker."""
    async with running_stack(num_decode=2, transport=transport, config=GatewayConfig(max_attempts=9)) as stack:
        held = asyncio.Event()
        came: list[int] = []

        async def hold(scope: Scope, receive: Receive, send: Send) -> bool:
            came.append(1)
            await held.wait()
            return True

        failing(stack.decode[0], stack.prefill[0], hold)
        running = [asyncio.create_task(stack.complete(PROMPT)) for _ in range(8)]
        await until(lambda: len(came) == 4)
        stack.decode[0].kill()
        held.set()
        assert [(await reply).text for reply in running] == [EXPECTED] * 8
        await until(lambda: len(settled(stack)) == 4)
        assert not stack.metric(OPENED)


async def test_primed_probes_count_as_well(long_rest: None) -> None:
    """A pair that fails to move the KV of requests with `n` is taken out like any other."""
    async with running_stack() as stack:

        async def refuse(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no")

        stack.decode[0].engine.probe = refuse  # type: ignore[method-assign]
        for _ in range(3):
            assert (await stack.complete(PROMPT, n=2)).text == EXPECTED
        await until(lambda: stack.metric(OPENED) == 1)
        assert stack.gateway.membership.num_warm_pairs() == 0


async def alone() -> tuple[Membership, PairFaults, Metrics, Background]:
    """One pair without engines."""
    membership, metrics, background = lonely_membership(), Metrics(), Background()
    membership.replace("prefill", [info("p0", "p0-1")])
    membership.replace("decode", [info("d0", "d0-1")])
    return membership, PairFaults(membership, metrics, background), metrics, background


def begun(handoff_id: str, pair: Pair) -> UnderWay:
    """A hand-off of the pair whose prefill leg is not over."""
    task: Any = asyncio.get_running_loop().create_future()
    reservation = Reservation(Decision("handoff"), pair.prefill, pair.decode)
    return UnderWay(pair, PrefillLeg(handoff_id, pair.prefill, task), 0.0, reservation)


async def test_failures_under_way_when_it_opens_open_it_once(long_rest: None) -> None:
    """Nine hand-offs of one pair fail: three open its breaker, and what is said while the pair rests is not counted."""
    membership, faults, metrics, background = await alone()
    [pair] = membership.cold_pairs()
    under_way = [begun(f"h{i}", pair) for i in range(9)]
    for each in under_way:
        faults.begin(each)
    for each in under_way[:6]:
        faults.unread(each.leg.handoff_id)
    for each in under_way[6:]:
        faults.failed(each)
    assert metrics.registry.get_sample_value(OPENED) == 1
    assert membership.is_resting(pair)
    await background.close(0)


@pytest.mark.parametrize("gone", ["no", "unreachable", "quarantined", "replaced"])
async def test_unread_is_the_fault_of_a_prefill_replica_that_is_gone(gone: str, long_rest: None) -> None:
    """Only of one that works it says something of the pair."""
    membership, faults, metrics, background = await alone()
    [pair] = membership.cold_pairs()
    if gone == "unreachable":
        membership.mark_unreachable(pair.prefill)
    elif gone == "quarantined":
        membership.quarantine(pair.prefill, "hang")
    elif gone == "replaced":
        membership.replace("prefill", [info("p0", "p0-2")])
    for i in range(3):
        faults.begin(begun(f"h{i}", pair))
        faults.unread(f"h{i}")
    assert metrics.registry.get_sample_value(OPENED) == (gone == "no")
    await background.close(0)


@TRANSPORTS
async def test_a_request_that_fails_everywhere_says_nothing_of_the_pair(transport: Any, long_rest: None) -> None:
    """Decode answers 5xx to the hand-off, and to the same request without it."""
    async with running_stack(transport=transport, config=GatewayConfig(prefill_alone_tokens=0)) as stack:
        stack.decode[0].engine.hook = respond(500)
        for reply in await complete(stack, 4):
            assert reply.status == 500
        await number_settled(stack, 4)
        assert not stack.metric(OPENED) and stack.gateway.membership.num_warm_pairs() == 1


async def test_a_primed_request_that_fails_everywhere_says_nothing_of_the_pair(long_rest: None) -> None:
    """Neither its probes nor the request itself go through."""
    async with running_stack(config=GatewayConfig(prefill_alone_tokens=0)) as stack:

        async def refuse(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no")

        stack.decode[0].engine.probe = refuse  # type: ignore[method-assign]
        stack.decode[0].engine.hook = respond(500)
        for _ in range(4):
            assert (await stack.complete(PROMPT, n=2)).status == 500
        await number_settled(stack, 4)
        assert not stack.metric(OPENED) and stack.gateway.membership.num_warm_pairs() == 1
