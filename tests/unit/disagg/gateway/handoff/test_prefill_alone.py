# SPDX-License-Identifier: Apache-2.0
"""The decode pool is lost: prefill replicas, whole engines that they are, answer in its place."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from disagg.config import GatewayConfig
from pools.engine.base import Receive, Scope, Send
from pools.engine.fake.text import encode
from tests.support.gateway_stack import Replica, Stack, respond, running_stack, until
from tests.unit.disagg.gateway.handoff.test_settling import EXPECTED, PROMPT
from tests.unit.disagg.gateway.stream.test_resume import GREEDY, PATHS, after, armed, shown, streamed, unbroken

TRANSPORTS = pytest.mark.parametrize("transport", ["nixl", "nixl-push", "mooncake"])
QUICK = GatewayConfig(watch_interval_s=0.02)
NUM_TOKENS = len(encode(PROMPT))


async def lose_decode(stack: Stack) -> None:
    """Kill every decode replica, as the gateway finds out by itself."""
    for replica in stack.decode:
        replica.kill()
    await until(lambda: not stack.gateway.membership.roster.decode)


@TRANSPORTS
async def test_prefill_answers_everything(transport: Any) -> None:
    """Whatever an engine is asked for, with the words and tokens that a decode replica gives."""
    async with running_stack(transport=transport, config=QUICK) as stack:
        tokenize = {"model": "tiny", "prompt": "x"}
        whole = await unbroken(stack, "/v1/chat/completions", **GREEDY)
        tokens = (await stack.call("POST", "/tokenize", tokenize)).json()
        await lose_decode(stack)
        reply = await stack.complete(PROMPT)
        assert (reply.status, reply.text) == (200, EXPECTED)
        assert (reply.headers["x-disagg-prefill"], reply.headers["x-disagg-decode"]) == ("local", "p0")
        assert shown(await streamed(stack, "/v1/chat/completions", **GREEDY)) == whole
        assert len((await stack.complete(PROMPT, n=2)).json()["choices"]) == 2
        assert (await stack.call("POST", "/tokenize", tokenize)).json() == tokens
        health = await stack.call("GET", "/health")
        assert (health.status, health.json()["status"]) == (200, "degraded")
        assert "prefill replicas serve alone" in health.json()["reason"]
        assert stack.metric("disagg_requests_total", endpoint="completions", mode="prefill", code="200") == 2
        await stack.settled()


@PATHS
@TRANSPORTS
async def test_streams_go_on_at_prefill(path: str, transport: Any) -> None:
    """A stream whose only decode replica is lost in the middle, with the tokens of one that was not."""
    async with running_stack(transport=transport, itl_ms=1) as stack:
        whole = await unbroken(stack, path, **GREEDY)
        [lost] = [stack.decode[0]]
        assert armed(stack, after(4), how=Replica.kill) == []
        assert shown(await streamed(stack, path, **GREEDY)) == whole
        assert stack.metric("disagg_resumes_total", outcome="resumed") == 1
        assert not stack.gateway.membership.roster.decode or lost.replica_id == "d0"
        await until(lambda: stack.prefill[0].is_idle)


async def test_a_hand_off_whose_decode_replica_is_lost() -> None:
    """Before its first byte: the request is answered by prefill, and its KV is given back."""
    async with running_stack() as stack:

        async def cut(scope: Scope, receive: Receive, send: Send) -> bool:
            stack.decode[0].kill()
            return True

        stack.decode[0].engine.hook = cut
        reply = await stack.complete(PROMPT)
        assert (reply.status, reply.text, reply.headers["x-disagg-decode"]) == (200, EXPECTED, "p0")
        await until(lambda: stack.prefill[0].is_idle)


async def test_a_decode_replica_that_comes_back_is_used_again() -> None:
    """Prefill answers alone only while no decode replica can."""
    async with running_stack(config=QUICK) as stack:
        await lose_decode(stack)
        assert (await stack.complete(PROMPT)).headers["x-disagg-decode"] == "p0"
        await stack.join("decode", "d1")
        await stack.warmed()
        reply = await stack.complete(PROMPT)
        assert (reply.headers["x-disagg-prefill"], reply.headers["x-disagg-decode"]) == ("p0", "d1")


async def test_its_budget_is_its_own() -> None:
    """Prompts that prefill computes alone are bounded by `prefill_alone_tokens`, whatever decode may compute."""
    config = GatewayConfig(watch_interval_s=0.02, prefill_alone_tokens=NUM_TOKENS + 1, local_prefill_tokens=10**6)
    async with running_stack(config=config) as stack:
        await lose_decode(stack)
        go_on = asyncio.Event()

        async def hold(scope: Scope, receive: Receive, send: Send) -> bool:
            await go_on.wait()
            return False

        stack.prefill[0].engine.hook = hold
        first = asyncio.create_task(stack.complete(PROMPT))
        [member] = stack.gateway.membership.members("prefill")
        await until(lambda: member.local_prefill_tokens)
        refused = await stack.complete(PROMPT)
        assert (refused.status, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        go_on.set()
        assert (await first).text == EXPECTED
        assert member.local_prefill_tokens == member.num_in_flight == 0


async def test_a_request_that_decode_cannot_take_is_tried_at_prefill() -> None:
    """Decode answers 5xx; when prefill does so, too, the client gets an engine's own words."""
    async with running_stack() as stack:
        stack.decode[0].engine.hook = respond(500)
        assert (await stack.complete(PROMPT)).text == EXPECTED
        whole = stack.prefill[0].engine.own_app

        async def answers_only_legs(scope: Scope, receive: Receive, send: Send) -> bool:
            return await respond(500)(scope, receive, send) if asked.pop(0) else False

        asked = [False, True]
        stack.prefill[0].engine.hook = answers_only_legs
        assert (await stack.complete(PROMPT)).status == 500
        assert whole is not None and asked == []


async def test_the_last_decode_replica_is_not_spared_any_more() -> None:
    """One that hangs is taken out although it is the last: prefill takes over what runs there."""
    async with running_stack(config=QUICK) as stack:
        [member] = stack.gateway.membership.members("decode")
        assert not stack.gateway.membership.is_last(member)
        stack.gateway.membership.quarantine(stack.gateway.membership.members("prefill")[0], "hang")
        assert stack.gateway.membership.is_last(member)
