# SPDX-License-Identifier: Apache-2.0
"""Slow and lost prefill replicas: deadlines, retries and hedging, with either transport."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from disagg.config import AppConfig, GatewayConfig
from disagg.gateway.handoff.deadline import LocalRate
from pools.engine.base import Receive, Scope, Send
from tests.support.gateway_stack import Replica, Stack, respond, running_stack, until
from tests.unit.disagg.gateway.handoff.test_settling import (
    EXPECTED,
    PROMPT,
    TRANSPORTS,
    cutting,
    hang,
    is_local,
    once,
    outcomes,
    settled,
)


class Held:
    """Prefill legs that wait until they are let go, and those that came."""

    def __init__(self, *replicas: Replica) -> None:
        self.go_on = asyncio.Event()
        self.came: list[Replica] = []
        for replica in replicas:
            replica.engine.hook = self._hook(replica)

    def _hook(self, replica: Replica) -> Any:
        async def hook(scope: Scope, receive: Receive, send: Send) -> bool:
            if "completions" in scope["path"]:
                self.came.append(replica)
                await self.go_on.wait()
            return False

        return hook


def first_hangs(stack: Stack, replicas: list[Replica]) -> list[Replica]:
    """Whichever of these gets the next leg says nothing; it is in the returned list then."""
    hung: list[Replica] = []

    def arm(replica: Replica) -> None:
        async def hook(scope: Scope, receive: Receive, send: Send) -> bool:
            if hung or "completions" not in scope["path"]:
                return False
            hung.append(replica)
            return await hang(scope, receive, send)

        replica.engine.hook = hook

    for replica in replicas:
        arm(replica)
    return hung


async def given_back(stack: Stack, replica: Replica) -> None:
    """Wait until the replica's one leg was aborted and its hand-off settled, and nothing is left anywhere."""
    leg_id = replica.engine.seen[-1].headers["x-request-id"]
    await until(lambda: replica.engine.aborts == [leg_id] and leg_id in settled(stack))
    replica.cut()
    await stack.settled()


@TRANSPORTS
@pytest.mark.parametrize("more", [{}, {"stream": True}, {"n": 2}], ids=["whole", "streamed", "primed"])
async def test_a_slow_replica_leaves_time_for_another(transport: Any, more: dict[str, Any]) -> None:
    """Half of the deadline goes by on the silent replica; the other one still hands over."""
    config = GatewayConfig(prefill_timeout_s=0.4)
    async with running_stack(num_prefill=2, transport=transport, config=config) as stack:
        hung = first_hangs(stack, stack.prefill)
        reply = await stack.complete(PROMPT, **more)
        (slow,) = hung
        assert (reply.text, is_local(reply)) == (EXPECTED, False)
        assert reply.headers["x-disagg-prefill"] != slow.replica_id
        assert stack.metric("disagg_leg_retries_total", leg="prefill") == 1
        await given_back(stack, slow)
        assert "consumed" in outcomes(stack)


@TRANSPORTS
async def test_all_are_slow(transport: Any) -> None:
    """Each replica is tried once, none again, and decode computes the prompt at the deadline."""
    config = GatewayConfig(prefill_timeout_s=0.3)
    async with running_stack(num_prefill=3, transport=transport, config=config) as stack:
        held = Held(*stack.prefill)
        began = asyncio.get_running_loop().time()
        reply = await stack.complete(PROMPT)
        took = asyncio.get_running_loop().time() - began
        assert (reply.text, is_local(reply)) == (EXPECTED, True)
        assert sorted(r.replica_id for r in held.came) == ["p0", "p1", "p2"]
        assert 0.25 < took < 2
        assert stack.metric("disagg_local_prefills_total", reason="prefill_timeout") == 1
        await until(lambda: all(r.engine.aborts for r in stack.prefill) and len(settled(stack)) == 3)
        held.go_on.set()
        await until(lambda: outcomes(stack) == ["released"] * 3)
        await stack.settled()


@TRANSPORTS
async def test_the_first_token_target_ends_the_wait(transport: Any) -> None:
    """Half of the target, while no rate is known; the timeout alone would allow minutes."""
    config = GatewayConfig(first_token_target_s=0.2)
    async with running_stack(transport=transport, config=config) as stack:
        hung = first_hangs(stack, stack.prefill)
        reply = await stack.complete(PROMPT)
        assert (reply.text, is_local(reply)) == (EXPECTED, True)
        assert stack.metric("disagg_local_prefills_total", reason="prefill_timeout") == 1
        await given_back(stack, hung[0])


async def test_local_prefills_are_measured() -> None:
    """A streamed local answer tells how fast decode computes; a whole one and a hand-off say nothing."""
    async with running_stack(prefill_ms_per_1k_tokens=20) as stack:
        rate: LocalRate = stack.gateway.handoff._local_rate
        prompt = "word " * 200
        await stack.complete(prompt, stream=True)
        assert rate.tokens_per_s is None
        stack.gateway.membership.replace("prefill", [])
        await stack.complete(prompt + "whole")
        assert rate.tokens_per_s is None
        assert (await stack.complete("other " * 200, stream=True)).status == 200
        assert rate.tokens_per_s is not None
        assert 0 < rate.tokens_per_s < 50_000


@TRANSPORTS
async def test_a_refusal_is_not_retried(transport: Any) -> None:
    """What one prefill replica refuses, another would refuse as well."""
    async with running_stack(num_prefill=2, transport=transport) as stack:
        for replica in stack.prefill:
            replica.engine.hook = respond(400)
        reply = await stack.complete(PROMPT)
        assert (reply.text, is_local(reply)) == (EXPECTED, True)
        assert sum(len(r.engine.seen) for r in stack.prefill) == 1


# Hedging


HEDGED = GatewayConfig(hedge_after_s=0.02)


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"n": 2}], ids=["whole", "streamed", "primed"])
async def test_the_hedge_wins(more: dict[str, Any]) -> None:
    """A second leg, on another pair, answers for the first one, which is aborted and settled."""
    async with running_stack(num_prefill=2, num_decode=2, config=HEDGED) as stack:
        hung = first_hangs(stack, stack.prefill)
        reply = await stack.complete(PROMPT, **more)
        (slow,) = hung
        assert (reply.text, is_local(reply)) == (EXPECTED, False)
        assert reply.headers["x-disagg-prefill"] != slow.replica_id
        assert stack.metric("disagg_hedges_total", outcome="won") == 1
        assert stack.metric("disagg_leg_retries_total", leg="prefill") == 0
        assert sum(len(r.engine.seen) for r in stack.decode) == 1
        await given_back(stack, slow)
        assert stack.metric("disagg_client_disconnects_total", phase="prefill") == 0


async def test_the_hedge_loses() -> None:
    """The first leg answers after all: the second one is aborted, and what it may produce is given back."""
    async with running_stack(num_prefill=2, config=HEDGED) as stack:
        both = [Held(replica) for replica in stack.prefill]
        running = asyncio.create_task(stack.complete(PROMPT))
        await until(lambda: all(held.came for held in both))
        first, second = stack.prefill
        if first.engine.seen[0].headers["x-request-id"] > second.engine.seen[0].headers["x-request-id"]:
            first, second = second, first
            both.reverse()
        both[0].go_on.set()
        reply = await running
        assert (reply.text, reply.headers["x-disagg-prefill"]) == (EXPECTED, first.replica_id)
        assert stack.metric("disagg_hedges_total", outcome="lost") == 1
        await until(lambda: second.engine.aborts and settled(stack))
        both[1].go_on.set()
        await until(lambda: outcomes(stack) == ["consumed", "released"])
        await stack.settled()


async def test_the_first_is_lost_while_the_hedge_runs() -> None:
    """The hedge goes on, and there is no third attempt."""
    async with running_stack(num_prefill=3, config=HEDGED) as stack:
        held = Held(*stack.prefill)
        running = asyncio.create_task(stack.complete(PROMPT))
        await until(lambda: len(held.came) == 2)
        held.came[0].kill()
        await asyncio.sleep(0.05)
        held.go_on.set()
        reply = await running
        assert (reply.text, reply.headers["x-disagg-prefill"]) == (EXPECTED, held.came[1].replica_id)
        assert len(held.came) == 2
        assert stack.metric("disagg_hedges_total", outcome="won") == 1


async def test_both_legs_of_a_hedge_are_lost() -> None:
    """The third replica is tried then, as without hedging."""
    async with running_stack(num_prefill=3, config=HEDGED) as stack:
        held = Held(*stack.prefill)
        running = asyncio.create_task(stack.complete(PROMPT))
        await until(lambda: len(held.came) == 2)
        lost = list(held.came)
        for replica in lost:
            replica.kill()
        await until(lambda: len(held.came) == 3)
        held.go_on.set()
        reply = await running
        assert (reply.text, reply.headers["x-disagg-prefill"]) == (EXPECTED, held.came[2].replica_id)
        assert held.came[2] not in lost


async def test_a_fast_leg_is_not_hedged() -> None:
    """Nothing is sent twice while legs are answered in time; a single replica has no hedge."""
    async with running_stack(num_prefill=2, config=GatewayConfig(hedge_after_s=30)) as stack:
        assert (await stack.complete(PROMPT)).text == EXPECTED
        assert sum(len(r.engine.seen) for r in stack.prefill) == 1
    async with running_stack(config=HEDGED) as stack:
        held = Held(*stack.prefill)
        running = asyncio.create_task(stack.complete(PROMPT))
        await until(lambda: held.came)
        await asyncio.sleep(0.05)
        held.go_on.set()
        assert (await running).headers["x-disagg-prefill"] == "p0"
        assert len(held.came) == 1
        assert stack.metric("disagg_hedges_total", outcome="won") == stack.metric("disagg_hedges_total", outcome="lost")


async def test_the_client_leaves_a_hedged_request() -> None:
    """Both legs are aborted and settled, and the client has left once."""
    async with running_stack(num_prefill=2, config=HEDGED) as stack:
        held = Held(*stack.prefill)
        async with stack.streaming() as connection:
            await until(lambda: len(held.came) == 2)
            connection.leave()
            await until(lambda: all(r.engine.aborts for r in stack.prefill) and len(settled(stack)) == 2)
        held.go_on.set()
        await stack.settled()
        assert "consumed" not in outcomes(stack)
        assert stack.metric("disagg_client_disconnects_total", phase="prefill") == 1


async def test_decode_is_lost_after_a_hedge() -> None:
    """The winner's decode leg falls back as any other."""
    async with running_stack(num_prefill=2, num_decode=2, config=HEDGED) as stack:
        first_hangs(stack, stack.prefill)
        used: list[Replica] = []
        for replica in stack.decode:
            replica.engine.hook = _first_cut(used, replica)
        reply = await stack.complete(PROMPT)
        assert (reply.text, is_local(reply), len(used)) == (EXPECTED, True, 1)
        for replica in stack.prefill:
            replica.cut()
        await until(lambda: len(settled(stack)) == 2)


def _first_cut(used: list[Replica], replica: Replica) -> Any:
    death = once(cutting(replica, kill=True))

    async def hook(scope: Scope, receive: Receive, send: Send) -> bool:
        if used or "completions" not in scope["path"]:
            return False
        used.append(replica)
        return await death(scope, receive, send)

    return hook


@pytest.mark.parametrize(
    ("transport", "says"),
    [
        ({"type": "mooncake"}, "cannot work with transport mooncake"),
        ({"type": "nixl", "mode": "push"}, "cannot work with NIXL in push mode"),
    ],
)
def test_hedging_is_refused(transport: dict[str, str], says: str) -> None:
    """Where both legs are bound to each other there is nothing to hedge; the message says what to do."""
    config: dict[str, Any] = {
        "model": {"id": "m", "source": "org/m"},
        "transport": transport,
        "gateway": {"hedge_after_s": 1},
    }
    with pytest.raises(ValueError, match=says) as caught:
        AppConfig.model_validate(config)
    (error,) = caught.value.errors()  # type: ignore[attr-defined]
    assert error["ctx"]["field"] == "gateway.hedge_after_s"
    assert AppConfig.model_validate({**config, "transport": {"type": "nixl"}}).gateway.hedge_after_s == 1
    with pytest.raises(ValueError, match="over by then"):
        GatewayConfig(hedge_after_s=5, prefill_timeout_s=5)
